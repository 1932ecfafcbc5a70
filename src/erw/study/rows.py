"""The runs behind a table: which there are, which begins with what, and one of them trained.

A run is a folder `OUT/runs/LABEL-SEED` as `erw.train` leaves it. Where several begin with the same
warm-up, that is a run of its own in `OUT/warmups`, trained once; with its checkpoint they begin, to
the bit where each would be that had trained it alone.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from erw.config import Run, from_dict, to_dict
from erw.data.cache import Cache
from erw.dist import world
from erw.errors import CheckpointError, nearest
from erw.evaluation.callback import Say, probing, scoring, together, validating
from erw.interop import starting_point
from erw.io import write_bytes, write_json
from erw.log import read_metrics, say
from erw.sampling.preview import previewing
from erw.study.results import METRICS, read_study
from erw.study.studies import Study, folder_of
from erw.training import checkpoint
from erw.training.flops import Ledger
from erw.training.loop import train
from erw.training.network import resolve
from erw.training.run_dir import claim
from erw.training.trained import RECIPE, load


class Task(NamedTuple):
    """One run of a study."""

    run: Run
    folder: str  # within the study's
    warmup: str = ""  # the task whose checkpoint, at the end of its warm-up, it begins with
    start: str = ""  # the task whose model it begins with
    watched: tuple[int, ...] = ()  # steps after which it is scored and its states are probed
    kinds: tuple[str, ...] = ("train",)  # of the lines of its last step


def tasks(study: Study) -> dict[str, Task]:
    """Every run of a settled study by its name, each once, after those that it begins with."""
    first: dict[tuple[Run, str], str] = {}  # the label whose folder a run has
    for row in study.rows:
        if row.run:
            first.setdefault((row.run, row.start), row.label)
    labels = {row.label: first[row.run, row.start] for row in study.rows if row.run}
    by_name: dict[str, Task] = {}
    for seed in study.seeds:
        for (run, start), label in first.items():
            name, warm = folder_of(label, seed), run.plan.warmup
            full, ends = run.steps - warm, range(1, study.points + 1)
            rows = [row for row in study.rows if row.run == run]
            points = {*rows[0].points} or {warm + full * i // study.points for i in ends}
            points |= {row.at for row in rows if row.at}
            kinds = {"train": 1, "eval": run.eval.every, "validation": run.eval.loss}
            by_name[name] = Task(
                run.replace(name=label, seed=seed),
                f"runs/{name}",
                start=folder_of(labels[start], seed) if start else "",
                watched=tuple(sorted(step for step in points if warm < step <= run.steps)),
                kinds=tuple(kind for kind, on in (kinds | {"probe": study.probed}).items() if on),
            )
    return dict(_with_warmups(by_name))


def _with_warmups(by_name: dict[str, Task]) -> Iterator[tuple[str, Task]]:
    """The tasks, each after tasks for the warm-ups that it shares with others."""
    groups: dict[str, list[int]] = {}
    for task in by_name.values():
        if task.run.plan.warmup and not task.start:
            groups.setdefault(warmup_of(task.run), []).append(task.run.plan.warmup)
    for name, task in by_name.items():
        run, key, before = task.run, warmup_of(task.run), ""
        own, ends = run.plan.warmup, groups.get(key, [])
        for warm in sorted({end for end in ends if end <= own and not task.start}):
            # The longest is shared only where two runs end with it; a shorter one is on the way of
            # a longer one only where a line of the log, which is a mean, ends with it.
            alone = warm == max(ends) and ends.count(warm) == 1
            if alone or (warm < own and warm % run.log.every):
                continue
            shared = f"warmup-{blake3(key.encode()).hexdigest()[:8]}-{warm}"
            plan = replace(run.plan, warmup=warm)
            short = run.replace(steps=warm, plan=plan)
            yield shared, Task(short, f"warmups/{shared}", warmup=before)
            before = shared
        yield name, task._replace(warmup=before)


def warmup_of(run: Run) -> str:
    """All that decides the steps of a run's warm-up but for their number, as text."""
    record, plan = to_dict(run), run.plan
    for name in ("name", "steps", "sample", "eval"):
        del record[name]
    for name in ("warmup", "projector", "optimizer"):
        del record["plan"][name]
    for term in record["plan"]["align"]:
        del term["block"], term["weight"]  # of full training
    return json.dumps([record, [term.name for term in plan.active]], sort_keys=True)


def finished(task: Task, out: Path) -> bool:
    """Whether a run has been trained to its end, and scored as its study says."""
    path = out / task.folder / METRICS
    lines = read_metrics(path) if path.exists() else []
    return {line["kind"] for line in lines if line["step"] == task.run.steps} >= {*task.kinds}


def train_task(out: Path, name: str) -> None:
    """Train one run of the study in the folder `out`, whose `study.json` says all of it.

    Raises CheckpointError: no such study or run; otherwise as `train`.
    """
    if "rows" not in (record := read_study(out).get("study", {})):
        raise CheckpointError(f"{out} holds no study of this version; begin one with erw study")
    study = from_dict(Study, record)
    every = tasks(study)
    if name not in every:
        raise CheckpointError(f"{out} has no run {name!r}{nearest(name, every)}")
    task, init = every[name], None
    run, folder = task.run, out / task.folder
    with world() as joined:
        cache = Cache.open(run.data.cache)
        if task.warmup:
            joined.broadcast(lambda: begin_behind(run, folder, out / every[task.warmup].folder))
        if task.start:
            resolved = resolve(run, cache)
            count = resolved.model.num_classes or 0
            names = cache.class_names if count else ()
            init = starting_point(load(out / every[task.start].folder), resolved, names, count)
        train(run, folder, init=init, **watching(study, task, folder))


def watching(study: Study, task: Task, folder: Path, say: Say = say) -> dict[str, Any]:
    """`at=` and `evaluate=` of `erw.train` for what the study shows."""
    run, steps = task.run, task.watched
    make: dict[str, Any] = {"eval": scoring, "validation": validating}
    pairs: list[Any] = [(steps, make[k](run, folder, say=say)) for k in make if k in task.kinds]
    if "probe" in task.kinds:
        pairs.append((steps, probing(run, folder, count=study.probed)))
    if "eval" in task.kinds:
        pairs.append((steps, previewing(run, folder)))
    return together(pairs)


def begin_behind(run: Run, folder: Path, warm: Path) -> None:
    """Make the folder of a run as it is at the end of its warm-up, or on the way there, by the
    newest checkpoint of the run `warm`; nothing where it is begun already."""
    if (folder / RECIPE).exists():
        return
    cache = Cache.open(run.data.cache)
    resolved, part = resolve(run, cache), folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    recipe = claim(part, run, resolved, cache, Ledger.of(resolved, cache), init=None)
    write_json(part / RECIPE, recipe)
    newest = checkpoint.paths(warm / "checkpoints")[-1]
    for path in (newest, warm / METRICS):
        to = part / path.relative_to(warm)
        if path.is_dir():  # of a sharded run
            shutil.copytree(path, to)
        else:
            write_bytes(to, path.read_bytes())
    part.rename(folder)
