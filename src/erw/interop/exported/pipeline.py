"""A diffusers pipeline for flow models and DiTs, with classes and without.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipe(["cat", 3], num_inference_steps=50, guidance_scale=2.0).images

Time runs from 1 (noise) to 0 (data). A flow model's velocity noise - data is followed by Euler
steps, a DiT's noise by DDIM. Needs torch and diffusers alone.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class FlowPipeline(DiffusionPipeline):
    """Images from noise, by a `FlowTransformer` and an AutoencoderKL or AutoencoderTiny; without a
    VAE the latents are the pixels. `shift`: of the times, s t / (1 + (s - 1) t)."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - the name and type are diffusers'

    def __init__(
        self, transformer: Any, vae: Any = None, id2label: Any = None, shift: float = 1.0
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(id2label=id2label, shift=shift)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
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
            num_inference_steps: steps, one evaluation each.
            guidance_scale: classifier-free guidance; 1 is none.
            guidance_interval: times (0 is data, 1 is noise) between which guidance acts.
            guided_channels: only the latents' first channels are guided; None: all.
            num_images: how many, where labels and latents do not say it.
            generator: of the noise to start from.
            latents: that noise itself, (B, C, h, w).
            output_type: "pil", "np" (B, H, W, 3) and "pt" (B, 3, H, W) in [0, 1], or "latent".
        """
        if guidance_scale != 1 and class_labels is None:
            raise ValueError("guidance_scale is not 1: give the class_labels to guide to")
        network, device = self.transformer.config.network, self._execution_device
        null = network["num_classes"]
        known = {None: null} | self.labels | {n: n for n in range(null)}
        if class_labels is None or isinstance(class_labels, int | str):
            count = num_images or (1 if latents is None else len(latents))
            class_labels = [class_labels] * count  # type: ignore[list-item]
        if unknown := [label for label in class_labels if label not in known]:
            raise ValueError(f"no class {unknown[0]!r}; 0 to {null - 1}, {', '.join(self.labels)}")
        y = torch.tensor([known[label] for label in class_labels], device=device)
        shape = (len(y), *[network[k] for k in ("channels", "input_size", "input_size")])
        x = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents
        if x.shape != shape or num_images not in (None, len(y)):
            raise ValueError(f"latents {tuple(x.shape)}, {num_images} images: expected {shape}")
        x, (low, high) = x.to(device, torch.float32), guidance_interval
        for t, t_next in self.progress_bar(list(pairwise(self._times(num_inference_steps)))):
            out = self._predict(x, t, y)
            if guidance_scale != 1 and low - 1e-6 <= t <= high + 1e-6:
                plain, c = self._predict(x, t, torch.full_like(y, null)), guided_channels
                out[:, :c] = plain[:, :c] + guidance_scale * (out[:, :c] - plain[:, :c])
            x = self._step(x, out, t, t_next)
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _times(self, steps: int) -> list[float]:
        """Falling times from 1 to 0; a DiT's are evenly spaced steps of its chain of 1,000."""
        if self.transformer.config.objective == "ddpm":
            if not 2 <= steps <= 1000:
                raise ValueError(f"{steps} steps; expected 2 to 1000")
            places = accumulate([999 / (steps - 1)] * (steps - 1), initial=0.0)
            return [*reversed([(round(place) + 1) / 1000 for place in places]), 0.0]
        even, shift = (1 - i / steps for i in range(steps + 1)), self.config.shift
        return [shift * t / (1 + (shift - 1) * t) for t in even]

    def _predict(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """The network in its own precision; the state stays float32."""
        times = torch.full((len(x),), t, device=x.device)
        return self.transformer(x.to(self.transformer.dtype), times, y).float()

    def _step(self, x: Tensor, out: Tensor, t: float, t_next: float) -> Tensor:
        """An Euler step, or DDIM's without noise (arXiv 2010.02502, Eq. 12)."""
        if self.transformer.config.objective == "flow":
            return x + (t_next - t) * out
        betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
        abar = [1.0, *(1 - betas).cumprod(0).tolist()]
        now, after = (abar[round(1000 * time)] for time in (t, t_next))
        clean = (x - (1 - now) ** 0.5 * out) / now**0.5
        return after**0.5 * clean + (1 - after) ** 0.5 * out

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            config = self.vae.config
            if "encoder_hidden_size" in config:  # a RAE scales by itself and gives 0 to 1
                x = 2 * self.vae.decode(x.to(self.vae.dtype)).sample.float() - 1
                return VaeImageProcessor().postprocess(x, output_type=output_type)
            mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
            std = config.get("latents_std") or [1.0]
            mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
            x = x * std / config.scaling_factor + mean
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        return VaeImageProcessor().postprocess(x, output_type=output_type)
