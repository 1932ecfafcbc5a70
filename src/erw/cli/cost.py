"""`erw cost`: what a recipe costs, and what it would need on a named accelerator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from erw.cli.settings import Recipe, Settings, call
from erw.config import Run, nearest
from erw.data.cache import Cache
from erw.errors import CacheError, ConfigError
from erw.estimate import (
    ACCELERATORS,
    TEACHERS,
    UTILISATION,
    rank_memory,
    sd_encoder_flops,
    seconds,
)
from erw.sampling.solvers import solver_for
from erw.training.flops import Ledger, forward_flops
from erw.training.network import build_network, resolve


@dataclass(frozen=True)
class Parts:
    """What a resolved run needs, by its cache or as assumed without one: the encoders' channels,
    FLOPs of one image in the VAE, images, the ledger, and the source of all this in words."""

    run: Run
    dims: Mapping[str, int]
    encode: int
    rows: int
    ledger: Ledger
    origin: str


def main(args: Sequence[str]) -> None:
    call("cost", cost_to_target if "--to-target" in args else cost, args)


def cost(
    recipe: Recipe,
    run: Settings[Run],
    *,
    tiny: bool = False,
    gpu: str = "h100",
    gpus: int = 8,
    utilisation: float = UTILISATION,
    teacher: str = "dinov2-b",
    image_size: int = 256,
) -> None:
    """Print parameters, FLOPs, memory and time of a recipe; --to-target RUNS...: what a score cost.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
        gpu: rtx3090, rtx4090, l40s, a100-40, a100, h100, h200 or b200.
        gpus: how many.
        utilisation: share of the GPU's bf16 peak that is used.
        teacher: without a cache: dinov2-s, dinov2-b or dinov2-l.
        image_size: without a cache: side, for a VAE of factor 8.
    """
    for name, value, table in (("gpu", gpu, ACCELERATORS), ("teacher", teacher, TEACHERS)):
        if value not in table:
            raise ConfigError(f"--{name}: unknown {value!r}{nearest(value, table)}")
    if gpus < 1 or not 0 < utilisation <= 1:
        raise ConfigError("--gpus must be 1 or more, --utilisation above 0 and at most 1")
    parts = by_cache(run) or assumed(run, teacher=teacher, image_size=image_size)
    run, chosen = parts.run, ACCELERATORS[gpu]
    images = -(-run.data.batch_size // (gpus * run.optim.accumulate))
    precision = "fp32" if run.optim.precision == "fp32" else "bf16"
    with torch.device("meta"):
        net = build_network(run, parts.dims)
    need = rank_memory(
        parameters=sum(p.numel() for p in net.parameters()),
        images=images,
        tokens=net.model.tokens,
        width=run.model.width,
        blocks=run.model.depth,
        precision=precision,
    )
    fits = "fits" if need < 0.9 * chosen.memory else "does NOT fit: raise --optim.accumulate"

    def hours(work: float) -> str:
        return f"{seconds(work, chosen, count=gpus, utilisation=utilisation) / 3600:,.2f} h"

    print(f"{run.name}: {parts.origin}", "", *by_part(parts), "", sep="\n")
    print(f"on {gpus} x {gpu} at {utilisation:g} of its bf16 peak (`erw bench` measures):")
    print(f"  memory      {need / 2**30:.1f} of {chosen.memory / 2**30:.0f} GiB a GPU", end="")
    print(f", {images} images each in {precision}: {fits}")
    print(f"  training    {hours(parts.ledger.spent(run.steps).total)}")
    prepare = hours(parts.rows * (parts.encode + parts.ledger.teacher))
    print(f"  prepare     {prepare} for {parts.rows:,} images")
    if work := sampling(run)[0]:
        print(f"  50,000      {hours(50_000 * work)} to sample")


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
    return Parts(run, dims, cache.vae["flops"], len(cache), Ledger.of(run, cache), origin)


def assumed(run: Run, *, teacher: str, image_size: int) -> Parts:
    """What the run needs for ImageNet in latents like those of Stable Diffusion's VAE."""
    (dim, work), model = TEACHERS[teacher], run.model
    model = replace(
        model,
        input_size=model.input_size or image_size // 8,
        channels=model.channels or 4,
        class_dim=dim if model.needs_token else None,
        num_classes=1000 if model.num_classes is None else model.num_classes,
    )
    dims = {teacher: dim} if run.plan.reads_encoder else {}
    run = run.replace(model=model, data=replace(run.data, features=tuple(dims)))
    reads = bool(dims) or model.needs_token
    ledger = Ledger.from_dims(run, dims, teacher=work * reads, rows=1_281_167)
    origin = f"assumed, there is no cache {' '.join(run.data.cache)}: ImageNet at {image_size}, "
    origin += "the VAE of Stable Diffusion" + f", teacher {teacher}" * reads
    return Parts(run, dims, sd_encoder_flops(image_size), ledger.rows, ledger, origin)


def by_part(parts: Parts) -> list[str]:
    """Lines on parameters, on FLOPs of a step, and on the whole run."""
    run, book = parts.run, parts.ledger
    with torch.device("meta"):
        net = build_network(run, parts.dims)
    count, heads = (sum(p.numel() for p in m.parameters()) for m in (net.model, net.projectors))
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
        f"VAE           {flops(parts.encode)} to encode an image",
        f"sampling      {sampling(run)[1]}",
    ]


def sampling(run: Run) -> tuple[int, str]:
    """FLOPs of drawing one latent, and how, in words; 0 where the solver chooses its own steps."""
    how, (low, high) = run.sample, run.sample.interval
    solver = solver_for(how.solver, run.flow.objective)
    if solver.evaluations is None:
        return 0, f"not known: {how.solver} chooses its own steps"
    evaluations, times = solver.evaluations(how.steps), solver.times(how.steps, shift=how.shift)
    share = sum(low <= t <= high for t in times[:-1]) / how.steps if how.guidance != 1 else 0.0
    work = round(forward_flops(run) * evaluations * (1 + share))
    guided = f", guided in {share:.0%}" if share else ", no guidance"
    return work, f"{flops(work)} an image: {evaluations} evaluations ({how.solver}{guided})"


def flops(count: float) -> str:
    """1.5e12 -> "1.50 TFLOP"."""
    units = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9}
    unit = next((unit for unit, size in units.items() if count >= size), "M")
    return f"{count / units.get(unit, 1e6):.2f} {unit}FLOP"


def cost_to_target(
    *,
    to_target: tuple[str, ...],
    metric: str = "fd_lite2",
    target: float | None = None,
    over: Literal["flops", "epochs", "images", "steps", "seconds"] = "flops",
    out: str | None = None,
) -> None:
    """Print the cost to a target and speed-ups with their spread.

    Args:
        to_target: a study's folder, or folders of runs that were scored while training
            (--eval.every), several of which are seeds of one method if they differ in nothing else.
        metric: name of the score: fd_lite2 in studies, any that a run was scored with.
        target: the score to reach; none: each method's final score alone, by the others.
        over: the cost; epochs gives E@FID-k where the metric is fid.
        out: write OUT.json and the figure, OUT-light.svg and others.
    """
    from erw.study.compare import summary
    from erw.study.compare import to_target as compare
    from erw.study.plots import save_figure, score_figure
    from erw.study.results import read_runs

    metric = metric.replace("-", "_")
    runs, options = read_runs(to_target), dict[str, Any](over=over, target=target)
    record = compare(runs, metric, **options)
    print("\n".join(summary(record)))
    if out:
        draw: Any = lambda theme: score_figure(runs, metric, theme, **options)  # noqa: E731
        print("\n".join(map(str, save_figure(draw, out, data=record))))
