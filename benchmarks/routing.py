"""What token routing saves: a training step of SiT, dense, with TREAD and with SPRINT.

    python benchmarks/routing.py --out benchmarks/results/routing-MACHINE-DATE.json

A step is erw's own: loader, draws, forward, backward, clip, AdamW, EMA, without alignment. Widths
are those of the quickstart and of SiT-S, 12 blocks each; 64, 256 and 1,024 tokens. TREAD leads half
of the patches past blocks 3 to 9, SPRINT three quarters past blocks 3 to 10. All three live in one
process and take turns, so that whatever else the machine does falls on all alike; a ratio is taken
within a round. One step of each is not counted. FLOPs are counted as for `erw cost`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import erw
from erw.config import Data, Model, Optim, Run
from erw.dist import World
from erw.plan import SIT, Plan, Routing
from erw.training.benchmark import MadeUp
from erw.training.flops import step_flops
from erw.training.loop import Trainer
from erw.training.network import resolve
from erw.training.objective import build_objective
from record import begun, summary, write
from turns import table

WIDTHS = {"quickstart": (128, 2), "SiT-S": (384, 6)}  # channels, heads
TREAD = Plan(align=(), routing=Routing("tread", (3, 9)))
SPRINT = Plan(align=(), routing=Routing("sprint", (3, 10), 0.25, "grid", path_drop=0.1))
PLANS = {"dense": SIT, "tread": TREAD, "sprint": SPRINT}


class Contender:
    """A training run of one kind that makes its first step over and over."""

    def __init__(self, cache: Any, kind: str, width: str, precision: str, device: str) -> None:
        channels, heads = WIDTHS[width]
        plan = PLANS[kind]
        fusion = plan.routing.blocks if plan.routing.kind == "sprint" else ()
        run = resolve(
            Run(
                model=Model(depth=12, width=channels, heads=heads, fusion=fusion),
                data=Data(batch_size=len(cache)),
                plan=plan,
                optim=Optim(precision=precision),  # type: ignore[arg-type]
            ),
            cache,
        )
        world = World(0, 1, torch.device(device))
        self.trainer = Trainer(run, cache, world, Path("none"), {}, build_objective(run))
        self.phase = run.phase(0)
        self.trainer.enter(self.phase)
        self.flops = step_flops(run, {}, self.phase)

    def step(self) -> tuple[float, float]:
        """Seconds of a step by the clock and by the CPU's."""
        wait = torch.cuda.synchronize if self.trainer.device.type == "cuda" else lambda: None
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        self.trainer.step(0, self.phase, self.trainer.read(0))
        wait()
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(args: argparse.Namespace, width: str, tokens: int) -> list[dict[str, Any]]:
    """A row for each kind."""
    model = Model(input_size=2 * round(tokens**0.5), channels=4, num_classes=1000)
    batch = Data(batch_size=max(1, args.tokens // tokens))
    cache = MadeUp(Run(model=model, data=batch), {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {kind: Contender(cache, kind, width, args.precision, device) for kind in PLANS}
    for contender in kinds.values():
        contender.step()
    rounds = [{kind: one.step() for kind, one in kinds.items()} for _ in range(args.rounds)]
    rows = []
    for kind, contender in kinds.items():
        row: dict[str, Any] = {"width": width, "tokens": tokens, "batch": len(cache), "kind": kind}
        row["GFLOPs an image"] = round(contender.flops / 1e9, 3)
        row["FLOPs of dense"] = round(contender.flops / kinds["dense"].flops, 4)
        for clock, name in enumerate(("wall", "cpu")):
            row[f"seconds, {name}"] = summary([one[kind][clock] for one in rounds])
            ratios = [one[kind][clock] / one["dense"][clock] for one in rounds]
            row[f"time of dense, {name}"] = summary(ratios)
        rows.append(row)
        print(f"{width} {tokens} {kind}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", nargs="+", choices=[*WIDTHS], default=[*WIDTHS])
    parser.add_argument("--grids", nargs="+", type=int, default=[64, 256, 1024], help="tokens")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch, at least one image's")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()

    what = "seconds of a training step, dense, TREAD and SPRINT, median over rounds (min to max)"
    record = begun(what, out=args.out, threads=torch.get_num_threads())
    record["model"] = f"SiT of 12 blocks, patch 2, {args.precision}, erw {erw.__version__}"
    record["rows"] = [
        row for width in args.width for tokens in args.grids for row in measure(args, width, tokens)
    ]
    for key in ("what", "command", "model", "machine", "versions"):
        print(f"{key}: {record.get(key, '')}")
    print(f"\n{table(record['rows'])}")
    write(record, args.out)


if __name__ == "__main__":
    main()
