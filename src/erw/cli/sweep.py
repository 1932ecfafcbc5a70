"""`erw sample --sweep`: which guidance and average of a run score best."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from erw.cli.settings import as_options
from erw.config import Grid, Sample, to_dict
from erw.evaluation.images import image_set, reference_images
from erw.evaluation.sweep import Row, candidates, sweep
from erw.interop import open_model
from erw.io import write_bytes
from erw.log import Progress
from erw.sampling import generate
from erw.study.plots import LIGHT, Line, lines_figure, to_bytes
from erw.training import Trained, load, posthoc_ema

OPTIONS = ("batch_size", "precision", "vae")


def sweep_run(source: str, model: Trained, draw: Any, grid: Grid, out: Path) -> None:
    """Write `sweep.json`, `sweep.png` and the averages of `grid.ema` into the folder `out`; print
    the last round and the command of the best settings."""
    models = {source: model}
    for width in grid.ema:
        file = out / f"sigma-{width:g}.safetensors"
        if not file.exists():
            posthoc_ema.save(posthoc_ema.reconstruct(source, width), source, width, file)
        models[str(file)] = load(file, device=model.device)
    weak = open_model(draw.autoguidance, device=model.device) if draw.autoguidance else None
    options = {name: getattr(draw, name) for name in OPTIONS}
    two = generate(model, [0, 1], steps=2, solver=draw.solver, vae=draw.vae)
    size = image_set(two).resolution[0]
    reference = reference_images(
        grid.reference, model.class_names, size=size, count=grid.reference_count
    )
    base = Sample(**{field.name: getattr(draw, field.name) for field in fields(Sample)})
    total, tried = 0, len(candidates(models, grid, base, weak=weak is not None))
    left = tried
    for number in range(grid.rounds):
        total, left = total + left * grid.images * 2**number, grid.kept(left)
    with Progress("sweep", total, unit="images") as progress:
        rows = sweep(
            models, grid, base, path=out / "sweep.json", reference=reference, weak=weak,
            progress=lambda row: progress.update(row["images"]), **options,
        )  # fmt: skip
    write_bytes(out / "sweep.png", to_bytes(picture(rows), LIGHT, "png"))
    for row in rows:
        if row["round"] == grid.rounds:
            print(f"{row['score']:>12.4f}  {command(row, model, draw.autoguidance)}")
    print(f"best of {tried} settings, all in {out / 'sweep.png'}:")
    print(f"erw sample {command(rows[-1], model, draw.autoguidance)} --out DIR")


def command(row: Row, model: Trained, weak: str | None) -> str:
    """The weights, and the options in which a row differs from the run's own, as they are typed."""
    usual = json.loads(json.dumps(to_dict(model.run.sample)))
    changed = {key: value for key, value in row["sample"].items() if value != usual[key]}
    changed |= {"autoguidance": weak} if row["weak"] else {}
    return " ".join([row["average"], *as_options(changed)])


def picture(rows: list[Row]) -> Any:
    """The first round: the score over the scale of guidance, a line for all else. Without guidance
    by classes or by a weaker model, that of internal guidance is the one."""
    first = [row for row in rows if row["round"] == 1]
    scales = {row["sample"]["guidance"] for row in first}
    key, interval = (
        ("guidance", "interval") if len(scales) > 1 else ("internal", "internal_interval")
    )
    lines: dict[str, dict[float, float]] = {}
    for row in sorted(first, key=lambda row: row["sample"][key] == 1):  # without guidance last
        sample, names = row["sample"], [Path(row["average"]).stem]
        if key == "guidance" and sample["internal"] != 1:
            names.append(f"internal {sample['internal']:g}")
        names += ["weaker model"] * row["weak"] + ["path"] * (sample["guide"] == "path")
        rest = ", ".join(names)
        if sample[key] != 1:
            name = f"{rest}, until {sample[interval][1]:g}"
            lines.setdefault(name, {})[sample[key]] = row["score"]
        else:
            for name in [name for name in lines if name.startswith(f"{rest}, until")] or [rest]:
                lines.setdefault(name, {})[1.0] = row["score"]
    drawn = [Line(name, sorted(at), [at[x] for x in sorted(at)]) for name, at in lines.items()]
    title = f"{first[0]['metric']} of {first[0]['images']} images, first round"
    return lines_figure(drawn, LIGHT, title=title, label=f"scale of {key}", size=(900, 520))
