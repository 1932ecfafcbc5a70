"""Estimates before a run: memory and time on a named accelerator, sampling, the usual frozen parts.

The model, in the open, because an estimate without one cannot be wrong:

* memory of a rank = 20 bytes a parameter (weight, gradient, two moments of AdamW, EMA, all float32)
  + 2 bytes a parameter under bf16 (autocast's copies) + activations: 48 bytes (bf16) or 80
  (float32) for each token, channel and block that runs, counted from what a training step of our
  SiT keeps for its backward. Fused attention keeps no scores. Checkpointing and compiling lower it;
  buffers of libraries, about 1 GiB, and fragmentation come on top.
* time = FLOPs / (accelerators x peak x utilisation). The peak is the maker's, dense bf16; 0.4 is
  what well-tuned transformers of this size reach. Not measured here: `erw bench` measures.
"""

from typing import NamedTuple

STATE_BYTES = 20
CAST_BYTES = {"bf16": 2, "fp32": 0}
ACTIVATION_BYTES = {"bf16": 48, "fp32": 80}
UTILISATION = 0.4


class Accelerator(NamedTuple):
    """Dense bf16 peak in FLOP/s and memory in bytes, by the maker's data sheet."""

    peak: float
    memory: int


GIB = 2**30
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


class Teacher(NamedTuple):
    """Width of an encoder's patch tokens and FLOPs of one image."""

    dim: int
    flops: int


TEACHERS = {
    "dinov2-s": Teacher(384, 12_247_123_968),
    "dinov2-b": Teacher(768, 46_322_454_528),
    "dinov2-l": Teacher(1024, 162_023_964_672),
}


def sd_vae_flops(image_size: int) -> tuple[int, int]:
    """(encode, decode) FLOPs of Stable Diffusion's VAE (factor 8) on one image of that side.

    Convolutions grow with the pixels, and one attention of width 512 with their square.
    """
    tokens = (image_size // 8) ** 2
    attention = 4 * tokens**2 * 512
    encoder, decoder = 270_574_682_112, 620_039_798_784  # convolutions and projections at 256
    scale = (image_size / 256) ** 2
    return round(encoder * scale) + attention, round(decoder * scale) + attention


def rank_memory(
    *,
    parameters: int,
    images: int,
    tokens: int,
    width: int,
    blocks: int,
    precision: str = "bf16",
) -> int:
    """Bytes of one rank in training, by the model above; `images` are those of a micro-batch."""
    state = parameters * (STATE_BYTES + CAST_BYTES[precision])
    return state + images * tokens * width * blocks * ACTIVATION_BYTES[precision]


def seconds(
    flops: float, accelerator: Accelerator, *, count: int = 1, utilisation: float = UTILISATION
) -> float:
    """Seconds for that many FLOPs on `count` accelerators."""
    return flops / (accelerator.peak * utilisation * count)


def sampling_flops(forward: int, *, evaluations: int, guided: float = 0.0, decode: int = 0) -> int:
    """FLOPs of one sample: evaluations, twice for the share that is guided, and its decoding."""
    return round(forward * evaluations * (1 + guided)) + decode
