"""`erw cost`: FLOPs of a recipe, its memory and time on a named accelerator.

* memory of a rank = 20 bytes a parameter (weight, gradient, two moments of AdamW, EMA, all float32)
  + 2 bytes a parameter under bf16 (autocast's copies) + activations: 48 bytes (bf16) or 80
  (float32) for each token, channel and block that runs, counted from what a training step of our
  SiT keeps for its backward; with optim.recompute 4, and those of one block. Fused attention keeps
  no scores. Compiling lowers it; buffers of libraries, about 1 GiB, and fragmentation come on top.
  With dist.strategy fsdp2 or hsdp its share of the 20 bytes + 8 (weight and gradient, whole) a
  parameter of two blocks.
* time = FLOPs / (accelerators x peak x utilisation). The peak is the maker's, dense bf16; 0.4 is
  what well-tuned transformers of this size reach.
* preparing takes as long as the slower of two that go on at once: decoding, by 16 threads for each
  accelerator at most, and VAE and encoder, one after the other.
"""

import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from erw import data, training
from erw.cli.settings import Recipe, Settings
from erw.config import Run
from erw.errors import CacheError, ConfigError, nearest

PARAMETER_BYTES = {"bf16": 22, "fp32": 20}
ACTIVATION_BYTES = {"bf16": 48, "fp32": 80}
INPUT_BYTES = 4
"""What a block that is computed again keeps."""
UTILISATION = 0.4
ACCELERATORS = tomllib.loads(Path(__file__).with_name("accelerators.toml").read_text())
TEACHER, TEACHER_DIM, TEACHER_FLOPS = "dinov2-b", 768, 46_322_454_528
VAE_FLOPS = 272_722_165_760
"""Channels of the patch tokens; FLOPs of one image there, and in Stable Diffusion's encoder."""


def cost(
    recipe: Recipe, run: Settings[Run], *, tiny: bool = False, gpu: str = "h100", gpus: int = 8,
    cores: int = os.cpu_count() or 1, price: float = 0.0,
) -> None:  # fmt: skip
    """Print parameters, FLOPs, memory and time of a recipe.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
        gpu: rtx3090, rtx4090, l40s, a100-40, a100, h100, h200 or b200.
        gpus: how many.
        cores: of its CPU, which decode the images that are prepared; by default as many as here.
        price: of one of them for an hour, in any currency; 0: not known.
    """
    if gpu not in ACCELERATORS:
        raise ConfigError(f"--gpu: unknown {gpu!r}{nearest(gpu, ACCELERATORS)}")
    for name, value, least in (("gpus", gpus, 1), ("cores", cores, 1), ("price", price, 0)):
        if value < least:
            raise ConfigError(f"--{name} is {value}; expected {least} or more")
    run, net, ledger, cache, text = account(run)
    peak, memory = ACCELERATORS[gpu]
    images = -(-run.data.batch_size // (gpus * run.optim.accumulate))
    precision = "fp32" if run.optim.precision == "fp32" else "bf16"
    m, dist = run.model, run.dist
    state: float = sum(p.numel() for p in net.parameters())
    if dist.strategy == "ddp":
        state *= PARAMETER_BYTES[precision]
    else:
        shares = gpus if dist.strategy == "fsdp2" else dist.shard_size or min(gpus, 8)
        state *= PARAMETER_BYTES["fp32"] / shares + 8 * 2 / (m.depth + m.head_depth)
    channels, kept = m.width * m.depth + m.head_width * m.head_depth, ACTIVATION_BYTES[precision]
    image = net.model.tokens * channels * kept
    if run.optim.recompute:
        widest = max(m.width, m.head_width * bool(m.head_depth))
        image = net.model.tokens * (channels * INPUT_BYTES + widest * kept)
    need, room = (state + images * image) / 2**30, 0.9 * memory * 2**30 - state
    most = int(room // image)  # images at once
    rank = max(1, run.data.batch_size // gpus)
    parts = next(n for n in range(1, rank + 1) if rank % n == 0 and rank // n <= max(1, most))
    fits = f"fits, up to {most:,}"
    if most < images:
        fits = f"does NOT fit: --optim.accumulate {parts}"
        fits = fits if most > 0 else "does NOT fit, even one image: take --dist.strategy fsdp2"
    speed = peak * UTILISATION * gpus * 3600
    hours = ledger.spent(run.steps).total / speed
    money = f", {hours * gpus * price:,.2f} at {price:g} a GPU and hour" * bool(price)
    print(
        f"{run.name}: {text}\n\non {gpus} x {gpu} at {UTILISATION:g} of its bf16 peak:\n"
        f"  memory      {need:.1f} of {memory} GiB a GPU, {images} images each in {precision}, "
        f"{dist.strategy}: {fits}\n  training    {hours:,.2f} h, bound by the network{money}"
    )
    if cache is None:
        from erw.data.images import decoding_rate

        rate, threads = decoding_rate(256), min(cores, 16 * gpus)
        decoding = ledger.rows / (rate * threads) / 3600
        vae, encoder = (ledger.rows * flops / speed for flops in (VAE_FLOPS, ledger.teacher))
        network = "the VAE" if vae > encoder else "the encoder"
        bound = "decoding" if decoding > vae + encoder else network
        print(
            f"  preparing   {max(decoding, vae + encoder):,.2f} h in bfloat16, bound by {bound}: "
            f"decoding {decoding:,.2f} h ({threads} cores, {rate:.0f} images/s each as here), "
            f"VAE {vae:,.2f} h, encoder {encoder:,.2f} h"
        )


def account(run: Run) -> tuple[Run, Any, "training.Ledger", "data.Cache | None", str]:
    """A run resolved by its cache, its `Network` on the meta device, its ledger, the cache if there
    is one, and all as text.

    Without a cache it is for ImageNet at 256, the VAE of Stable Diffusion and DINOv2-B.
    """
    import torch

    from erw.study.compare import amount as flops
    from erw.training.network import build_network, resolve

    cache = None
    try:
        cache = data.Cache.open(run.data.cache)
    except CacheError:
        if Path(run.data.cache[0]).expanduser().exists():
            raise
        dims = {t.encoder or TEACHER: TEACHER_DIM for t in run.plan.active if t.reads_encoder}
        model, reads = run.model, len(dims) or int(run.model.needs_token)
        model = replace(
            model,
            input_size=model.input_size or 32,
            channels=model.channels or 4,
            class_dim=TEACHER_DIM if model.needs_token else None,
            num_classes=1000 if model.num_classes is None else model.num_classes,
        )
        run = run.replace(model=model, data=replace(run.data, features=tuple(dims)))
        ledger = training.Ledger.from_dims(run, dims, teacher=TEACHER_FLOPS * reads, rows=1_281_167)
        origin = f"assumed, there is no cache {' '.join(run.data.cache)}: ImageNet at 256, "
        origin += "the VAE of Stable Diffusion" + f", {reads} teacher(s) as {TEACHER}" * bool(reads)
    else:
        run = resolve(run, cache)
        dims = {name: spec.dim for name, spec in cache.features.items()}
        ledger = training.Ledger.of(run, cache)
        origin = f"by the cache {cache.address}, {len(cache):,} images, VAE {cache.vae['name']}"
    with torch.device("meta"):
        net = build_network(run, dims)
    spent = ledger.spent(run.steps)
    count, heads = (sum(p.numel() for p in m.parameters()) for m in (net.model, net.projectors))
    projectors = f", projectors {heads / 1e6:.1f} M" * bool(heads)
    lines = [origin, f"parameters    {count / 1e6:.1f} M{projectors}"]
    until = min(run.plan.routing.until or 0, run.steps - 1)
    for step in sorted({run.plan.warmup, until, 0}, reverse=True):
        rate, batch = ledger.rate(step), ledger.images(step + 1) - ledger.images(step)
        name, one = "warm-up step" if rate.warmup else "full step", flops(rate.trained)
        name = "routed step" if run.plan(step).routing else name
        one += f", optimiser {flops(rate.own)}" * bool(rate.own)
        lines.append(f"{name:<14}{flops(batch * rate.trained + rate.own)}, {batch} images of {one}")
    if ledger.teacher:
        lines.append(f"teacher       {flops(ledger.teacher)} an image, once each from a cache")
    parts = f"of which warm-up {flops(spent.warmup)}, teacher {flops(spent.teacher)}"
    lines.append(f"run           {flops(spent.total)} in {run.steps:,} steps, {parts}")
    return run, net, ledger, cache, "\n".join(lines)
