"""How long a training step takes: erw's, beside REPA's released one on the same machine and batch.

    python benchmarks/step.py --peer repa=PATH_TO_CLONE         # SiT-B/2, batch 8, float32 and bf16
    python benchmarks/step.py --model XL/2 --batch 2 --warmup-depth 4    # warm-up against full

Every contender lives in its own process with the same number of threads, and they take turns, A B
A B, so that whatever else the machine does falls on all alike. A pair is one round, and ratios are
taken within rounds. Two steps of each are not counted. On a GPU the same command runs there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import HERE, add_peer, begun, summary, write

ORDER = ["repa", "erw", "erw compiled"]


class Contender:
    """A process that does its work when told to."""

    def __init__(self, spec: dict[str, Any], *, script: str = "contenders.py") -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"])}
        self.name = spec["title"]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def turn(self, precision: str, phase: str, steps: int, *, clock: str = "wall") -> float:
        """The median seconds of some steps."""
        order = {"precision": precision, "phase": phase, "steps": steps}
        return statistics.median(self.ask(order)[clock])

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to an order."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended without an answer; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def specs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What takes part."""
    common = {
        "model": args.model,
        "batch": args.batch,
        "threads": args.threads,
        "warmup_depth": args.warmup_depth or 1,
        "align_depth": args.align_depth,
    }
    found = []
    if args.peer:
        found.append({"name": "repa", "title": "repa", "path": str(args.peer)})
    compiled = {"no": [False], "yes": [True], "both": [False, True]}[args.compile]
    for on in compiled:
        found.append({"name": "erw", "title": "erw compiled" if on else "erw", "compile": on})
    return [common | spec for spec in found]


def measure(args: argparse.Namespace) -> dict[tuple[str, str, str], list[float]]:
    """Seconds of a step by (precision, contender, phase), one median for each round."""
    contenders = [Contender(spec) for spec in specs(args)]
    phases = ["warmup", "full"] if args.warmup_depth else ["full"]
    turns = [
        (c, phase) for c in contenders for phase in phases if c.name != "repa" or phase == "full"
    ]
    times: dict[tuple[str, str, str], list[float]] = {}
    try:
        for precision in args.precision:
            for contender, phase in turns:
                contender.turn(precision, phase, 2)
            for number in range(args.rounds):
                for contender, phase in turns:
                    seconds = contender.turn(precision, phase, args.steps, clock=args.clock)
                    times.setdefault((precision, contender.name, phase), []).append(seconds)
                    told = f"round {number + 1} {precision} {contender.name} {phase}"
                    print(f"{told:<40} {seconds:8.3f} s", file=sys.stderr)
    finally:
        for contender in contenders:
            contender.close()
    return times


def results(times: dict[tuple[str, str, str], list[float]]) -> list[dict[str, Any]]:
    """One row per (precision, contender, phase); ratios against REPA, and of warm-up to full."""
    rows = []
    for (precision, name, phase), values in times.items():
        row = {
            "precision": precision,
            "contender": name,
            "phase": phase,
            "seconds": summary(values),
        }
        for against in dict.fromkeys([precision, "fp32"]):
            peer = times.get((against, "repa", "full"))
            if peer and name != "repa" and phase == "full":
                pairs = [theirs / mine for theirs, mine in zip(peer, values, strict=True)]
                row[f"times faster than repa {against}"] = summary(pairs)
        if phase == "warmup":
            full = times[precision, name, "full"]
            row["share of a full step"] = summary(
                [w / f for w, f in zip(values, full, strict=True)]
            )
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = []
        for head in heads:
            value = row.get(head, "")
            if isinstance(value, dict):
                value = f"{value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})"
            cells.append(str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_peer(parser)
    parser.add_argument("--model", default="B/2", help="size and patch: S, B, L, XL / 1, 2, 4, 8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--align-depth", type=int, default=4, help="REPA: 4 for B/2, 8 for XL/2")
    parser.add_argument("--warmup-depth", type=int, help="also time warm-up steps of this depth")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"]
    )
    parser.add_argument("--compile", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a turn; their median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: CPU seconds summed over threads, for a machine that others use too",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()

    record = begun(
        f"seconds ({args.clock} clock) of a training step, median over rounds (min to max)",
        clone=args.peer, out=args.out, threads=args.threads,
    )  # fmt: skip
    record["model"] = f"SiT-{args.model}, latents 4 x 32 x 32, batch {args.batch}, features given"
    if args.peer:
        record["stand-ins"] = "in the peer's process: three timm layers, accelerate's casting"
    record["rows"] = results(measure(args))
    for key in ("what", "command", "model", "machine", "versions", "stand-ins"):
        print(f"{key}: {record.get(key, '')}")
    print(f"\n{table(record['rows'])}")
    write(record, args.out)


if __name__ == "__main__":
    main()
