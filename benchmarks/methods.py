"""The quickstart recipes of docs/methods.md at equal total FLOPs, one seed, scored at the end.

    python benchmarks/methods.py --steps 600 --out benchmarks/results/methods-NAME.json

Each gets the FLOPs of so many steps of SiT, its teacher and optimiser included. A run that is there
is not made again, so the same command goes on after a stop; one thread (OMP_NUM_THREADS=1) gives
the same numbers on any machine of the kind.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from erw.config import Eval, Run
from erw.data.cache import Cache
from erw.data.prepare import prepare_builtin
from erw.evaluation.callback import scoring, together, validating
from erw.log import read_metrics
from erw.recipes import recipe
from erw.training import train
from erw.training.flops import Ledger
from erw.training.network import resolve
from record import begun

ENCODERS = "efficientnet-lite0", "efficientnet-lite2", "vae:openmoji-f4c4"
NAMES = (
    "sit", "repa", "irepa", "ig", "layersync", "sra", "vae_repa", "dispersive", "cfm", "multi",
    "tread", "sprint", "muon", "paper",
)  # fmt: skip


def prepared(name: str, cache: Cache, options: argparse.Namespace) -> Run:
    """A recipe on the cache, with the first encoder where its plan names none."""
    run = recipe(f"quickstart_{name}")
    named = any(term.encoder for term in run.plan.align)
    data = dataclasses.replace(
        run.data, cache=(str(cache.path),), features=() if named else ENCODERS[:1]
    )
    scored = Eval(samples=options.samples, keep_best=False, loss_images=128)
    return run.replace(data=data, eval=scored, steps=options.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of SiT")
    parser.add_argument("--images", type=int, default=4096, help="in the cache")
    parser.add_argument("--samples", type=int, default=500, help="of a score")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cache = prepare_builtin(options.runs / "cache", count=options.images, encoders=ENCODERS)
    base = resolve(prepared("sit", cache, options), cache)
    budget, rows = Ledger.of(base, cache).spent(options.steps).total, {}
    hidden = {str(options.runs): options.runs.name}
    head = begun("methods at equal FLOPs", hidden=hidden, out=options.out, threads=1)
    setting = (
        f"one seed, {budget:.3g} FLOPs ({options.steps} steps of SiT), {options.samples} samples"
    )
    for name in NAMES:
        run = prepared(name, cache, options)
        # A ledger sees schedules end within the run: give it more steps than the budget buys.
        ledger = Ledger.of(resolve(run.replace(steps=10 * options.steps), cache), cache)
        run, folder = run.replace(steps=ledger.steps_for(budget)), options.runs / name
        called = [((run.steps,), make(run, folder)) for make in (scoring, validating)]
        train(run, folder, **together(called))
        lines = {line["kind"]: line for line in read_metrics(folder / "metrics.jsonl")}
        rows[f"quickstart_{name}"] = {
            "steps": run.steps,
            "flops": lines["train"]["flops_total"],
            "seconds": lines["train"]["seconds"],
            "fd_lite2": lines["eval"]["values"]["fd_lite2"],
            "held_out_flow": lines["validation"]["flow"],
        }
        print(name, rows[f"quickstart_{name}"], flush=True)
        if options.out:
            text = json.dumps(head | {"setting": setting, "rows": rows}, indent=1)
            options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
