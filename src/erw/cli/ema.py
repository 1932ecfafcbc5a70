"""`erw ema`: averages of a run's weights with any power-function profile, after the training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erw.cli.eval import DRAW, Score, images_of, scored
from erw.cli.sample import Draw
from erw.cli.settings import RunDir, Settings, call, first
from erw.config import Run, from_dict, to_dict
from erw.dist import current, world
from erw.errors import ConfigError
from erw.training import load, posthoc_ema
from erw.training.trained import read_recipe


def main(args: Sequence[str]) -> None:
    draw = DRAW
    if run := first("ema", args, "a run"):
        sampler = from_dict(Run, read_recipe(Path(run))["resolved"]).sample
        draw = replace(draw, **to_dict(sampler))
    call("ema", ema, args, draw=draw)


def ema(
    run: RunDir,
    scoring: Settings[Score],
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
        error, stored, at = average.mix.error, len(average.stored), average.step
        quality = f"profile off by {error:.2%}" if error else "itself stored"
        print(f"sigma_rel {width:g} after step {at}: of {stored} stored, {quality}")
        points.append({"sigma_rel": width, "step": at, "stored": stored, "error": error})
        if not dry_run:
            posthoc_ema.save(average, run, width, file)
            print(file)
        if score:
            with world():
                model = load(file, device=current().device)
                images = images_of(str(file), model, draw, scoring.reference_count)
                points[-1]["scores"] = scores = scored(images, model, scoring)
            values = "  ".join(f"{name} {v:.4f}" for name, v in scores["values"].items())
            print(f"sigma_rel {width:<8g}{values}")
    if score and len(points) > 1:
        from erw.study.plots import save_figure

        record, stem = {"run": Path(run).name, "points": points}, files[0].parent / "sweep"
        paths = save_figure(lambda theme: figure(record, theme), stem, data=record)
        print("\n".join(map(str, paths)))


def _files(out: str | None, widths: Sequence[float]) -> list[Path]:
    if out is None:
        raise ConfigError("missing --out; see erw ema --help")
    path = Path(out)
    if (path.suffix == ".safetensors") != (len(widths) == 1):
        raise ConfigError(
            f"--out {path}: expected a .safetensors file for one width, a folder for several"
        )
    return [path] if len(widths) == 1 else [path / f"sigma-{w}.safetensors" for w in widths]


def figure(record: dict[str, Any], theme: Any) -> Any:
    """Scores over sigma_rel: a line for each."""
    from erw.study import plots

    points = sorted(record["points"], key=lambda point: point["sigma_rel"])
    xs = [point["sigma_rel"] for point in points]
    lines = []
    for i, name in enumerate(points[0]["scores"]["values"]):
        ys = [point["scores"]["values"][name] for point in points]
        color = theme.spare[i % len(theme.spare)]
        lines.append(plots.Line(name.replace("_", "-"), color, xs, ys))
    title = f"{record['run']}: score over the average's width"
    return plots.lines_figure(lines, theme, title=title, label="sigma_rel")
