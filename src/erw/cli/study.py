"""`erw study`: methods trained and compared, the tables and figures of the paper among them."""

import runpy
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from erw.cli.settings import as_options, call, first, required
from erw.config import Run, flat, to_dict
from erw.errors import ConfigError, ErwError, nearest, one_line
from erw.recipes import names, recipe
from erw.recipes.quickstart import CACHE
from erw.study import studies

Words = tuple[str, ...]


def main(args: Sequence[str]) -> None:
    first("study", args, f"a name, one of {', '.join(studies.STUDIES)}, grid, or a Python file,")
    call("study", study, args)


def study(
    name: Annotated[Positional[str], arg(metavar="NAME")],
    *,
    out: str,
    scale: Literal["small", "full"] = "small",
    seeds: tuple[int, ...] = (),
    steps: int | None = None,
    points: int | None = None,
    minutes: float | None = None,
    small: bool = False,
    changes: Annotated[Words, arg(name="set")] = (),
    of: Annotated[str, arg(name="recipe")] = "quickstart",
    axes: Annotated[Words, arg(name="grid")] = (),
    cache: str | None = None,
    engine: str = "local",
    jobs: int | None = None,
    engine_options: Words = (),
    only: str | None = None,
    dry_run: bool = False,
    gpu: str = "h100",
    gpus: int = 8,
) -> None:
    """Train and compare runs; the same command resumes.

    Args:
        name: which study; `erw study` lists them. `grid`: a recipe over values of its settings. Or
            a Python file with a function `study` that returns an `erw.study.studies.Study`.
        out: folder of the study.
        scale: full: as in the paper, on ImageNet; small: the same in small, on built-in images.
        seeds: each run is trained with; none: the study's own.
        steps: of full training in the small setting; none: the study's own.
        points: scores of each run; none: the study's own.
        minutes: of a study whose runs cost the same: as many steps as end within them here, images
            and scores included; none: the study's own (10 for the demo), or --steps.
        small: tiny twins of a few seconds, for a check of the machinery alone.
        changes: settings of all runs, as NAME=VALUE.
        of: what a grid is of.
        axes: its settings and their values, as plan.depth=3,4,5.
        cache: of the built-in images; none: made in the study's folder.
        engine: local, torchrun or slurm (submitit).
        jobs: runs at a time; none: one for each core or GPU.
        engine_options: NAME=VALUE: processes of torchrun, parameters of submitit.
        only: train this one run of a study that has begun (LABEL-SEED, as its folder is called).
        dry_run: print each run's command and cost, and do nothing.
        gpu: that hours are for.
        gpus: how many.
    """
    if only:
        from erw.study.rows import train_task

        return train_task(Path(out), only)
    plan = _plan(name, scale, steps, small, of, dict(map(studies.values_of, axes)))
    settings = {key: values[0] for key, values in map(studies.values_of, changes)}
    plan = plan.changed(lambda run: studies.with_settings(run, settings))
    if minutes is None:
        minutes = plan.minutes if steps is None and engine == "local" else 0.0
    plan = replace(plan, seeds=seeds or plan.seeds, points=points or plan.points, minutes=minutes)
    if minutes and not (plan.equal and engine == "local" and not plan.halvings):
        raise ConfigError("--minutes is for studies whose runs cost the same, on this machine")
    if dry_run:
        return _show(plan, Path(out), cache or f"{out}/cache", gpu, gpus)
    from erw.study.run import run_study

    options = {key: values[0] for key, values in map(studies.values_of, engine_options)}
    print(run_study(plan, out, engine=engine, jobs=jobs, cache=cache, options=options))


def _plan(
    name: str, scale: str, steps: int | None, small: bool, of: str, axes: dict[str, Any]
) -> studies.Study:
    if name.endswith(".py"):
        required(name)
        try:
            function = runpy.run_path(name).get("study")
            plan = function() if callable(function) else None
        except ErwError:
            raise
        except Exception as error:  # whatever somebody's own code raises
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == name]
            line = lines[-1] if lines else getattr(error, "lineno", "?")
            problem = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"{name}, line {line}: {problem}") from error
        if not isinstance(plan, studies.Study):
            raise ConfigError(f"{name} needs a function study() that returns a Study")
        return plan
    if name != "grid":
        return studies.study_plan(name, scale=scale, steps=steps, small=small)
    if not axes:
        raise ConfigError("a grid needs --grid NAME=VALUE,VALUE..., such as plan.depth=3,4,5")
    run = recipe(of)
    if not run.eval.every:  # a table needs scores
        every = max(1, run.steps // 4)
        run = run.replace(eval=replace(run.eval, every=every, loss=every, keep_best=False))
    return studies.Study("grid", f"{of} over {', '.join(axes)}", rows=studies.grid(run, axes))


def _show(plan: studies.Study, out: Path, cache: str, gpu: str, gpus: int) -> None:
    """Print every run's command, and FLOPs, hours and disk where its cache is there or assumed."""
    from erw.cli.cost import ACCELERATORS, UTILISATION, account
    from erw.study.compare import amount

    if gpu not in ACCELERATORS or gpus < 1:
        raise ConfigError(
            f"--gpu {gpu} --gpus {gpus}: expected 1 or more{nearest(gpu, ACCELERATORS)}"
        )
    speed = ACCELERATORS[gpu][0] * UTILISATION * gpus * 3600

    def text(flops: float, size: float) -> str:
        time = f"{flops / speed:,.2f} h on {gpus} x {gpu}"
        return f"{amount(flops)}, {time}, {size / 2**30:,.1f} GiB of checkpoints"

    built_in = [row.run for row in plan.rows if row.run and row.run.data.cache == (CACHE,)]
    counted = not built_in or Path(cache).exists()
    place = {"data.cache": [cache]}
    plan = plan.changed(lambda run: studies.with_settings(run, place if run in built_in else {}))
    plan = studies.settled(plan, lambda run: account(run)[2]) if counted else plan
    print(plan.title, *filter(None, [plan.claim]), "", sep="\n")
    costs: dict[Run, tuple[float, float]] = {}
    for row in plan.rows:
        if (run := row.run) is None or run in costs:
            continue
        before = flat(to_dict(recipe(run.name))) if run.name in names() else {}
        new = {k: v for k, v in flat(to_dict(run)).items() if before.get(k) != v}
        folder = out / "runs" / studies.folder_of(row.label, plan.seeds[0])
        print(f"{row.label}: erw train {run.name} {' '.join(as_options(new))} --out {folder}")
        costs[run] = (0.0, 0.0)
        if counted:
            _, net, ledger, *_ = account(run)
            state = 16 * sum(p.numel() for p in net.parameters()) * (run.log.keep + 0.25)
            costs[run] = float(ledger.spent(run.steps).total), state
            print(f"  {run.steps:,} steps, {text(*costs[run])}")
    flops, size = (len(plan.seeds) * sum(some) for some in zip(*costs.values(), strict=True))
    total = text(flops, size) if counted else f"known once {cache} is there"
    print(f"\ncost of seeds {plan.seeds}, scoring not counted and no warm-up shared: {total}")
