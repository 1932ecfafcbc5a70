"""The quickstart recipes of docs/methods.md at equal total FLOPs, scored at the end.

    python benchmarks/methods.py --out benchmarks/results/methods-NAME.json

Each gets the FLOPs of so many steps of SiT, its encoder and optimiser included; what the recipe
counts in steps (warm-up, ends of alignment and routing) keeps its share of the run. A teacher that
is a run is the one of the same seed here, whose own FLOPs are not counted. A run that is there is
not made again, so the same command goes on after a stop; one thread (OMP_NUM_THREADS=1) gives the
same numbers on any machine of the kind.
"""

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch

from erw.config import Eval, Run
from erw.data.cache import Cache
from erw.data.prepare import complete_builtin, prepare_builtin
from erw.dist import precision
from erw.evaluation.callback import scoring, together, validating
from erw.log import read_metrics
from erw.recipes import recipe
from erw.training import train
from erw.training.flops import Ledger
from erw.training.network import resolve
from record import begun, write

ENCODERS = "efficientnet-lite0", "efficientnet-lite2", "vae:openmoji-f4c4"
SUFFIXES = (
    "sit", "repa", "irepa", "ig", "layersync", "sra", "vae_repa", "dispersive", "cfm", "multi",
    "tread", "sprint", "muon", "paper", "haste", "self",
)  # fmt: skip
NAMES = (*map("quickstart_{}".format, SUFFIXES), "quickstart")
TEACHER = re.compile(r"run:runs/(\w+)#")  # of a target: the recipe whose run it is


def lasting(run: Run, steps: int) -> Run:
    """The run with another number of steps, and its plan stretched to them."""
    plan, share = run.plan, steps / run.steps
    align = tuple(
        dataclasses.replace(
            term, weight=dataclasses.replace(term.weight, over=math.ceil(term.weight.over * share))
        )
        for term in plan.align
    )
    until = plan.routing.until and math.ceil(plan.routing.until * share)
    routing = dataclasses.replace(plan.routing, until=until)
    warmup = math.ceil(plan.warmup * share)
    plan = dataclasses.replace(plan, warmup=warmup, align=align, routing=routing)
    return run.replace(steps=steps, plan=plan)


def affordable(run: Run, cache: Cache, budget: float) -> Run:
    """The run with as many steps as the budget buys, to a step or two."""
    for _ in range(3):  # cost is all but proportional to steps
        cost = Ledger.of(resolve(run, cache), cache).spent(run.steps).total
        run = lasting(run, max(1, int(run.steps * budget / cost)))
    return run


def teachers(name: str) -> list[str]:
    """The recipes whose runs teach one."""
    return sorted({x for term in recipe(name).plan.align for x in TEACHER.findall(term.target)})


def placed(name: str, folder: Path, seed: int, options: argparse.Namespace) -> Run:
    """A recipe on the cache in `folder`, with the first encoder where its plan names none; or on
    one of its own, with the runs of that seed there as teachers."""
    run, here = recipe(name).replace(seed=seed), rf"run:{folder}/\1-{seed}#"
    align = tuple(
        dataclasses.replace(term, target=TEACHER.sub(here, term.target)) for term in run.plan.align
    )
    features = () if any(term.encoder for term in align) else ENCODERS[:1]
    cache = folder / (f"{name}-{seed}-cache" if teachers(name) else "cache")
    data = dataclasses.replace(
        run.data, cache=(str(cache),), features=features, batch_size=options.batch_size
    )
    plan = dataclasses.replace(run.plan, align=align)
    scored = Eval(samples=options.samples, keep_best=False, loss_images=128)
    return run.replace(plan=plan, data=data, eval=scored)


def made(run: Run, out: Path) -> dict[str, Any]:
    """Train and score the run, or what is missing of it; its numbers."""
    called = [((run.steps,), make(run, out)) for make in (scoring, validating)]
    train(run, out, **together(called))
    lines = {line["kind"]: line for line in read_metrics(out / "metrics.jsonl")}
    return {
        "seed": run.seed,
        "seconds": lines["train"]["seconds"],
        "fd_lite2": lines["eval"]["values"]["fd_lite2"],
        "held_out_flow": lines["validation"]["flow"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="of SiT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--images", type=int, default=4096, help="in the cache")
    parser.add_argument("--image-size", type=int, default=64, help="a token is 8 x 8 pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=500, help="of a score")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.runs
    encoders = ENCODERS if options.image_size == 64 else ENCODERS[:1]
    made_of = {"image_size": options.image_size, "count": options.images, "encoders": encoders}
    cache = prepare_builtin(folder / "cache", **made_of)
    base = lasting(placed("quickstart_sit", folder, 0, options), options.steps)
    budget = Ledger.of(resolve(base, cache), cache).spent(options.steps).total
    hidden = {str(folder): folder.name}
    found = begun("methods at equal FLOPs", hidden=hidden, out=options.out, threads=1)
    dtype, _ = precision(base.optim.precision, torch.device("cpu"))
    found |= {"image_size": options.image_size, "batch_size": options.batch_size}
    found |= {"steps": options.steps, "flops": budget, "samples": options.samples}
    found |= {"precision": str(dtype).removeprefix("torch."), "rows": {}}
    for seed in options.seeds:
        for name in options.names:
            run = placed(name, folder, seed, options)
            if taught := teachers(name):
                named = [term.encoder for term in run.plan.align if term.encoder]
                complete_builtin(Path(run.data.cache[0]), count=options.images, encoders=named)
            cache = Cache.open(run.data.cache)
            run = affordable(run, cache, budget)
            spent = Ledger.of(resolve(run, cache), cache).spent(run.steps).total
            row = {"steps": run.steps, "flops": spent, "teachers": taught, "runs": []}
            row = found["rows"].setdefault(name, row)
            row["runs"].append(made(run, folder / f"{name}-{seed}"))
            print(name, row, flush=True)
            write(found, options.out)


if __name__ == "__main__":
    main()
