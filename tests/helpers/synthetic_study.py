"""Folders of runs made up from closed forms, for tests of curves, comparisons, plots and report."""

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

from erw.config import Run
from erw.training.flops import Ledger, Rate

SCORES = {"SiT": (430.0, 0.42), "REPA": (400.0, 0.50), "ERW": (380.0, 0.54)}
STEPS = {"SiT": 2000, "REPA": 1900, "ERW": 2300}
WARMUP = 600
BUDGET = 134_400_000_000_000  # FLOPs
TIMES = [(i + 0.5) / 12 for i in range(12)]


def png(width: int, height: int, color: tuple[int, int, int]) -> bytes:
    """A PNG with a diagonal stripe on one colour, without any image library."""
    rows = b""
    for y in range(height):
        pixels = [(255, 255, 255) if (x + y) % 32 < 3 else color for x in range(width)]
        rows += b"\0" + b"".join(bytes(pixel) for pixel in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def score(method: str, fraction: float, seed: int) -> float:
    """A power law in cost, with a small offset for every seed but the first."""
    scale, power = SCORES[method]
    return scale * (4 * fraction) ** -power + (0, 6, -4, 3)[seed % 4]


def write_study(out: Path, *, seeds: int = 1, points: int = 4, pictures: bool = True) -> Path:
    """Three methods at equal FLOPs as `erw study` leaves them, with a validation loss."""
    names = []
    for seed in range(seeds):
        for method in SCORES:
            folder = out / "runs" / f"{method.lower()}-{seed}"
            write_run(folder, method, lines_of(method, seed, points=points), seed=seed)
            names.append(folder.name)
            for i in range(points if pictures else 0):
                step = STEPS[method] * (i + 1) // points
                path = folder / "previews" / f"step-{step:08d}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(
                    png(64, 64, (40 * seed, 255 * i // points, list(SCORES).index(method)))
                )
    study = {"study": {"title": "Synthetic study", "small": False, "samples": 500}}
    study |= {"runs": names, "versions": {"diffusers": "0.42"}, "hardware": {"cores": 2}}
    (out / "study.json").write_text(json.dumps(study))
    if pictures:
        (out / "reference.png").write_bytes(png(64, 64, (200, 180, 60)))
    return out


def write_run(
    folder: Path, name: str, lines: list[dict[str, Any]], *, seed: int = 0, **settings: Any
) -> Path:
    """A run's folder: recipe and metrics. `settings` tell methods of one name apart."""
    folder.mkdir(parents=True)
    run = {
        "name": name,
        "seed": seed,
        "steps": lines[-1]["step"],
        "model": name,
        "data": {},
        **settings,
    }
    recipe = {"erw": "0.1.0", "torch": "2.13.0", "run": run, "resolved": run}
    cache = {"identity": "made up", "rows": 640, "vae": "openmoji-f4c4"}
    (folder / "recipe.json").write_text(json.dumps(recipe | {"cache": cache}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lines_of(method: str, seed: int, *, points: int = 4) -> list[dict[str, Any]]:
    """Lines of training, scores and validation losses of a run."""
    steps, warmup = STEPS[method], WARMUP if method == "ERW" else 0
    lines = [train_line(step, method, seed) for step in range(10, steps + 1, 10)]
    for i in range(1, points + 1):
        step = steps * i // points
        cost = cost_of(step, method, seed)
        values = {"fd_lite2": score(method, i / points, seed)}
        eval_line = {
            "kind": "eval",
            **cost,
            "values": values,
            "best": False,
            "how": {"samples": 500},
        }
        by_time = [2 - t + 10 / step for t in TIMES]
        mean = sum(by_time) / 12
        lines.append(eval_line)
        lines.append(
            {"kind": "validation", **cost, "flow": mean, "times": TIMES, "flow_by_time": by_time}
        )
    assert warmup < steps
    return sorted(lines, key=lambda line: line["step"])


def cost_of(step: int, method: str, seed: int) -> dict[str, Any]:
    """What a step's line says of cost; the budget is spent at the last step."""
    share = step / STEPS[method]
    warm = min(step, WARMUP) / STEPS["ERW"] if method == "ERW" else 0.0
    return {
        "step": step,
        "images": 64 * step,
        "flops_total": round(BUDGET * share),
        "flops_warmup": round(BUDGET * warm),
        "flops_teacher": 0 if method == "SiT" else round(0.02 * BUDGET * share),
        "seconds": 150 * share * (1 + 0.04 * seed),
    }


def train_line(step: int, method: str, seed: int) -> dict[str, Any]:
    """A line of training: smooth losses with a little noise."""
    warm = method == "ERW" and step <= WARMUP
    begun = max(1, step - (WARMUP if method == "ERW" else 0))
    noise = 0.015 * math.sin(37.0 * step + seed)
    losses, weights = {}, {"flow": 0.0 if warm else 1.0}
    if not warm:
        losses["flow"] = 0.72 + 1.4 / math.sqrt(begun / 4) + noise
    if method != "SiT":
        losses["align"] = -0.62 + 0.6 / math.sqrt(1 + step / 60) + noise / 2
        weights["align"] = 0.5
    total = sum(weights[name] * loss for name, loss in losses.items())
    phase = "warmup" if warm else "full"
    return {"kind": "train", **cost_of(step, method, seed), "phase": phase, "loss": total,
            "losses": losses, "weights": weights, "grad_norm": 1.0, "lr": 1e-3}  # fmt: skip


def ledger_of(run: Run) -> Ledger:
    """A made-up ledger: a full step costs a block each, a warm-up step its own blocks."""
    rates = tuple(
        Rate(a, b, phase.warmup, 100 * (phase.stop_at or run.model.depth), phase.reads_encoder)
        for a, b in run.plan.segments(run.steps)
        for phase in [run.phase(a)]
    )
    return Ledger(run.plan, run.data.batch_size, rates, teacher=7, rows=1000)
