"""Memory and time of a run on a named accelerator, before it runs.

* memory of a rank = 20 bytes a parameter (weight, gradient, two moments of AdamW, EMA, all float32)
  + 2 bytes a parameter under bf16 (autocast's copies) + activations: 48 bytes (bf16) or 80
  (float32) for each token, channel and block that runs, counted from what a training step of our
  SiT keeps for its backward. Fused attention keeps no scores. Checkpointing and compiling lower it;
  buffers of libraries, about 1 GiB, and fragmentation come on top.
* time = FLOPs / (accelerators x peak x utilisation). The peak is the maker's, dense bf16; 0.4 is
  what well-tuned transformers of this size reach. `erw bench` measures.
"""

from typing import NamedTuple

STATE_BYTES = 20
CAST_BYTES = {"bf16": 2, "fp32": 0}
ACTIVATION_BYTES = {"bf16": 48, "fp32": 80}
UTILISATION = 0.4
GIB = 2**30


class Accelerator(NamedTuple):
    """Dense bf16 peak in FLOP/s and memory in bytes, by the maker's data sheet."""

    peak: float
    memory: int


ACCELERATORS = {
    "rtx3090": Accelerator(71e12, 24 * GIB),
    "rtx4090": Accelerator(165e12, 24 * GIB),
    "l40s": Accelerator(362e12, 48 * GIB),
    "a100-40": Accelerator(312e12, 40 * GIB),
    "a100": Accelerator(312e12, 80 * GIB),
    "h100": Accelerator(989e12, 80 * GIB),
    "h200": Accelerator(989e12, 141 * GIB),
    "b200": Accelerator(2250e12, 180 * GIB),
}
TEACHERS = {
    "dinov2-s": (384, 12_247_123_968),
    "dinov2-b": (768, 46_322_454_528),
    "dinov2-l": (1024, 162_023_964_672),
}
"""name -> channels of the patch tokens and FLOPs of one image."""


def sd_encoder_flops(image_size: int) -> int:
    """FLOPs of Stable Diffusion's VAE encoding one image of that side.

    Convolutions grow with the pixels, and one attention of width 512 with their square.
    """
    tokens = (image_size // 8) ** 2
    return round(270_574_682_112 * (image_size / 256) ** 2) + 4 * 512 * tokens**2


def rank_memory(
    *, parameters: int, images: int, tokens: int, width: int, blocks: int, precision: str = "bf16"
) -> int:
    """Bytes of one rank in training, by the model above; `images` are those of a micro-batch."""
    state = parameters * (STATE_BYTES + CAST_BYTES[precision])
    return state + images * tokens * width * blocks * ACTIVATION_BYTES[precision]


def seconds(
    flops: float, accelerator: Accelerator, *, count: int = 1, utilisation: float = UTILISATION
) -> float:
    """Seconds for that many FLOPs on `count` accelerators."""
    return flops / (accelerator.peak * utilisation * count)
