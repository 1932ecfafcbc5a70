"""A diffusers pipeline for class-conditional and unconditional flow models.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="pipeline",
                                             trust_remote_code=True)
    images = pipe(["cat", 3], num_inference_steps=50, guidance_scale=2.0).images

Time runs from 1 (noise) to 0 (data), the network gives the velocity noise - data, and the scheduler
takes Euler steps along it. Needs torch, numpy and diffusers alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Label = int | str


class FlowPipeline(DiffusionPipeline):
    """Images by Euler steps along a learned velocity.

    Args:
        transformer: `transformer(x, t, y)` is the velocity at x (B, C, h, w), times t (B,) in
            [0, 1] and classes y (B,); config.network says channels, input_size, num_classes.
        scheduler: a FlowMatchEulerDiscreteScheduler; its `shift` is the model's.
        vae: AutoencoderKL or AutoencoderTiny; None: the latents are the pixels.
        id2label: names by class number, as text; None or empty where there are none.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - the name and type are diffusers'

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    def get_label_ids(self, labels: Label | Sequence[Label]) -> list[int]:
        """Class numbers of names or numbers. Raises ValueError for one that the model lacks."""
        count = self.transformer.config.network["num_classes"]
        found = []
        for label in [labels] if isinstance(labels, int | str) else labels:
            if isinstance(label, str) and label not in self.labels:
                raise ValueError(f"no class {label!r}; known: {', '.join(self.labels) or 'none'}")
            number = self.labels[label] if isinstance(label, str) else int(label)
            if not 0 <= number < count:
                raise ValueError(f"class {number} is none of 0..{count - 1}")
            found.append(number)
        return found

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guided_channels: int | None = None,
        num_images: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: a class by name or number, or one for each image; None: no class.
            num_inference_steps: Euler steps, one evaluation each.
            guidance_scale: classifier-free guidance; 1 is none.
            guidance_interval: times (0 is data, 1 is noise) between which guidance acts.
            guided_channels: so many of the latents' first channels are guided; None: all.
            num_images: how many, where labels and latents do not say it.
            generator: randomness of the noise to start from.
            latents: that noise itself, (B, C, h, w).
            output_type: "pil", "np" (B, H, W, 3) and "pt" (B, 3, H, W) in [0, 1], or "latent".

        Raises:
            ValueError: unknown classes, numbers of images that contradict each other, or guidance
                without classes.
        """
        if guidance_scale != 1 and class_labels is None:
            raise ValueError("guidance_scale is not 1: give the class_labels to guide to")
        y = self._classes(class_labels, num_images, latents)
        x = self._noise(len(y), generator, latents)
        y = y.to(x.device)
        steps = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=steps.tolist(), device=x.device)
        low, high = guidance_interval
        for step in self.progress_bar(self.scheduler.timesteps):
            t = step / self.scheduler.config.num_train_timesteps
            scale = guidance_scale if low - 1e-6 <= float(t) <= high + 1e-6 else 1.0
            x = self.scheduler.step(
                self._velocity(x, t, y, scale, guided_channels), step, x
            ).prev_sample
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _classes(
        self, labels: Label | Sequence[Label] | None, count: int | None, latents: Tensor | None
    ) -> Tensor:
        """The class of each image; `num_classes` stands for none."""
        null = self.transformer.config.network["num_classes"]
        if isinstance(labels, int | str):
            labels = [labels] * (count or (1 if latents is None else len(latents)))
        if labels is None:
            chosen = [null] * (count or (1 if latents is None else len(latents)))
        else:
            chosen = self.get_label_ids(labels)
        for name, other in (("num_images", count), ("latents", latents)):
            number = other if other is None or isinstance(other, int) else len(other)
            if number not in (None, len(chosen)):
                raise ValueError(f"{len(chosen)} images by class_labels, {number} by {name}")
        return torch.tensor(chosen)

    def _noise(self, count: int, generator: Any, latents: Tensor | None) -> Tensor:
        network = self.transformer.config.network
        shape = (count, network["channels"], network["input_size"], network["input_size"])
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}; expected {shape}")
        return latents.to(device, torch.float32)

    def _velocity(
        self, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int | None
    ) -> Tensor:
        """The velocity at time t, guided: v_null + scale (v - v_null)."""
        if scale == 1:
            return self._ask(x, t, y)
        null = torch.full_like(y, self.transformer.config.network["num_classes"])
        v, v_null = self._ask(torch.cat([x, x]), t, torch.cat([y, null])).chunk(2)
        mixed = v_null + scale * (v - v_null)
        return mixed if channels is None else torch.cat([mixed[:, :channels], v[:, channels:]], 1)

    def _ask(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network, in its own precision; the state stays float32."""
        return self.transformer(x.to(self.transformer.dtype), t.expand(len(x)), y).float()

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            config = self.vae.config
            mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
            std = config.get("latents_std") or [1.0]
            mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
            x = x * std / config.scaling_factor + mean
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels
