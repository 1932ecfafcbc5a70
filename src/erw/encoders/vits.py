"""Vision transformers and ConvNeXt V2 through transformers: patch tokens of frozen models.

Images are resized so that one token covers 16 pixels (256 px to 224 px for a patch of 14); for
pooled features to the side that the model was published with, as Pillow does.
"""

import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from erw.encoders.base import IMAGENET, PatchEncoder, Pixels, resize
from erw.encoders.names import HUB
from erw.encoders.pretrained import load_complete
from erw.errors import CheckpointError, ConfigError
from erw.io import read_json

CLIP: Pixels = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Pixels = ((0.5,) * 3, (0.5,) * 3)


def dinov2_positions(network: Any, tokens: int) -> dict[str, Tensor]:
    """Position embeddings (1, 1 + tokens^2, D) as DINOv2's own code interpolates them.

    It scales the grid by (tokens + 0.1) / side, transformers by tokens / side: a quarter of a step
    at the end of 16. Published numbers, FD-DINOv2 above all, are of the former.
    """
    stored = network.embeddings.position_embeddings
    side = round((stored.shape[1] - 1) ** 0.5)
    if side == tokens:
        return {}
    grid = stored[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
    grid = F.interpolate(grid, scale_factor=(tokens + 0.1) / side, mode="bicubic")
    positions = torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2).to(stored)], 1)
    return {"embeddings.position_embeddings": positions}


class Family(NamedTuple):
    """What the models of one family share.

    `types`: `model_type` of the folders it reads; `options`: for building the `model`; `pool`: its
    output -> pooled features (class tokens), of images of `side`, by default the config's;
    `stride`: of a convolutional network; `positions`: parameters to replace for `pooled`, from
    network and tokens per side.
    """

    model: str
    types: tuple[str, ...]
    pixels: Pixels = IMAGENET
    options: tuple[tuple[str, Any], ...] = ()
    pool: Callable[[Any], Tensor] = lambda out: out.last_hidden_state[:, 0]
    side: int | None = None
    stride: int | None = None
    positions: Callable[[Any, int], dict[str, Tensor]] = lambda network, tokens: {}


_NO_POOLER = (("add_pooling_layer", False),)
_CLIP_TYPES = ("clip", "clip_vision_model")
# The family of an entry is its name without the size.
FAMILIES = {
    # The config states the 518 px of DINOv2's last steps; evaluators feed 224.
    "dinov2": Family("Dinov2Model", ("dinov2",), side=224, positions=dinov2_positions),
    "dinov2-reg": Family("Dinov2WithRegistersModel", ("dinov2_with_registers",), side=224),
    "dino": Family("ViTModel", ("vit",), options=_NO_POOLER),
    "dinov3": Family("DINOv3ViTModel", ("dinov3_vit",)),
    "clip": Family("CLIPVisionModel", _CLIP_TYPES, CLIP, pool=lambda out: out.pooler_output),
    # The image embedding in the space that CLIP shares with text, of length 1.
    "clip-336": Family(
        "CLIPVisionModelWithProjection", _CLIP_TYPES, CLIP,
        pool=lambda out: F.normalize(out.image_embeds, dim=1),
    ),
    "siglip2": Family(
        "SiglipVisionModel", ("siglip", "siglip_vision_model"), HALF,
        pool=lambda out: out.pooler_output,
    ),
    "mae": Family("ViTMAEModel", ("vit_mae",), options=(("mask_ratio", 0.0),)),
    "ijepa": Family(
        "IJepaModel", ("ijepa",), options=_NO_POOLER, pool=lambda out: out.last_hidden_state.mean(1)
    ),
    # Its last map, before the last norm, as tokens or their mean.
    "convnextv2": Family(
        "ConvNextV2Model", ("convnextv2",), side=224, stride=32,
        pool=lambda out: out.last_hidden_state.float().mean((2, 3)),
    ),
}  # fmt: skip


class VisionTransformer(PatchEncoder):
    """Patch tokens of a transformers model: its last hidden state without the prefix tokens.

    `name`: an entry of `HUB`, with weights from there or a folder of the same family, or None: a
    folder of any family, after which the encoder is named, with its own mean and deviation.
    """

    def __init__(
        self, name: str | None, *, side: int | None = None, weights: Path | None = None
    ) -> None:
        stem = re.sub(r"-(s|b|l|g|h|so400m)(?=-|$)", "", name or "")
        families = [FAMILIES[stem]] if name else list(FAMILIES.values())
        kind = weights and read_json(weights / "config.json").get("model_type")
        family = next((f for f in families if not weights or kind in f.types), None)
        if family is None:
            types = ", ".join(kind for family in families for kind in family.types)
            raise CheckpointError(f"{weights} is of type {kind!r}: expected {types}")
        source = weights or HUB[name or ""]
        pixels = family.pixels if name else _pixels(Path(source), family.pixels)
        name = name or Path(source).name
        network = load_complete(
            "transformers", family.model, source, name=name, dtype="float32", **dict(family.options)
        )
        config = network.config
        patch, stride = family.stride or config.patch_size, family.stride or 16
        super().__init__(name, patch=patch, stride=stride, side=side)
        self.network, self.family = network, family
        self.revision = getattr(config, "_commit_hash", None)
        self.dim = config.hidden_sizes[-1] if family.stride else config.hidden_size
        projection = getattr(network, "visual_projection", None)
        self.dim_pooled = projection.out_features if projection else self.dim
        self.dim_class = 0 if family.stride else self.dim_pooled
        self.set_pixels(pixels, hashed=pixels != family.pixels)
        self.eval().requires_grad_(False)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self._run(self.resized(images), {})
        states = out.last_hidden_state
        states = states.flatten(2).transpose(1, 2) if self.family.stride else states
        tokens = self.grid(images.shape[-1])[0] ** 2
        patches = states[:, -tokens:]  # CLS and registers stand before them
        return patches.float().contiguous(), self.family.pool(out).float().contiguous()

    def pooled(self, images: Tensor) -> Tensor:
        side = self.side or self.family.side or int(self.network.config.image_size)
        replaced = self.family.positions(self.network, side // self.patch)
        out = self._run(resize(images, side, rounded=True), replaced)
        return self.family.pool(out).float().contiguous()

    def _run(self, pixels: Tensor, replaced: dict[str, Tensor]) -> Any:
        """The model's output for pixels (B, 3, s, s) in 0..255, some parameters `replaced`."""
        tokens = torch.arange((pixels.shape[-1] // self.patch) ** 2, device=self.device)
        inputs = {
            "pixel_values": self.normalised(pixels),
            "interpolate_pos_encoding": True,
            "noise": tokens.float().expand(len(pixels), -1),  # rising: it keeps the patches' order
        }
        taken = inputs.keys() & signature(self.network.forward).parameters
        return functional_call(self.network, replaced, kwargs={key: inputs[key] for key in taken})


class AttentionVectors(VisionTransformer):
    """The queries and keys of one block for the patches, (B, T, 2 F), queries first: a teacher of
    attention (HASTE, arXiv 2505.16792). Prefix tokens are left out, as there.

    `block`: counted from 1. Raises ConfigError for a model without such attention: a convolutional
    one, or one that turns queries and keys by their position afterwards (DINOv3).
    """

    def __init__(
        self, name: str, *, block: int, side: int | None = None, weights: Path | None = None
    ) -> None:
        super().__init__(name, side=side, weights=weights)
        paths = dict(self.network.named_modules())
        layers = [
            [m for path, m in paths.items() if path.rpartition(".")[2] in names]
            for names in (("q_proj", "query"), ("k_proj", "key"))
        ]
        count = 0 if any("rope" in path for path in paths) else len(layers[0])
        if not 1 <= block <= count:
            has = f"has attention in blocks 1 to {count}" if count else "has no plain attention"
            raise ConfigError(f"encoder {name}#attention{block}: {name} {has}")
        self._attended = [kind[block - 1] for kind in layers]
        self._kept = local()  # outputs by layer of a thread's own call: threads share the network
        for layer in self._attended:
            layer.register_forward_hook(self._keep)
        self.name = self.name.replace(name, f"{name}#attention{block}", 1)
        self.dim, self.dim_class = sum(layer.out_features for layer in self._attended), 0

    def forward(self, images: Tensor) -> Tensor:
        kept = self._kept.outputs = dict[nn.Module, Tensor]()
        self._run(self.resized(images), {})
        tokens = self.grid(images.shape[-1])[0] ** 2
        both = [kept[layer][:, -tokens:] for layer in self._attended]
        return torch.cat(both, -1).float().contiguous()

    def _keep(self, layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._kept.outputs[layer] = output


def _pixels(folder: Path, default: Pixels) -> Pixels:
    """Mean and deviation from the folder's file; `default` for what is missing."""
    path = folder / "preprocessor_config.json"
    config = read_json(path) if path.exists() else {}
    values = [config.get(key, default[i]) for i, key in enumerate(("image_mean", "image_std"))]
    try:
        pixels = torch.tensor(values, dtype=torch.float64)
        if pixels.shape != (2, 3) or not pixels.isfinite().all() or pixels[1].min() <= 0:
            raise ValueError
    except (TypeError, ValueError) as error:
        expected = "expected 2 x 3 numbers, the deviations positive"
        raise CheckpointError(f"{path} has image_mean, image_std {values}: {expected}") from error
    mean, deviation = pixels.tolist()
    return tuple(mean), tuple(deviation)
