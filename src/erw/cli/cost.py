"""`erw cost`: what a recipe costs by part, and what it would need on a named accelerator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from erw.cli.settings import Recipe, Settings, call, flops, recipe_of
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
from erw.training.build import resolve
from erw.training.flops import Ledger, cost_by_part, forward_flops
from erw.training.network import Network, build_network

IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class Parts:
    """What a recipe needs, by its cache or by what is assumed without one.

    Attributes:
        run: resolved.
        dims: channels of each encoder's features.
        teacher, encode: FLOPs of one image in the encoders and in the VAE's encoder.
        rows: images in the cache.
        origin: where this is from, in words.
    """

    run: Run
    dims: Mapping[str, int]
    teacher: int
    encode: int
    rows: int
    origin: str

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger.from_dims(self.run, self.dims, teacher=self.teacher, rows=self.rows)


def main(args: Sequence[str]) -> None:
    if "--to-target" in args:
        call("cost", cost_to_target, args)
    else:
        call("cost", cost, args, run=recipe_of("cost", args))


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
        run: its settings.
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
    lines = [f"{run.name}: {parts.origin}", "", *by_part(parts), ""]
    print("\n".join(lines + on_gpus(parts, gpu, gpus=gpus, utilisation=utilisation)))


def by_cache(run: Run) -> Parts | None:
    """What the run needs by its cache; None where there is none.

    Raises:
        CacheError, ConfigError: it cannot be read, or does not fit the run.
    """
    try:
        cache = Cache.open(run.data.cache)
    except CacheError:
        if Path(run.data.cache[0]).expanduser().exists():
            raise
        return None
    run = resolve(run, cache)
    encoders = dict.fromkeys((*run.data.features, *filter(None, [run.data.class_token])))
    return Parts(
        run=run,
        dims={name: spec.dim for name, spec in cache.features.items()},
        teacher=sum(cache.features[name].flops for name in encoders),
        encode=cache.vae["flops"],
        rows=len(cache),
        origin=f"by the cache {cache.where}, {len(cache):,} images, VAE {cache.vae['name']}",
    )


def assumed(run: Run, *, teacher: str, image_size: int) -> Parts:
    """What the run needs for ImageNet in latents like those of Stable Diffusion's VAE."""
    (dim, work), model = TEACHERS[teacher], run.model
    size, channels = model.input_size or image_size // 8, model.channels or 4
    model = replace(
        model,
        input_size=size,
        channels=channels,
        class_dim=dim if model.needs_token else None,
        num_classes=1000 if model.num_classes is None else model.num_classes,
    )
    dims = {teacher: dim} if run.plan.reads_encoder else {}
    data = replace(run.data, features=tuple(dims))
    text = f"assumed, there is no cache {' '.join(run.data.cache)}: ImageNet at {image_size}"
    text += f", latents {channels} x {size} x {size}, a VAE that costs what Stable Diffusion's does"
    reads = bool(dims) or model.needs_token
    return Parts(
        run=run.replace(model=model, data=data),
        dims=dims,
        teacher=work if reads else 0,
        encode=sd_encoder_flops(image_size),
        rows=IMAGENET,
        origin=text + f", teacher {teacher}" * reads,
    )


def by_part(parts: Parts) -> list[str]:
    """Lines on parameters, on FLOPs of an image and of a step, and on the whole run."""
    run, plan = parts.run, parts.run.plan
    step = cost_by_part(run, parts.dims, teacher=parts.teacher)
    batch = run.data.batch_size
    count, heads = parameters(parts)
    spent = parts.ledger.spent(run.steps)
    lines = [
        f"parameters    {count / 1e6:.1f} M" + f", projectors {heads / 1e6:.1f} M" * bool(heads),
        f"full step     {flops(batch * (step.full + step.projector))}, {batch} images: network "
        f"{flops(step.full)} an image" + f", projectors {flops(step.projector)}" * bool(heads),
    ]
    if plan.warmup:
        warm = plan.warmup_batch or batch
        lines.append(
            f"warm-up step  {flops(warm * (step.warmup + step.projector))}, {warm} images: "
            f"{plan.depth} of {run.model.depth} blocks, {flops(step.warmup)} an image"
        )
    if parts.teacher:
        lines.append(f"teacher       {flops(parts.teacher)} an image, once each from a cache")
    return [
        *lines,
        f"run           {flops(spent.total)} in {run.steps:,} steps, of which warm-up "
        f"{flops(spent.warmup)}, teacher {flops(spent.teacher)}",
        f"VAE           {flops(parts.encode)} to encode an image",
        f"sampling      {sampling(run)[1]}",
    ]


def on_gpus(parts: Parts, gpu: str, *, gpus: int, utilisation: float) -> list[str]:
    """Lines on memory and time with such accelerators."""
    run, model, chosen = parts.run, parts.run.model, ACCELERATORS[gpu]
    images = -(-run.data.batch_size // (gpus * run.optim.accumulate))
    precision = "fp32" if run.optim.precision == "fp32" else "bf16"
    need = rank_memory(
        parameters=sum(parameters(parts)),
        images=images,
        tokens=network(parts).model.tokens,
        width=model.width,
        blocks=model.depth,
        precision=precision,
    )
    fits = "fits" if need < 0.9 * chosen.memory else "does NOT fit: raise --optim.accumulate"

    def hours(work: float) -> str:
        took = seconds(work, chosen, count=gpus, utilisation=utilisation)
        return f"{took / 3600:,.1f} h" if took >= 3600 else f"{took / 60:,.1f} min"

    prepare = parts.rows * (parts.encode + parts.teacher)
    lines = [
        f"on {gpus} x {gpu} at {utilisation:g} of its bf16 peak (`erw bench` measures):",
        f"  memory      {need / 2**30:.1f} of {chosen.memory / 2**30:.0f} GiB a GPU, {images} "
        f"images each in {precision}: {fits}",
        f"  training    {hours(parts.ledger.spent(run.steps).total)}",
        f"  prepare     {hours(prepare)} for {parts.rows:,} images",
    ]
    work, _ = sampling(run)
    return lines + ([f"  50,000      {hours(50_000 * work)} to sample"] if work else [])


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


def parameters(parts: Parts) -> tuple[int, int]:
    """Parameters of the network, and of the projectors."""
    net = network(parts)
    model, projectors = (
        sum(p.numel() for p in part.parameters()) for part in (net.model, net.projectors)
    )
    return model, projectors


def network(parts: Parts) -> Network:
    """The network without memory."""
    with torch.device("meta"):
        return build_network(parts.run, parts.dims)


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
    runs = read_runs(to_target)
    record = compare(runs, metric, over=over, target=target)
    print("\n".join(summary(record)))
    if out:
        options: dict[str, Any] = {"over": over, "target": target}
        paths = save_figure(
            lambda theme: score_figure(runs, metric, theme, **options), out, data=record
        )
        print("\n".join(map(str, paths)))
