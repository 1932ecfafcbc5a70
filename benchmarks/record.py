"""What every benchmark writes down beside its numbers, and the clone that it compares with."""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def add_peer(parser: argparse.ArgumentParser) -> None:
    """The option `--peer repa=PATH`; read, it is the clone's path or None."""
    parser.add_argument("--peer", type=_repa, metavar="repa=PATH", help="clone of sihyun-yu/REPA")


def _repa(text: str) -> Path:
    name, _, path = text.partition("=")
    clone = Path(path).resolve()
    if name != "repa" or not (clone / "models" / "sit.py").is_file():
        raise argparse.ArgumentTypeError(f"{text}: expected repa=PATH, a clone of sihyun-yu/REPA")
    return clone


def begun(
    what: str,
    *,
    packages: Sequence[str] = ("torch",),
    clone: Path | None = None,
    hidden: Mapping[str, str] | None = None,
    out: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """The head of a record: what is measured, by which command, when, on what, with which versions.

    In the command, the clone, words of `hidden` and `out` stand without this machine's folders.
    """
    named = dict(hidden or {}) | ({str(out): out.name} if out else {})
    words = ["repa=CLONE" if word.startswith("repa=") else word for word in sys.argv[1:]]
    words = [named.get(word, word) for word in words]
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return {
        "what": what,
        "command": shlex.join(["python", script, *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine() | ({"threads": threads} if threads else {}),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages}
        | {"erw": commit(HERE)}
        | ({"repa": commit(clone)} if clone else {}),
    }


def summary(values: list[float]) -> dict[str, Any]:
    """Median and spread."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": values,
    }


def beside_repa(found: Mapping[str, Sequence[Mapping[str, float]]], what: str) -> list[dict]:
    """A row for each contender: its rates of `what` by both clocks, and ratios to "repa" in rounds.

    `found` has {"wall": `what` a second, "cpu": `what` a CPU second} of each round.
    """
    rows = []
    for name, rounds in found.items():
        row: dict[str, Any] = {"contender": name}
        for clock, unit in (("wall", "second"), ("cpu", "CPU second")):
            row[f"{what} a {unit}"] = summary([one[clock] for one in rounds])
            if name != "repa" and "repa" in found:
                pairs = zip(rounds, found["repa"], strict=True)
                row[f"times REPA's, {clock}"] = summary([a[clock] / b[clock] for a, b in pairs])
        rows.append(row)
    return rows


def write(record: dict[str, Any], out: Path | None) -> None:
    """The record as JSON, if a file was named for it."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    found: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in info.read_text().splitlines()
            if ":" in line
        )
        flags = fields.get("flags", "").split()
        found["cpu"] = fields.get("model name", found["cpu"])
        found["bf16"] = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    if hasattr(os, "getloadavg"):
        found["load_before"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def commit(folder: Path) -> str:
    """The commit of a checkout, or 'unknown'."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
