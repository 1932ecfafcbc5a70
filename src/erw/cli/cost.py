"""`erw cost`: what a recipe costs by part, and what it would need on a named accelerator."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from erw.cli.settings import Parser, add_settings, changed, read_recipe, settings, typed
from erw.config import Run, nearest
from erw.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from erw.training.flops import Cost

BYTES_A_PARAMETER = 4 * (1 + 1 + 2 + 1)  # weight, gradient, AdamW's two moments, EMA, in float32


class Parts(NamedTuple):
    """What a recipe is made of, from its cache or from what is assumed without one."""

    run: Run
    tokens: int
    channels: int
    dims: dict[str, int]
    cost: Cost
    encode: int
    decode: int
    rows: int
    said: str


def cost(args: Sequence[str]) -> None:
    """Print parameters, FLOPs, memory and time of a recipe; or what reaching a score cost."""
    if "--to-target" in args:
        return to_target(args)
    from erw.models.estimate import ACCELERATORS, TEACHERS, UTILISATION

    def more(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--gpu", default="h100", metavar="NAME", help=f"{', '.join(ACCELERATORS)} [h100]")
        add("--gpus", type=int, default=8, metavar="N", help="how many [8]")
        add("--utilisation", type=float, default=UTILISATION, help=f"of its peak [{UTILISATION}]")
        add("--teacher", default="dinov2-b", help=f"without a cache: {', '.join(TEACHERS)}")
        add("--image-size", type=int, default=256, help="without a cache: side, VAE factor 8 [256]")

    run, found = read_recipe("cost", args, usage="[--gpu NAME] [--gpus N]", more=more)
    for name, table in (("gpu", ACCELERATORS), ("teacher", TEACHERS)):
        if (value := getattr(found, name)) not in table:
            raise ConfigError(f"--{name}: unknown {value!r}{nearest(value, table)}")
    if found.gpus < 1 or not 0 < found.utilisation <= 1:
        raise ConfigError("--gpus must be 1 or more, --utilisation above 0 and at most 1")
    try:
        parts = from_cache(run)
    except CacheError:
        parts = assumed(run, teacher=found.teacher, image_size=found.image_size)
    print("\n".join([*by_part(parts), "", *on(parts, found)]))


def from_cache(run: Run) -> Parts:
    """Everything as the recipe's cache has it. Raises CacheError without one."""
    from erw.data.cache import Cache

    known, cache = known_cost(run), Cache.open(run.data.cache)
    model = known.run.model
    assert model.channels and model.input_size and model.num_classes is not None
    encode, decode = vae_flops(cache.vae["name"], cache.image_size)
    return Parts(
        known.run, tokens_of(known.run), model.channels,
        known.dims, known.cost, encode, decode, len(cache),
        f"by the cache {cache.where}, {len(cache):,} images, VAE {cache.vae['name']}",
    )  # fmt: skip


def tokens_of(run: Run) -> int:
    """Tokens that run through the network's blocks; an rdm has one."""
    from erw.models.sit import grid_of

    model = run.model
    assert model.input_size
    return 1 if model.net == "rdm" else grid_of(model.input_size, model.patch) ** 2


def assumed(run: Run, *, teacher: str, image_size: int) -> Parts:
    """ImageNet in latents of Stable Diffusion's VAE, with a teacher that is known."""
    from erw.models.estimate import TEACHERS, sd_vae_flops
    from erw.training.flops import cost_by_part

    known, model = TEACHERS[teacher], run.model
    size, channels = model.input_size or image_size // 8, model.channels or 4
    model = dataclasses.replace(
        model, input_size=size, channels=channels,
        class_dim=known.dim if model.needs_token else None,
        num_classes=1000 if model.num_classes is None else model.num_classes,
    )  # fmt: skip
    run = run.replace(model=model)
    dims = {teacher: known.dim} if run.plan.reads_encoder else {}
    run = run.replace(data=dataclasses.replace(run.data, features=tuple(dims)))
    taught = bool(dims) or model.needs_token
    cost = cost_by_part(run, dims, teacher=known.flops if taught else 0)
    encode, decode = sd_vae_flops(image_size)
    said = (
        f"assumed, there is no cache {' '.join(run.data.cache)}: ImageNet at {image_size}, latents "
        f"{channels} x {size} x {size} of {'' if channels == 4 else 'a VAE that costs what '}"
        f"Stable Diffusion's{' VAE' if channels == 4 else ' does'}"
    )
    said += f", teacher {teacher}" * bool(cost.teacher)
    return Parts(run, tokens_of(run), channels, dims, cost, encode, decode, 1_281_167, said)


def by_part(parts: Parts) -> list[str]:
    """Lines on parameters and on FLOPs an image and a step."""
    run, step, model = parts.run, parts.cost, parts.run.model
    batch, warm = run.data.batch_size, run.plan.warmup_batch or run.data.batch_size
    count, heads = parameters(parts)
    depth = min(run.plan.depth, model.depth)
    lines = [
        f"{run.name}: {parts.said}",
        "",
        f"parameters    {count / 1e6:.1f} M" + f", projectors {heads / 1e6:.1f} M" * bool(heads),
        f"forward       {flops(forward(parts))} an image",
        f"full step     {flops(batch * (step.full + step.projector))}, {batch} images: network "
        f"{flops(step.full)} an image" + f", projectors {flops(step.projector)}" * bool(heads),
    ]
    if run.plan.warmup:
        lines += [
            f"warm-up step  {flops(warm * (step.warmup + step.projector))}, {warm} images: "
            f"{depth} of {model.depth} blocks, {flops(step.warmup)} an image"
        ]
    if step.teacher:
        lines.append(f"teacher       {flops(step.teacher)} an image, once each from a cache")
    lines += [
        f"VAE           {flops(parts.encode)} to encode, {flops(parts.decode)} to decode",
    ]
    if drawn := sampling(parts):
        each, images, total = drawn
        lines.append(
            f"sampling      {flops(each)} an image: {images}; {flops(50_000 * total)} for 50,000 "
            "with the VAE"
        )
    else:
        lines.append(f"sampling      not known: {run.sample.solver} chooses its own steps")
    return lines


def on(parts: Parts, found: Any) -> list[str]:
    """Lines on memory and time with the accelerators asked for, and by which model."""
    from erw.models.estimate import ACCELERATORS, rank_memory, seconds
    from erw.training.flops import Ledger

    run, model, gpu = parts.run, parts.run.model, ACCELERATORS[found.gpu]
    per_rank = -(-run.data.batch_size // (found.gpus * run.optim.accumulate))
    precision = "fp32" if run.optim.precision == "fp32" else "bf16"
    need = rank_memory(
        parameters=sum(parameters(parts)), images=per_rank, tokens=parts.tokens,
        width=model.width, blocks=model.depth, precision=precision,
    )  # fmt: skip
    fits = "fits" if need < 0.9 * gpu.memory else "does NOT fit: raise --optim.accumulate"
    teacher = parts.cost.teacher
    ledger = Ledger.from_dims(run, parts.dims, teacher=teacher, rows=parts.rows)
    spent = ledger.spent(run.steps)

    def hours(work: float) -> str:
        took = seconds(work, gpu, count=found.gpus, utilisation=found.utilisation)
        return f"{took / 3600:,.1f} h" if took >= 3600 else f"{took / 60:,.1f} min"

    prepare = parts.rows * (parts.encode + parts.cost.teacher)
    lines = [
        f"on {found.gpus} x {found.gpu} at {found.utilisation:g} of its bf16 peak (an estimate; "
        "`erw bench` measures):",
        f"  memory      {need / 2**30:.1f} of {gpu.memory / 2**30:.0f} GiB a GPU, {per_rank} "
        f"images each in {precision}: {fits}",
        f"  training    {hours(spent.total)}, {flops(spent.total)} in {run.steps:,} steps"
        + f" (warm-up {flops(spent.warmup)})" * bool(spent.warmup),
        f"  prepare     {hours(prepare)} for {parts.rows:,} images",
    ]
    if drawn := sampling(parts):
        lines.append(f"  50,000      {hours(50_000 * drawn[-1])} to sample")
    return lines


def sampling(parts: Parts) -> tuple[int, str, int] | None:
    """FLOPs of one image by the network, how, and with the VAE; None where the solver decides."""
    from erw.models.estimate import sampling_flops
    from erw.sampling.solvers import SOLVERS

    how = parts.run.sample
    solver, (low, high) = SOLVERS[how.solver], how.interval
    if solver.evaluations is None:
        return None
    evaluations, times = solver.evaluations(how.steps), solver.times(how.steps, shift=how.shift)
    inside = sum(low <= t <= high for t in times[:-1])
    share = inside / how.steps if how.guidance != 1 else 0.0
    each = sampling_flops(forward(parts), evaluations=evaluations, guided=share)
    guided = f", guided in {share:.0%}" if share else ", no guidance"
    return each, f"{evaluations} evaluations ({how.solver}{guided})", each + parts.decode


def forward(parts: Parts) -> int:
    """FLOPs of the network's forward on one image."""
    from erw.training.flops import forward_flops

    return forward_flops(parts.run)


def parameters(parts: Parts) -> tuple[int, int]:
    """Trainable parameters of the network, and of the projectors."""
    import torch

    from erw.training.network import build_network

    with torch.device("meta"):
        net = build_network(parts.run, parts.dims)
    heads = sum(p.numel() for p in net.projectors.parameters())
    return sum(p.numel() for p in net.model.parameters()), heads


def vae_flops(name: str, image_size: int) -> tuple[int, int]:
    """(encode, decode) FLOPs of a VAE on one image, as torch counts; 0 without a network."""
    import torch

    from erw.encoders.base import counted_flops
    from erw.encoders.vae import load_vae

    vae = load_vae(name)
    if vae.network is None:
        return 0, 0
    vae = vae.scaled([0.0] * vae.channels, [1.0] * vae.channels)  # it may be left to the data
    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    latent = torch.zeros(1, vae.channels, image_size // vae.factor, image_size // vae.factor)
    return counted_flops(lambda: vae.encode(image)), counted_flops(lambda: vae.decode(latent))


def described(run: Run) -> str:
    """A run in full: every setting as it is typed, then parameters, FLOPs, memory and time."""
    lines = [typed(setting) for setting in settings(run)]
    return "\n".join([*lines, "", *costs(run)])


class Known(NamedTuple):
    """What a run costs, as far as it can be known: `run` resolved, its features, cost by part."""

    run: Run
    dims: dict[str, int]
    cost: Cost
    total: int
    warmup: int
    teacher: int


def costs(run: Run) -> list[str]:
    """Lines on parameters, FLOPs, memory and time; one line saying why not, without a cache."""
    try:
        known = known_cost(run)
    except CacheError as error:
        if Path(run.data.cache[0]).expanduser().exists():  # it is there and does not fit
            raise
        return [f"cost: not known without the cache ({error})"]
    import torch

    from erw.training.network import build_network

    step = known.cost
    with torch.device("meta"):
        net = build_network(known.run, known.dims)
    count = sum(p.numel() for p in net.model.parameters())
    heads = sum(p.numel() for p in net.projectors.parameters())
    batch = run.data.batch_size
    full, early = step.full + step.projector, step.warmup + step.projector
    lines = [
        f"parameters   {count / 1e6:.1f} M" + f", projectors {heads / 1e6:.1f} M" * bool(heads),
        f"memory       {(count + heads) * BYTES_A_PARAMETER / 2**20:,.0f} MiB for weights, "
        "gradients, AdamW and EMA; activations come on top",
        f"full step    {flops(batch * full)}, {batch} images",
    ]
    if run.plan.warmup:
        warm = run.plan.warmup_batch or batch
        share = f"an image costs {early / full:.2f} of what it does in a full step"
        lines.append(f"warm-up step {flops(warm * early)}, {warm} images; {share}")
    lines += [
        f"run          {flops(known.total)} in {run.steps:,} steps, of which warm-up "
        f"{flops(known.warmup)}, teacher {flops(known.teacher)}",
        f"time         {known.total / 3.6e15:,.2f} h at 1 TFLOP/s; `erw bench` measures what "
        "this machine does",
    ]
    return lines


def known_cost(run: Run) -> Known:
    """Resolve `run` by its cache. Raises CacheError without one, ConfigError if they do not fit."""
    from erw.data.cache import Cache
    from erw.training.build import resolve
    from erw.training.flops import Ledger, cost_by_part

    cache = Cache.open(run.data.cache)
    resolved = resolve(run, cache)
    ledger, dims = Ledger.of(resolved, cache), {n: f.dim for n, f in cache.features.items()}
    cost, spent = cost_by_part(resolved, dims, teacher=ledger.teacher), ledger.spent(run.steps)
    return Known(resolved, dims, cost, spent.total, spent.warmup, spent.teacher)


def flops(count: float) -> str:
    """1.5e12 -> "1.50 TFLOP"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.2f} {unit}FLOP"
    return f"{count / 1e6:.2f} MFLOP"


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        metric: name of the score: fd_lite2 in studies, any that a run was scored with.
        target: the score to reach; none: each method's final score alone, by the others.
        over: the cost; epochs gives E@FID-k where the metric is fid.
    """

    metric: str = "fd_lite2"
    target: float | None = None
    over: Literal["flops", "epochs", "images", "steps", "seconds"] = "flops"


def to_target(args: Sequence[str]) -> None:
    """Print cost to a target and speed-ups with their spread; with --out write JSON and figure."""
    text = (
        "RUNS: a study's folder, or folders of runs that were scored while training\n"
        "(--eval.every), several of which are seeds of one method if they differ in nothing else."
    )
    usage = "--to-target RUNS... [--metric fd_lite2] [--target SCORE] [--out STEM]"
    parser = Parser("erw cost", text, usage=usage)
    parser.add_argument("--to-target", nargs="+", metavar="RUNS", required=True)
    parser.add_argument("--out", metavar="STEM", help="write STEM.json and the figure beside it")
    add_settings(parser, Target())
    found = parser.read(args)
    how = changed(Target(), found)
    from erw.study.compare import summary
    from erw.study.compare import to_target as compared
    from erw.study.results import read_runs

    metric = how.metric.replace("-", "_")
    runs = read_runs(found.to_target)
    record = compared(runs, metric, over=how.over, target=how.target)
    print("\n".join(summary(record)))
    if found.out:
        from erw.study.plots import save_figure, score_figure

        drawn = save_figure(
            lambda theme: score_figure(runs, metric, theme, over=how.over, target=how.target),
            found.out,
            data=record,
        )
        print("\n".join(map(str, drawn)))
