"""The quickstart study: SiT, REPA and ERW at equal total FLOPs, from images to the report.

    run_study(DEMO, "runs/demo")          # the same call, made again, goes on where it stopped

Everything finished is a file in the folder and is not done again: `cache/`, `held_out-*`,
`floors.json`, `runs/METHOD-SEED/`, `points/*.json`, `grids/*.png`, `results.json`, `report.html`.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from erw.config import to_dict
from erw.data.cache import Cache
from erw.data.prepare import prepare
from erw.data.sources.openmoji import ATTRIBUTION, OpenMojiSet
from erw.encoders import load_vae
from erw.encoders.vae import VAE
from erw.errors import CheckpointError, FolderInUseError
from erw.io import write_bytes
from erw.sampling.preview import picture, write_picture
from erw.study import budget, measure, point, sizing
from erw.study.machine import hardware, versions
from erw.study.presets import StudyPlan
from erw.study.progress import Counted, Display, StepReporter, Work, display
from erw.study.report import report
from erw.study.results import (
    Results,
    Row,
    curve_from,
    read_json,
    read_metrics,
    row_from,
    write_json,
    write_results,
)
from erw.training.loop import train
from erw.training.run_dir import locked
from erw.training.trained import Trained

GRIDS = {"reference": "grids/reference.png", "reconstruction": "grids/reconstruction.png"}


class Study(NamedTuple):
    """A study under way: its plan with the steps filled in, folder, parts and display."""

    plan: StudyPlan
    out: Path
    cache: Cache
    vae: VAE
    scorer: measure.Scorer
    shown: Display


def run_study(plan: StudyPlan, out: str | Path) -> Path:
    """Run a study in the folder `out`, or go on with it; returns the path of its report.

    Several processes may be at one folder: the first prepares, and each then takes the next run
    that nobody is at. Each ends when all runs have, whoever made them.

    Raises CheckpointError if the folder holds another study.
    """
    out = Path(out)
    guess = sizing.guess(plan)
    with display(Work(guess.totals, expected=guess.seconds)) as shown:
        study = opened(plan, out, shown)
        plan, shares = study.plan, study_shares(study)
        runs = [(method, seed) for seed in plan.seeds for method, _ in plan.methods]
        left = [(m, seed) for m, seed in runs if not _finished(study, f"{m}-{seed}", shares[m])]
        elsewhere = []
        for method, seed in left:
            _plan_work(study, shares)
            try:
                train_and_score(study, method, seed, shares[method])
            except FolderInUseError:
                shown.say(f"{method}-{seed}  left to the process that is at it")
                elsewhere.append((method, seed))
                continue
            write_down(study, shares)
        for method, seed in elsewhere:
            see_through(study, method, seed, shares[method])
            write_down(study, shares)
        if not left:
            write_down(study, shares)
        shown.say(f"results in {out / 'results.json'}, report in {out / 'report.html'}")
    return out / "report.html"


def opened(plan: StudyPlan, out: Path, shown: Display) -> Study:
    """The study with all that its runs share, made by one process while others wait for it."""
    with locked(out, waiting=lambda: shown.say(f"waiting for the process that prepares {out}")):
        vae = load_vae(plan.vae, device=device())  # first: what is not there begins no study
        sizing.claim(plan, out)
        shown.say(f"{plan.title}: everything goes to {out}; the same command goes on after a stop")
        cache = prepared(plan, out, shown)
        scorer = held_out(plan, out, vae, shown)
        plan = sizing.sized(plan, out, cache, scorer=scorer, vae=vae, shown=shown)
    return Study(plan, out, cache, vae, scorer, shown)


def prepared(plan: StudyPlan, out: Path, shown: Display) -> Cache:
    """The training images' latents and teacher features."""
    shown.show("loading networks, drawing the glyphs")
    source = OpenMojiSet("train", size=plan.image_size, count=plan.train_images)
    counted = Counted(source, shown)
    cache = prepare(
        counted,
        out / "cache",
        vae=plan.vae,
        encoders=(plan.encoder,),
        image_size=plan.image_size,
        rows_per_shard=512,
        device=device(),
        progress=False,
    )
    shown.work.skip("prepare", plan.train_images - counted.read)
    return cache


def device() -> str:
    """Where everything runs: the accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def held_out(plan: StudyPlan, out: Path, vae: VAE, shown: Display) -> measure.Scorer:
    """The scorer against held-out images; floors and their pictures are made on the way."""
    reference = OpenMojiSet("test", size=plan.image_size, count=plan.reference_images)
    tick = _ticker(shown, "real", "scoring held-out images")
    scorer = measure.scorer(reference, out, device=device(), tick=tick)
    if (out / "floors.json").is_file():
        shown.work.skip("real", 2 * plan.samples)
        return scorer
    other = OpenMojiSet("test", size=plan.image_size, count=plan.samples, seed=1)
    others = measure.first_images(other, plan.samples)
    training = OpenMojiSet("train", size=plan.image_size, count=plan.samples)
    tick = _ticker(shown, "real", "scoring real images, for the floors")
    found = measure.floors(scorer, others, training, vae=vae, tick=tick)
    first = others[: measure.GRID]
    labels = [other[i][1] for i in range(len(first))]
    named = functools.partial(picture, labels=labels, names=other.class_names, paper=False)
    write_bytes(out / GRIDS["reference"], named(first))
    through = measure.reconstructed(first, vae)
    write_bytes(out / GRIDS["reconstruction"], named(through))
    write_json(found._asdict(), out / "floors.json")
    return scorer


def study_shares(study: Study) -> dict[str, budget.Share]:
    """Each method's steps and points at the study's budget."""
    plan = study.plan
    assert plan.steps is not None, "the study was sized before"
    runs = {m: plan.run(m, seed=0, cache=str(study.out / "cache")) for m, _ in plan.methods}
    flops = budget.budget_of(plan.steps, next(iter(runs.values())), study.cache)
    return {
        method: budget.share(run, study.cache, budget=flops, fractions=plan.fractions)
        for method, run in runs.items()
    }


def train_and_score(study: Study, method: str, seed: int, share: budget.Share) -> None:
    """One run from its first step to its last, scored at its points; what is done is skipped."""
    name = f"{method}-{seed}"
    shown, folder = study.shown, study.out / "runs" / name
    if _finished(study, name, share):
        return
    run = share.run.replace(seed=seed)
    reporter = StepReporter(
        shown,
        name=name,
        flops_at=lambda step: share.ledger.spent(step).total,
        done=max(_scored(study, name, share), default=0),
    )

    def score(step: int, model: Trained) -> None:
        if step not in share.points or _point(study, name, step).is_file():
            return
        began = time.monotonic()
        tick = _ticker(shown, "samples", f"{name}  scoring at step {step}")
        made = point.scored(study.plan, model, study.scorer, vae=study.vae, tick=tick)
        picture = f"grids/{name}-{step:08d}.png"
        write_picture(made.first, made.made, study.out / picture, paper=False)
        row = point.row(
            method, seed, step, share=share, folder=folder, fd=made.fd,
            fraction=study.plan.fractions[share.points.index(step)],
        )  # fmt: skip
        row = row._replace(picture=picture, eval_seconds=time.monotonic() - began)
        write_json(row._asdict(), _point(study, name, step))
        reporter.rest(time.monotonic() - began)
        shown.say(
            f"{name}  step {step}, {row.fraction:.0%} of the budget: FD-Lite2 {row.fd_lite2:.1f}"
            f"  ({row.seconds:.0f} s trained)"
        )

    train(run, folder, at=share.points, evaluate=score, reporter=reporter)
    if missing := sorted(set(share.points) - set(_scored(study, name, share))):
        raise CheckpointError(
            f"{_point(study, name, missing[0])} is gone and so is its checkpoint; delete {folder} "
            "to train that run anew"
        )


def see_through(study: Study, method: str, seed: int, share: budget.Share) -> None:
    """Wait for a run that another process is at; go on with it if that process ends before it."""
    folder = study.out / "runs" / f"{method}-{seed}"
    said = f"waiting for the process that is at {folder.name}"
    while True:
        with locked(folder, waiting=lambda: study.shown.say(said)):
            pass
        try:
            return train_and_score(study, method, seed, share)
        except FolderInUseError:  # somebody else was faster
            continue


def write_down(study: Study, shares: dict[str, budget.Share]) -> None:
    """Write results and report of all that is finished so far, whoever made it."""
    with locked(study.out, waiting=lambda: study.shown.show("waiting to write the results")):
        write_results(collect(study, shares), study.out / "results.json")
        report([study.out], out=study.out / "report.html")


def collect(study: Study, shares: dict[str, budget.Share]) -> Results:
    """Everything that is finished so far."""
    plan, out = study.plan, study.out
    rows: list[Row] = []
    curves = {}
    for method, _ in plan.methods:
        for seed in plan.seeds:
            name = f"{method}-{seed}"
            found = [_point(study, name, step) for step in shares[method].points]
            rows += [row_from(read_json(p), where=str(p)) for p in found if p.is_file()]
            if _finished(study, name, shares[method]):
                curves[f"{method}/{seed}"] = curve_from(read_metrics(out / "runs" / name))
    flops = budget.budget_of(plan.steps or 0, next(iter(shares.values())).run, study.cache)
    settings = asdict(plan) | {"budget_flops": flops}
    return Results(
        rows=tuple(rows),
        settings={"study": settings, "methods": {m: to_dict(s.run) for m, s in shares.items()}},
        versions=versions(),
        hardware=hardware(),
        ledger={m: budget.entry(s, budget=flops) for m, s in shares.items()},
        floors=read_json(out / "floors.json"),
        curves=curves,
        pictures=GRIDS,
        attribution=f"Images: {ATTRIBUTION}. Composed and rasterised for this study.",
        title=plan.title,
    )


def _scored(study: Study, name: str, share: budget.Share) -> list[int]:
    """The steps of a run whose scores are there."""
    return [step for step in share.points if _point(study, name, step).is_file()]


def _finished(study: Study, name: str, share: budget.Share) -> bool:
    """Whether a run is scored at all of its points."""
    return len(_scored(study, name, share)) == len(share.points)


def _point(study: Study, name: str, step: int) -> Path:
    return study.out / "points" / f"{name}-{step:08d}.json"


def _plan_work(study: Study, shares: dict[str, budget.Share]) -> None:
    """Put the exact amount of work into the display, and what of it is done by now."""
    train, samples = study.shown.work.kinds["train"], study.shown.work.kinds["samples"]
    runs = [(f"{m}-{seed}", s) for m, s in shares.items() for seed in study.plan.seeds]
    scored = [_scored(study, name, s) for name, s in runs]
    samples.total = sizing.TICKS * study.plan.samples * sum(len(s.points) for _, s in runs)
    samples.done = sizing.TICKS * study.plan.samples * sum(len(steps) for steps in scored)
    train.total = sum(s.ledger.spent(s.points[-1]).total for _, s in runs)
    train.done = sum(
        s.ledger.spent(max(steps, default=0)).total
        for (_, s), steps in zip(runs, scored, strict=True)
    )


def _ticker(shown: Display, kind: str, what: str) -> measure.Tick:
    """A callback that counts images of a kind with the time since the one before."""
    last = time.monotonic()

    def tick(images: int) -> None:
        nonlocal last
        now = time.monotonic()
        shown.work.add(kind, images, seconds=now - last)
        last = now
        shown.show(what)

    return tick
