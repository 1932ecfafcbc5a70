"""Tiny random vision transformers of every family, saved as on the hub."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,) * 3, (0.5,) * 3)
TINY = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
}  # fmt: skip
TEXT = {**TINY, "vocab_size": 16, "max_position_embeddings": 8}
# entry: (class that is saved, config, pixels, side for 256 px images, tokens before the patches)
# 64 px in the configs: stored positions are a 4 x 4 grid, so that 16 x 16 interpolates them.
FAMILIES: dict[str, tuple[str, Any, Any, int, int]] = {
    "dinov2-b": ("Dinov2Model", ("Dinov2Config", {"image_size": 56, "patch_size": 14}),
                 IMAGENET, 224, 1),
    "dinov2-b-reg": ("Dinov2WithRegistersModel", ("Dinov2WithRegistersConfig", {
                     "image_size": 56, "patch_size": 14, "num_register_tokens": 4}),
                     IMAGENET, 224, 5),
    "dino-b": ("ViTModel", ("ViTConfig", {"image_size": 64, "patch_size": 16}), IMAGENET, 256, 1),
    "dinov3-b": ("DINOv3ViTModel", ("DINOv3ViTConfig", {
                 "image_size": 64, "patch_size": 16, "num_register_tokens": 4}), IMAGENET, 256, 5),
    "clip-l": ("CLIPModel", ("CLIPConfig", {"image_size": 56, "patch_size": 14}), CLIP, 224, 1),
    "siglip2-b": ("SiglipModel", ("SiglipConfig", {"image_size": 64, "patch_size": 16}),
                  HALF, 256, 0),
    "mae-l": ("ViTMAEForPreTraining", ("ViTMAEConfig", {
              "image_size": 64, "patch_size": 16, "decoder_hidden_size": 24,
              "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}), IMAGENET, 256, 1),
    "ijepa-h": ("IJepaModel", ("IJepaConfig", {"image_size": 56, "patch_size": 14}),
                IMAGENET, 224, 0),
}  # fmt: skip


def images(count: int = 2, side: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    small = torch.randint(0, 256, (count, 3, side // 4, side // 4), generator=generator)
    return small.to(torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)


def saved(entry: str, folder: Path) -> nn.Module:
    """A tiny random model of that family, saved as on the hub."""
    name, (config_name, own), *_ = FAMILIES[entry]
    config = getattr(transformers, config_name)
    if name in ("CLIPModel", "SiglipModel"):
        config = config(vision_config={**TINY, **own}, text_config=TEXT, projection_dim=8)
    else:
        config = config(**TINY, **own)
    model = getattr(transformers, name)(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model
