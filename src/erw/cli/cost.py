"""`erw cost`: FLOPs of a recipe, and the memory and time that it needs on a named accelerator.

* memory of a rank = 20 bytes a parameter (weight, gradient, two moments of AdamW, EMA, all float32)
  + 2 bytes a parameter under bf16 (autocast's copies) + activations: 48 bytes (bf16) or 80
  (float32) for each token, channel and block that runs, counted from what a training step of our
  SiT keeps for its backward. Fused attention keeps no scores. Checkpointing and compiling lower it;
  buffers of libraries, about 1 GiB, and fragmentation come on top.
* time = FLOPs / (accelerators x peak x utilisation). The peak is the maker's, dense bf16; 0.4 is
  what well-tuned transformers of this size reach.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from erw.cli.settings import Recipe, Settings
from erw.config import Run, nearest
from erw.data.cache import Cache
from erw.errors import CacheError, ConfigError
from erw.study.compare import amount
from erw.training.flops import Ledger
from erw.training.network import Network, build_network, resolve

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


@dataclass(frozen=True)
class Parts:
    """A resolved run, its network on the meta device, its ledger, and the source of these."""

    run: Run
    net: Network
    ledger: Ledger
    origin: str


def cost(
    recipe: Recipe,
    run: Settings[Run],
    *,
    tiny: bool = False,
    gpu: str = "h100",
    gpus: int = 8,
    teacher: str = "dinov2-b",
) -> None:
    """Print parameters, FLOPs, memory and time of a recipe.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
        gpu: rtx3090, rtx4090, l40s, a100-40, a100, h100, h200 or b200.
        gpus: how many.
        teacher: without a cache: dinov2-s, dinov2-b or dinov2-l.
    """
    for name, value, table in (("gpu", gpu, ACCELERATORS), ("teacher", teacher, TEACHERS)):
        if value not in table:
            raise ConfigError(f"--{name}: unknown {value!r}{nearest(value, table)}")
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}; expected 1 or more")
    parts = by_cache(run) or assumed(run, teacher)
    run, chosen = parts.run, ACCELERATORS[gpu]
    images = -(-run.data.batch_size // (gpus * run.optim.accumulate))
    precision = "fp32" if run.optim.precision == "fp32" else "bf16"
    need = rank_memory(
        parameters=sum(p.numel() for p in parts.net.parameters()),
        images=images,
        tokens=parts.net.model.tokens,
        width=run.model.width,
        blocks=run.model.depth,
        precision=precision,
    )
    fits = "fits" if need < 0.9 * chosen.memory else "does NOT fit: raise --optim.accumulate"

    print(f"{run.name}: {parts.origin}", "", *by_part(parts), "", sep="\n")
    print(f"on {gpus} x {gpu} at {UTILISATION:g} of its bf16 peak:")
    print(f"  memory      {need / 2**30:.1f} of {chosen.memory / 2**30:.0f} GiB a GPU", end="")
    print(f", {images} images each in {precision}: {fits}")
    hours = parts.ledger.spent(run.steps).total / (chosen.peak * UTILISATION * gpus) / 3600
    print(f"  training    {hours:,.2f} h")


def by_cache(run: Run) -> Parts | None:
    """What the run needs by its cache; None where there is none."""
    try:
        cache = Cache.open(run.data.cache)
    except CacheError:
        if Path(run.data.cache[0]).expanduser().exists():
            raise
        return None
    run = resolve(run, cache)
    dims = {name: spec.dim for name, spec in cache.features.items()}
    origin = f"by the cache {cache.where}, {len(cache):,} images, VAE {cache.vae['name']}"
    return Parts(run, _on_meta(run, dims), Ledger.of(run, cache), origin)


def assumed(run: Run, teacher: str) -> Parts:
    """What the run needs for ImageNet at 256 in latents like those of Stable Diffusion's VAE."""
    (dim, work), model = TEACHERS[teacher], run.model
    model = replace(
        model,
        input_size=model.input_size or 32,
        channels=model.channels or 4,
        class_dim=dim if model.needs_token else None,
        num_classes=1000 if model.num_classes is None else model.num_classes,
    )
    dims = {teacher: dim} if run.plan.reads_encoder else {}
    run = run.replace(model=model, data=replace(run.data, features=tuple(dims)))
    reads = bool(dims) or model.needs_token
    ledger = Ledger.from_dims(run, dims, teacher=work * reads, rows=1_281_167)
    origin = f"assumed, there is no cache {' '.join(run.data.cache)}: ImageNet at 256, "
    origin += "the VAE of Stable Diffusion" + f", teacher {teacher}" * reads
    return Parts(run, _on_meta(run, dims), ledger, origin)


def _on_meta(run: Run, dims: Mapping[str, int]) -> Network:
    with torch.device("meta"):
        return build_network(run, dims)


def by_part(parts: Parts) -> list[str]:
    """Lines on parameters, on FLOPs of a step, and on the whole run."""
    run, book = parts.run, parts.ledger
    flops = partial(amount, over="flops")
    modules = parts.net.model, parts.net.projectors
    count, heads = (sum(p.numel() for p in m.parameters()) for m in modules)
    lines = [
        f"parameters    {count / 1e6:.1f} M" + f", projectors {heads / 1e6:.1f} M" * bool(heads)
    ]
    for step in dict.fromkeys((run.plan.warmup, 0)) if run.plan.warmup else (0,):
        rate, batch = book.rate(step), book.images(step + 1) - book.images(step)
        name = "warm-up step" if rate.warmup else "full step"
        work = f"{flops(batch * rate.trained)}, {batch} images of {flops(rate.trained)}"
        lines.append(f"{name:<14}{work}")
    if book.teacher:
        lines.append(f"teacher       {flops(book.teacher)} an image, once each from a cache")
    spent = book.spent(run.steps)
    return [
        *lines,
        f"run           {flops(spent.total)} in {run.steps:,} steps, of which warm-up "
        f"{flops(spent.warmup)}, teacher {flops(spent.teacher)}",
    ]


def rank_memory(
    *, parameters: int, images: int, tokens: int, width: int, blocks: int, precision: str = "bf16"
) -> int:
    """Bytes of one rank in training, by the model above; `images` are those of a micro-batch."""
    state = parameters * (STATE_BYTES + CAST_BYTES[precision])
    return state + images * tokens * width * blocks * ACTIVATION_BYTES[precision]
