"""A study result of the exact format, made up from closed forms, for tests of plots and report."""

import math
import struct
import zlib
from pathlib import Path

from erw.study.results import Results, Row, write_results

SCORES = {"sit": (430.0, 0.42), "repa": (400.0, 0.50), "erw": (380.0, 0.54)}
STEPS = {"sit": 2000, "repa": 1900, "erw": 2300}
BUDGET = 2_000 * 64 * 21_000_000_000 / 20  # FLOPs


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
    """The made-up score: a power law in cost with a small offset for every seed but the first."""
    scale, power = SCORES[method]
    return scale * (4 * fraction) ** -power + (0, 6, -4, 3)[seed % 4]


def synthetic(*, seeds: int = 1, points: int = 4, pictures: bool = True) -> Results:
    """Three methods at equal FLOPs. Without `pictures`, rows carry no grid."""
    rows, curves = [], {}
    for method in SCORES:
        for seed in range(seeds):
            for i in range(points):
                rows.append(_row(method, seed, (i + 1) / points, pictures=pictures))
            curves[f"{method}/{seed}"] = _curve(method, seed)
    return Results(
        rows=tuple(rows),
        settings={
            "study": {"name": "synthetic", "samples": 500},
            "methods": {m: {"name": m} for m in SCORES},
        },
        versions={"erw": "0.1.0", "torch": "2.13.0"},
        hardware={"cpu": "a made-up machine", "threads": 2},
        ledger={method: _ledger(method) for method in SCORES},
        floors={"vae_reconstruction": 31.0, "train_images": 12.0},
        curves=curves,
        pictures={"reference": "grids/reference.png"} if pictures else {},
        attribution="OpenMoji, CC BY-SA 4.0",
        title="Synthetic study",
    )


def write_study(folder: Path, results: Results) -> Path:
    """Write results.json and the grids that it names."""
    for row in results.rows:
        if row.picture:
            shade = int(200 * (row.fraction or 1))
            color = {"sit": (shade, 90, 90), "repa": (90, shade, 90), "erw": (90, 90, shade)}[
                row.method
            ]
            _write(folder / row.picture, png(128, 128, color))
    for name in results.pictures.values():
        _write(folder / name, png(128, 128, (200, 180, 60)))
    write_results(results, folder / "results.json")
    return folder


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _row(method: str, seed: int, fraction: float, *, pictures: bool) -> Row:
    step = round(STEPS[method] * fraction)
    total = round(BUDGET * fraction)
    return Row(
        method=method,
        seed=seed,
        step=step,
        images=64 * step,
        flops_total=total,
        flops_warmup=round(0.06 * BUDGET) if method == "erw" else 0,
        flops_teacher=0 if method == "sit" else round(0.02 * BUDGET),
        seconds=150 * fraction * (1 + 0.04 * seed),
        fd_lite2=score(method, fraction, seed),
        loss=0.9 - 0.1 * fraction,
        align=None if method == "sit" else -0.4 - 0.2 * fraction,
        fraction=fraction,
        picture=f"grids/{method}-{seed}-{step:06d}.png" if pictures else None,
        eval_seconds=9.0,
    )


def _curve(method: str, seed: int) -> dict[str, list]:
    number, total = 150, STEPS[method]
    warm = 600 if method == "erw" else 0
    curve: dict[str, list] = {key: [] for key in ("step", "images", "flops_total", "seconds")}
    curve |= {key: [] for key in ("loss", "flow", "align", "align_weight", "warmup")}
    for i in range(1, number + 1):
        step = total * i // number
        curve["step"].append(step)
        curve["images"].append(64 * step)
        curve["flops_total"].append(BUDGET * i / number)
        curve["seconds"].append(150 * i / number)
        noise = 0.015 * math.sin(37.0 * i + seed)
        in_warmup = step <= warm
        start = max(1, step - warm)
        flow = None if in_warmup else 0.72 + 1.4 / math.sqrt(start / 4) + noise
        align = None if method == "sit" else -0.62 + 0.6 / math.sqrt(1 + step / 60) + noise / 2
        curve["flow"].append(flow)
        curve["align"].append(align)
        curve["loss"].append(align if flow is None else flow + 0.5 * (align or 0))
        curve["align_weight"].append(0.0 if method == "sit" else 0.5)
        curve["warmup"].append(in_warmup)
    return curve


def _ledger(method: str) -> dict:
    shares = {"sit": (0, 1, 0, 0), "repa": (0, 0.9, 0.08, 0.02), "erw": (0.06, 0.83, 0.09, 0.02)}[
        method
    ]
    names = ("warmup", "full", "projector", "teacher")
    per_image = {
        "warmup": 200_000_000,
        "full": 1_050_000_000,
        "projector": 90_000_000,
        "teacher": 260_000_000,
    }
    if method == "sit":
        per_image |= {"warmup": 0, "projector": 0, "teacher": 0}
    warm = 600 if method == "erw" else 0
    return {
        "batch": {"warmup": 64, "full": 64},
        "per_image": per_image,
        "steps": {"warmup": warm, "full": STEPS[method] - warm},
        "images": 64 * STEPS[method],
        "distinct_images": 0 if method == "sit" else 4096,
        "total": {name: round(BUDGET * share) for name, share in zip(names, shares, strict=True)},
        "flops_total": round(BUDGET),
        "budget": round(BUDGET),
    }
