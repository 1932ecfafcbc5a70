"""How long scores take: erw's beside torch-fidelity's, pytorch-fid's and prdc's on this machine.

    pip install --no-deps --target PEERS torch-fidelity pytorch-fid prdc
    python benchmarks/evaluate.py --peers PEERS              # 256 images a turn, 10,000 features

Two tasks. `fid`: from decoded uint8 images to mean and covariance of the 2,048 features of the 2015
Inception network, all contenders with the same (random) weights, images and batch. `pr`: precision
and recall of 10,000 features of 2,048 dimensions against as many, k = 3, from float32 features;
prdc gives density and coverage in the same call. Contenders live in processes of their
own with the same number of threads and take turns; ratios are taken within a round. Everything is
in float32 but the statistics, and what a contender does in float64 by itself.

The peers are loaded without torchvision: see `evaluators.py`. Reading and decoding files is not
timed.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from record import begun, machine, summary, write
from turns import Contender, table

TASKS = {"fid": ("torch-fidelity", "pytorch-fid", "erw"), "pr": ("prdc", "erw")}
AIMS = {"torch-fidelity": 1.0, "pytorch-fid": 1.0, "prdc": 3.0}


def measure(args: argparse.Namespace, task: str) -> tuple[dict[Any, list[float]], dict[str, Any]]:
    """Seconds of a turn by (contender, clock), one for each round; and what each found."""
    common = {
        "task": task,
        "threads": args.threads,
        "peers": str(args.peers.resolve()),
        "images": args.images,
        "side": args.side,
        "batch": args.batch,
        "features": args.features,
    }
    names = [name for name in TASKS[task] if args.only in ("", name, "erw") or name == "erw"]
    contenders = [
        Contender(common | {"name": name, "title": name}, script="evaluators.py") for name in names
    ]
    times: dict[Any, list[float]] = {}
    found: dict[str, Any] = {}
    try:
        for contender in contenders:
            found[contender.name] = contender.ask({"warm": True})["found"]
        for number in range(args.rounds):
            for contender in contenders:
                answer = contender.ask({"warm": False})
                for clock in ("wall", "cpu"):
                    times.setdefault((contender.name, clock), []).append(answer[clock])
                told = f"{task} round {number + 1} {contender.name}"
                print(f"{told:<36} {answer['wall']:8.2f} s  {answer['cpu']:8.2f} CPU s",
                      file=sys.stderr)  # fmt: skip
    finally:
        for contender in contenders:
            contender.close()
    return times, found


def rows_of(task: str, times: dict[Any, list[float]], count: int) -> list[dict[str, Any]]:
    """A row a contender; erw's row has the ratios, by both clocks."""
    rows = []
    for name in dict.fromkeys(name for name, _ in times):
        row: dict[str, Any] = {"task": task, "contender": name, "count": count}
        row["seconds"], row["CPU seconds"] = (summary(times[name, c]) for c in ("wall", "cpu"))
        for peer in TASKS[task][:-1] if name == "erw" else ():
            for clock in ("wall", "cpu") if (peer, "wall") in times else ():
                pairs = zip(times[peer, clock], times[name, clock], strict=True)
                row[f"times faster than {peer}, {clock} clock"] = summary([a / b for a, b in pairs])
        rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Whether each aim is met, by the median ratio of the wall clock."""
    told = []
    for row in rows:
        for peer, aim in AIMS.items():
            if ratio := row.get(f"times faster than {peer}, wall clock"):
                met = "met" if ratio["median"] >= aim else "MISSED"
                told.append(
                    f"{row['task']}: {ratio['median']:.2f} times {peer}, aim {aim:g}: {met}"
                )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--peers", type=Path, required=True, metavar="DIR", help="where pip has put them")
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--only", default="", metavar="PEER", help="leave the other peer out")
    add("--images", type=int, default=256, help="a turn of fid; 10,000 are as many times longer")
    add("--side", type=int, default=256, help="of the images")
    add("--batch", type=int, default=64)
    add("--features", type=int, default=10_000, help="real ones, and as many fake ones")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=os.cpu_count())
    add("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()
    sys.path.append(str(args.peers))
    record = begun(
        "seconds of a turn, median over rounds (min to max)",
        packages=("torch", "numpy", "scikit-learn", "torch-fidelity", "pytorch-fid", "prdc"),
        hidden={str(args.peers): "PEERS"}, out=args.out, threads=args.threads,
    )  # fmt: skip
    record |= {
        "stand-ins": "torchvision's Inception blocks and pytorch-fid's loop over decoded images",
        "rows": [],
        "found": {},
    }
    for task in args.task:
        times, found = measure(args, task)
        count = args.images if task == "fid" else args.features
        record["rows"] += rows_of(task, times, count)
        record["found"][task] = found
    record["machine"]["load_after"] = machine().get("load_before")
    record["verdicts"] = verdicts(record["rows"])
    for key, value in record.items():
        if key != "rows":
            print(f"{key}: {value}")
    print(f"\n{table(record['rows'])}")
    write(record, args.out)


if __name__ == "__main__":
    main()
