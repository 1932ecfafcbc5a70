"""Vision transformers through transformers: tokens of frozen models, each in its own manner.

An entry says which model reads the weights and what belongs to it: mean and deviation of its
pixels, side of a patch, tokens that stand before the patches. Images are resized so that one token
covers 16 pixels: 256 px give 16 x 16 tokens, the grid of a SiT with patch 2 on latents of factor 8
(224 px for a patch of 14). ``NAME@SIDE`` sets the side instead. Positions are interpolated by the
model's own code in transformers.

Pooled features, for distances between sets of images, are of the side that the model was published
with, whatever the image's, after Pillow's resize.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from erw.encoders.base import Encoder, resize, resize_bytes
from erw.encoders.dinov2 import released_positions
from erw.encoders.pretrained import model_type, pretrained
from erw.encoders.vits_hub import HUB
from erw.errors import CheckpointError, ConfigError, DataError

PIXELS_A_TOKEN = 16
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of pixels in 0..1, one value a channel."""


class Family(NamedTuple):
    """What the models of one family share.

    ``model``: its class in transformers; ``types``: ``model_type`` of the folders it reads;
    ``before``: tokens before the patches, from the config; ``call``: what to pass beside pixels;
    ``options``: what to build the model with; ``pool``: its output -> pooled features, of images of
    ``side``, by default the config's; ``width``: of pooled features, from the config;
    ``positions``: parameters to replace for ``pooled``, from the network and its tokens a side.
    """

    model: str
    types: tuple[str, ...]
    pixels: Pixels
    before: Callable[[Any], int]
    call: Callable[[int, int, torch.device], dict[str, Any]]
    options: tuple[tuple[str, Any], ...] = ()
    pool: Callable[[Any], Tensor] = lambda out: out.last_hidden_state[:, 0]
    side: int | None = None
    width: Callable[[Any], int] = lambda config: int(config.hidden_size)
    positions: Callable[[Any, int], dict[str, Tensor]] = lambda network, tokens: {}


def _plain(batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    return {}


def _interpolated(batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    return {"interpolate_pos_encoding": True}


def _unmasked(batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """MAE sorts patches by noise even where it masks none: rising noise keeps their order."""
    noise = torch.arange(tokens, dtype=torch.float32, device=device).expand(batch, tokens)
    return {"interpolate_pos_encoding": True, "noise": noise}


def _cls(config: Any) -> int:
    return 1


def _registers(config: Any) -> int:
    return 1 + config.num_register_tokens


def _head(out: Any) -> Tensor:
    """CLIP: the class token after the last norm. SigLIP: what its attention pools."""
    pooled: Tensor = out.pooler_output
    return pooled


def _direction(out: Any) -> Tensor:
    """CLIP's image embedding in the space that it shares with text, of length 1."""
    return F.normalize(out.image_embeds, dim=1)


FAMILIES = {
    # Its config states the 518 px of its last steps; evaluators feed 224.
    "dinov2": Family(
        "Dinov2Model", ("dinov2",), IMAGENET, _cls, _plain, side=224, positions=released_positions
    ),
    "dinov2-reg": Family(
        "Dinov2WithRegistersModel",
        ("dinov2_with_registers",),
        IMAGENET,
        _registers,
        _plain,
        side=224,
    ),
    "dino": Family(
        "ViTModel", ("vit",), IMAGENET, _cls, _interpolated, (("add_pooling_layer", False),)
    ),
    "dinov3": Family("DINOv3ViTModel", ("dinov3_vit",), IMAGENET, _registers, _plain),
    "clip": Family(
        "CLIPVisionModel", ("clip", "clip_vision_model"), CLIP, _cls, _interpolated, pool=_head
    ),
    "clip-embedding": Family(
        "CLIPVisionModelWithProjection",
        ("clip", "clip_vision_model"),
        CLIP,
        _cls,
        _interpolated,
        pool=_direction,
        width=lambda config: int(config.projection_dim),
    ),
    "siglip2": Family(
        "SiglipVisionModel",
        ("siglip", "siglip_vision_model"),
        HALF,
        lambda _: 0,
        _interpolated,
        pool=_head,
    ),
    "mae": Family("ViTMAEModel", ("vit_mae",), IMAGENET, _cls, _unmasked, (("mask_ratio", 0.0),)),
    "ijepa": Family(
        "IJepaModel",
        ("ijepa",),
        IMAGENET,
        lambda _: 0,
        _interpolated,
        (("add_pooling_layer", False),),
        pool=lambda out: out.last_hidden_state.mean(1),
    ),
}


class VisionTransformer(Encoder):
    """Patch tokens of a transformers model: its last hidden state without CLS and registers.

    ``network``: the model; ``side``: side of its input in pixels, by default the image's side / 16
    patches, and for pooled features the side that the model was published with; ``pixels``: mean
    and deviation, by default the family's.

    Raises ``ConfigError`` for a side that is no multiple of the patch.
    """

    def __init__(
        self,
        name: str,
        network: Any,
        family: Family,
        *,
        side: int | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        super().__init__()
        patch = network.config.patch_size
        self.patch = int(patch if isinstance(patch, int) else patch[0])
        if side is not None and (side < self.patch or side % self.patch):
            raise ConfigError(
                f"input side {side} of {name}: expected a multiple of its patch, {self.patch}"
            )
        self.name = name + (f"@{side}" if side else "")
        self._side, self._family = side, family
        self.network = network
        self.revision = getattr(network.config, "_commit_hash", None)
        self.dim, self.dim_pooled = int(network.config.hidden_size), family.width(network.config)
        self.dim_class = self.dim_pooled
        # Others than the family's lie in the state: the weights' hash must tell one from another.
        own = pixels is not None and pixels != family.pixels
        mean, deviation = (torch.tensor(x).view(-1, 1, 1) for x in pixels or family.pixels)
        self.register_buffer("mean", 255 * mean, persistent=own)
        self.register_buffer("deviation", 255 * deviation, persistent=own)
        self.eval().requires_grad_(False)

    def grid(self, image_size: int) -> tuple[int, int]:
        if self._side is None and image_size % PIXELS_A_TOKEN:
            raise DataError(
                f"{self.name} gives one token per {PIXELS_A_TOKEN} px, which does not divide "
                f"images of {image_size} px: name an input side, as in "
                f"{self.name}@{16 * self.patch}"
            )
        tokens = (self._side or 0) // self.patch or image_size // PIXELS_A_TOKEN
        return tokens, tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.both(images)[0]

    @torch.no_grad()
    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.grid(images.shape[-1])[0]
        out = self._run(resize(images.to(self.mean.device), tokens * self.patch))  # type: ignore[arg-type]
        before = self._family.before(self.network.config)
        patches = out.last_hidden_state[:, before:].float().contiguous()
        return patches, self._family.pool(out).float().contiguous()

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        side = self._side or self._family.side or int(self.network.config.image_size)
        pixels = resize_bytes(images, side).to(self.mean.device)  # type: ignore[arg-type]
        out = self._run(pixels.float(), self._family.positions(self.network, side // self.patch))
        return self._family.pool(out).float().contiguous()

    def _run(self, pixels: Tensor, replaced: dict[str, Tensor] | None = None) -> Any:
        """The model's output for pixels (B, 3, s, s) of 0..255, some parameters `replaced`."""
        more = self._family.call(len(pixels), (pixels.shape[-1] // self.patch) ** 2, pixels.device)
        more["pixel_values"] = (pixels - self.mean) / self.deviation  # type: ignore[operator]
        return functional_call(self.network, replaced or {}, kwargs=more)

    def train(self, mode: bool = True) -> "VisionTransformer":
        """Stays in eval mode: a frozen teacher inside a model that is trained must not change."""
        return super().train(False)


def load(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    """The entry ``name`` with weights from the hub, or from a local folder of the same family.

    Raises ``CheckpointError`` where weights are missing, incomplete or of another family.
    """
    kind, hub = HUB[name]
    family = FAMILIES[kind]
    network = pretrained(
        family.model, family.types, hub, weights, name=name, **dict(family.options)
    )
    return VisionTransformer(name, network, family, side=side)


def load_folder(folder: Path, *, side: int | None = None) -> Encoder:
    """Any model of a known family from its folder; the encoder is named after the folder.

    Mean and deviation of pixels are those of the folder's preprocessor_config.json, where it tells
    them, else the family's. Raises ``ConfigError`` for a model of no known family,
    ``CheckpointError`` where a file is missing, incomplete or damaged.
    """
    found = model_type(folder)
    for family in FAMILIES.values():
        if found in family.types:
            pixels = _pixels(folder / "preprocessor_config.json", family.pixels)
            network = pretrained(
                family.model, family.types, None, folder, name=folder.name, **dict(family.options)
            )
            return VisionTransformer(folder.name, network, family, side=side, pixels=pixels)
    known = ", ".join(sorted({kind for family in FAMILIES.values() for kind in family.types}))
    raise ConfigError(f"{folder} holds a model of type {found!r}; known are {known}")


def _pixels(path: Path, default: Pixels) -> Pixels:
    """Mean and deviation that the file tells; `default` for a key, or a file, that is not there."""
    try:
        told = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"{path} holds a {type(told).__name__}: expected a JSON object")
    if told.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, deviation = told.get("image_mean", default[0]), told.get("image_std", default[1])
    for key, values, least in (("image_mean", mean, -math.inf), ("image_std", deviation, 0)):
        if (
            not isinstance(values, list | tuple)
            or len(values) != 3
            or not all(type(v) in (int, float) and math.isfinite(v) and v > least for v in values)
        ):
            raise CheckpointError(
                f"{path} has {key} {values!r}: expected three finite numbers"
                f"{', each above 0' if least == 0 else ''}; mend it, or remove it for the family's"
            )
    return tuple(map(float, mean)), tuple(map(float, deviation))
