"""Vision transformers through transformers: patch tokens of frozen models.

A `Family` says which class reads the weights and how: mean and deviation of pixels, tokens before
the patches. Images are resized so that one token covers 16 pixels: 256 px give 16 x 16 tokens, the
grid of a SiT with patch 2 on latents of factor 8 (224 px for a patch of 14). `NAME@SIDE` sets the
side instead. Positions are interpolated by the model's own code in transformers.

Pooled features, for distances between sets of images, take the side that the model was published
with, whatever the image's, after Pillow's resize.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from erw.encoders.base import IMAGENET, Encoder, PatchEncoder, Pixels, resize_bytes
from erw.encoders.pretrained import Hub, from_transformers, read_json
from erw.errors import CheckpointError, ConfigError

CLIP: Pixels = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Pixels = ((0.5,) * 3, (0.5,) * 3)
DINOV2_OFFSET = 0.1


def dinov2_positions(network: Any, tokens: int) -> dict[str, Tensor]:
    """Position embeddings (1, 1 + tokens^2, D) as DINOv2's own code interpolates them.

    It scales the grid by (tokens + 0.1) / side, which moves the last of 16 positions by a quarter
    of a step of the stored 37; transformers scales by tokens / side. Published numbers, FD-DINOv2
    above all, are of the former.
    """
    stored = network.embeddings.position_embeddings
    side = round((stored.shape[1] - 1) ** 0.5)
    if side == tokens:
        return {}
    grid = stored[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
    grid = F.interpolate(grid, scale_factor=(tokens + DINOV2_OFFSET) / side, mode="bicubic")
    positions = torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2).to(stored)], 1)
    return {"embeddings.position_embeddings": positions}


class Family(NamedTuple):
    """What the models of one family share.

    `model`: class in transformers; `types`: `model_type` of the folders it reads; `interpolate`:
    whether to ask for interpolated positions; `noise`: whether patches are sorted by noise;
    `options`: for building the model; `pool`: its output -> pooled features (class tokens), of
    images of `side`, by default the config's; `width`: their width's name in the config;
    `positions`: parameters to replace for `pooled`, from the network and its tokens per side.
    """

    model: str
    types: tuple[str, ...]
    pixels: Pixels = IMAGENET
    interpolate: bool = True
    noise: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    pool: Callable[[Any], Tensor] = lambda out: out.last_hidden_state[:, 0]
    side: int | None = None
    width: str = "hidden_size"
    positions: Callable[[Any, int], dict[str, Tensor]] = lambda network, tokens: {}


_NO_POOLER = (("add_pooling_layer", False),)
_CLIP_TYPES = ("clip", "clip_vision_model")
FAMILIES = {
    # The config states the 518 px of DINOv2's last steps; evaluators feed 224.
    "dinov2": Family(
        "Dinov2Model", ("dinov2",), interpolate=False, side=224, positions=dinov2_positions
    ),
    "dinov2-reg": Family(
        "Dinov2WithRegistersModel", ("dinov2_with_registers",), interpolate=False, side=224
    ),
    "dino": Family("ViTModel", ("vit",), options=_NO_POOLER),
    "dinov3": Family("DINOv3ViTModel", ("dinov3_vit",), interpolate=False),
    "clip": Family("CLIPVisionModel", _CLIP_TYPES, CLIP, pool=lambda out: out.pooler_output),
    # The image embedding in the space that CLIP shares with text, of length 1.
    "clip-embedding": Family(
        "CLIPVisionModelWithProjection", _CLIP_TYPES, CLIP, width="projection_dim",
        pool=lambda out: F.normalize(out.image_embeds, dim=1),
    ),
    "siglip2": Family(
        "SiglipVisionModel", ("siglip", "siglip_vision_model"), HALF,
        pool=lambda out: out.pooler_output,
    ),
    "mae": Family("ViTMAEModel", ("vit_mae",), noise=True, options=(("mask_ratio", 0.0),)),
    "ijepa": Family(
        "IJepaModel", ("ijepa",), options=_NO_POOLER, pool=lambda out: out.last_hidden_state.mean(1)
    ),
}  # fmt: skip

# name -> key of FAMILIES, weights at a pinned commit
HUB: dict[str, tuple[str, Hub]] = {
    "dinov2-s": ("dinov2", Hub("facebook/dinov2-small",
        "ed25f3a31f01632728cabb09d1542f84ab7b0056")),
    "dinov2-b": ("dinov2", Hub("facebook/dinov2-base",
        "f9e44c814b77203eaa57a6bdbbd535f21ede1415")),
    "dinov2-l": ("dinov2", Hub("facebook/dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c")),
    "dinov2-g": ("dinov2", Hub("facebook/dinov2-giant",
        "611a9d42f2335e0f921f1e313ad3c1b7178d206d")),
    "dinov2-s-reg": ("dinov2-reg", Hub("facebook/dinov2-with-registers-small",
        "0d9846e56b43a21fa46d7f3f5070f0506a5795a9")),
    "dinov2-b-reg": ("dinov2-reg", Hub("facebook/dinov2-with-registers-base",
        "a1d738ccfa7ae170945f210395d99dde8adb1805")),
    "dinov2-l-reg": ("dinov2-reg", Hub("facebook/dinov2-with-registers-large",
        "e4c89a4e05589de9b3e188688a303d0f3c04d0f3")),
    "dinov2-g-reg": ("dinov2-reg", Hub("facebook/dinov2-with-registers-giant",
        "8d0d49f77fb8b5dd78842496ff14afe7dd4d85cb")),
    "dino-b": ("dino", Hub("facebook/dino-vitb16",
        "f205d5d8e640a89a2b8ef0369670dfc37cc07fc2")),
    "dinov3-s": ("dinov3", Hub("facebook/dinov3-vits16-pretrain-lvd1689m",
        "114c1379950215c8b35dfcd4e90a5c251dde0d32")),
    "dinov3-b": ("dinov3", Hub("facebook/dinov3-vitb16-pretrain-lvd1689m",
        "3a0fa61ff39414e2d3be4a1d50c7dfbf459aa8b8")),
    "dinov3-l": ("dinov3", Hub("facebook/dinov3-vitl16-pretrain-lvd1689m",
        "ea8dc2863c51be0a264bab82070e3e8836b02d51")),
    "clip-l": ("clip", Hub("openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41")),
    "clip-l-336": ("clip-embedding", Hub("openai/clip-vit-large-patch14-336",
        "ce19dc912ca5cd21c8a653c79e251e808ccabcd1")),
    "siglip2-b": ("siglip2", Hub("google/siglip2-base-patch16-256",
        "3f9f96cb90da5dbc758b01813f2f6f1aee24c1ab")),
    "siglip2-l": ("siglip2", Hub("google/siglip2-large-patch16-256",
        "787800c8990e6f058423089178e718139608408c")),
    "siglip2-so400m": ("siglip2", Hub("google/siglip2-so400m-patch16-256",
        "e8708ab72d125807e45b36fb7d4e0aacbb59f379")),
    "mae-l": ("mae", Hub("facebook/vit-mae-large",
        "142cb8c25e1b1bc1769997a919aa1b5a2345a6b8")),
    "ijepa-h": ("ijepa", Hub("facebook/ijepa_vith14_1k",
        "f157467ea509bc356ff9f61fd3c0d840eec5e04e")),
}  # fmt: skip


class VisionTransformer(PatchEncoder):
    """Patch tokens of a transformers model: its last hidden state without the prefix tokens.

    `source`: of the weights; `side`: of its input in pixels; `pixels`: mean and deviation, by
    default the family's. Raises `CheckpointError` where weights are missing, incomplete or of
    another family.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        *,
        source: Hub | Path,
        side: int | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        network = from_transformers(
            family.model, family.types, source, name=name, **dict(family.options)
        )
        config = network.config
        patch = config.patch_size
        super().__init__(name, patch=int(patch if isinstance(patch, int) else patch[0]), side=side)
        self.network, self.family = network, family
        self.revision = getattr(config, "_commit_hash", None)
        self.dim = int(config.hidden_size)
        self.dim_pooled = self.dim_class = int(getattr(config, family.width))
        own = pixels is not None and pixels != family.pixels
        self.set_pixels(pixels or family.pixels, hashed=own)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.both(images)[0]

    @torch.no_grad()
    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.grid(images.shape[-1])[0] ** 2
        out = self._run(self.resized(images))
        patches = out.last_hidden_state[:, -tokens:]  # CLS and registers stand before them
        return patches.float().contiguous(), self.family.pool(out).float().contiguous()

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        side = self.side or self.family.side or int(self.network.config.image_size)
        replaced = self.family.positions(self.network, side // self.patch)
        out = self._run(resize_bytes(images, side), replaced)
        return self.family.pool(out).float().contiguous()

    def _run(self, pixels: Tensor, replaced: dict[str, Tensor] | None = None) -> Any:
        """The model's output for pixels (B, 3, s, s) in 0..255, some parameters `replaced`."""
        kwargs: dict[str, Any] = {"pixel_values": self.normalised(pixels)}
        if self.family.interpolate:
            kwargs["interpolate_pos_encoding"] = True
        if self.family.noise:  # rising noise keeps the patches' order
            tokens = (pixels.shape[-1] // self.patch) ** 2
            noise = torch.arange(tokens, dtype=torch.float32, device=self.device)
            kwargs["noise"] = noise.expand(len(pixels), -1)
        return functional_call(self.network, replaced or {}, kwargs=kwargs)


def load(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    """The entry `name` with weights from the hub, or from a local folder of the same family."""
    family, hub = HUB[name]
    return VisionTransformer(name, FAMILIES[family], source=weights or hub, side=side)


def load_folder(folder: Path, *, side: int | None = None) -> Encoder:
    """Any model of a known family from its folder; the encoder is named after the folder.

    Mean and deviation of pixels are those in the folder's preprocessor_config.json, by default the
    family's. Raises `ConfigError` for a model of an unknown family, `CheckpointError` for a
    damaged file.
    """
    kind = read_json(folder / "config.json").get("model_type")
    for family in FAMILIES.values():
        if kind in family.types:
            pixels = _pixels(folder / "preprocessor_config.json", family.pixels)
            return VisionTransformer(folder.name, family, source=folder, side=side, pixels=pixels)
    known = ", ".join(sorted({kind for family in FAMILIES.values() for kind in family.types}))
    raise ConfigError(f"{folder} holds a model of type {kind!r}; known are {known}")


def _pixels(path: Path, default: Pixels) -> Pixels:
    """Mean and deviation from the file; `default` for a key, or a file, that is missing."""
    if not path.exists():
        return default
    config = read_json(path)
    if config.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, deviation = config.get("image_mean", default[0]), config.get("image_std", default[1])
    for key, values, least in (("image_mean", mean, -math.inf), ("image_std", deviation, 0)):
        try:
            valid = len(values) == 3 and all(least < value < math.inf for value in values)
        except TypeError:
            valid = False
        if not valid:
            raise CheckpointError(
                f"{path} has {key} {values!r}: expected three finite numbers, deviations above 0"
            )
    return tuple(map(float, mean)), tuple(map(float, deviation))
