"""`erw ema`: averages of a run's weights with any power-function profile, after the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erw.cli.eval import DRAW, Score, images_of, scored
from erw.cli.sample import Draw
from erw.cli.settings import Run, Settings, call, first
from erw.config import Run as Config
from erw.config import Sample, from_dict
from erw.dist import current, world
from erw.errors import ConfigError
from erw.training import load, posthoc_ema
from erw.training.trained import read_recipe


def main(args: Sequence[str]) -> None:
    run, sampler = first("ema", args, "a run"), Sample()
    if run:
        sampler = from_dict(Config, read_recipe(Path(run))["resolved"]).sample
    call("ema", ema, args, sampler=sampler, draw=DRAW)


def ema(
    run: Run,
    scoring: Settings[Score],
    sampler: Settings[Sample],
    draw: Settings[Draw],
    *,
    sigma_rel: tuple[float, ...],
    step: int | None = None,
    out: str | None = None,
    score: bool = False,
    dry_run: bool = False,
) -> None:
    """Mix any power-function average of EDM2 from those that the run stored.

    Every verb that takes a run takes the file that this writes.

    Args:
        run: the folder of a run with optim.ema_profiles.
        scoring: as for `erw eval`.
        sampler: how samples are drawn for the scores.
        draw: which.
        sigma_rel: widths relative to the training's length; above 0, at most 0.2887.
        step: of a snapshot; none: the last.
        out: a .safetensors file; a folder for several widths.
        score: score samples of each.
        dry_run: only say how well it can be mixed.
    """
    if dry_run and score:
        raise ConfigError("--dry-run writes nothing, so there is nothing to --score")
    files = [Path()] * len(sigma_rel) if dry_run else _files(out, sigma_rel)
    points: list[dict[str, Any]] = []
    for width, file in zip(sigma_rel, files, strict=True):
        average = posthoc_ema.reconstruct(run, width, step=step)
        error, stored = average.mix.error, len(average.stored)
        quality = f"profile off by {error:.2%}" if error else "itself stored"
        print(f"sigma_rel {width:g} after step {average.step}: of {stored} stored, {quality}")
        point: dict[str, Any] = {
            "sigma_rel": width,
            "step": average.step,
            "stored": stored,
            "error": error,
        }
        points.append(point)
        if not dry_run:
            posthoc_ema.save(average, run, width, file)
            print(file)
        if score:
            with world():
                model = load(file, device=current().device)
                images = images_of(str(file), model, sampler, draw, scoring.reference_count)
                point["scores"] = scored(images, model, scoring)
            values = point["scores"]["values"].items()
            print(f"sigma_rel {width:<8g}" + "  ".join(f"{name} {v:.4f}" for name, v in values))
    if score and len(points) > 1:
        from erw.study.plots import save_figure

        record = {"run": Path(run).name, "points": points}
        stem = files[0].parent / "sweep"
        paths = save_figure(lambda theme: figure(record, theme), stem, data=record)
        print("\n".join(map(str, paths)))


def _files(out: str | None, widths: Sequence[float]) -> list[Path]:
    """Where each average goes."""
    if out is None:
        raise ConfigError("missing --out; see erw ema --help")
    path = Path(out)
    if (path.suffix == ".safetensors") != (len(widths) == 1):
        raise ConfigError(
            f"--out {path}: expected a file ending in .safetensors for one width, a folder for "
            f"several; --sigma-rel has {len(widths)}"
        )
    return [path] if len(widths) == 1 else [path / f"sigma-{w}.safetensors" for w in widths]


def figure(record: dict[str, Any], theme: Any) -> Any:
    """Scores over sigma_rel: a line for each."""
    from erw.study import plots

    points = sorted(record["points"], key=lambda point: point["sigma_rel"])
    xs = [point["sigma_rel"] for point in points]
    lines = [
        plots.Line(
            name.replace("_", "-"),
            theme.spare[i % len(theme.spare)],
            xs,
            [point["scores"]["values"][name] for point in points],
        )
        for i, name in enumerate(points[0]["scores"]["values"])
    ]
    title = f"{record['run']}: score over the average's width"
    return plots.lines_figure(lines, theme, title=title, label="sigma_rel")
