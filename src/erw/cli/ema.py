"""`erw ema`: averages of a run's weights with any power-function profile, after the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erw.cli.eval import Score, scored
from erw.cli.sample import Draw
from erw.cli.settings import Parser, add_settings, converter, shown
from erw.config import Run, Sample, from_dict
from erw.errors import ConfigError

SWEEP = "sweep"


def ema(args: Sequence[str]) -> None:
    """Write weights averaged with the widths asked for; with --score, score their samples too."""
    text = (
        "RUN: the folder of a run with optim.ema_profiles. Any profile of the power-function "
        "averages of EDM2 is mixed from those that the run stored. What is written is loaded by "
        "every verb that takes a run."
    )
    parser = Parser("erw ema", text, usage="RUN --sigma-rel S... --out PATH [--step N] [--score]")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--sigma-rel", nargs="+", type=converter(float), required=True, metavar="S",
        help="widths relative to the training's length; above 0, at most 0.2887",
    )  # fmt: skip
    parser.add_argument("--step", type=converter(int), help="of a snapshot [the last]")
    parser.add_argument("--out", metavar="PATH", help="a .safetensors file; a folder for several")
    parser.add_argument("--dry-run", action="store_true", help="only say how well it can be mixed")
    parser.add_argument("--score", action="store_true", help="score samples of each; see erw eval")
    own = Sample()
    if args and not args[0].startswith("-"):
        from erw.training.trained import read_recipe

        own = from_dict(Run, read_recipe(Path(args[0]))["resolved"]).sample
    add_settings(parser, Score())
    add_settings(parser, own)
    add_settings(parser, Draw(seeds="0:2000"))
    found = parser.read(args)
    files = _files(found)
    lines = [
        _written(found, sigma_rel, file)
        for sigma_rel, file in zip(found.sigma_rel, files, strict=True)
    ]
    if not found.score:
        return
    for line, file in zip(lines, files, strict=True):
        line["scores"] = _scores(file, found)
        values = "  ".join(
            f"{name} {value:.4f}" for name, value in line["scores"]["values"].items()
        )
        print(f"sigma_rel {line['sigma_rel']:<8g}{values}")
    if len(lines) > 1:
        from erw.study.plots import save_figure

        record = {"run": Path(found.run).name, "points": lines}
        drawn = save_figure(
            lambda theme: figure(record, theme), files[0].parent / SWEEP, data=record
        )
        print("\n".join(str(path) for path in drawn))


def _files(found: Any) -> list[Path]:
    """Where each average goes."""
    if not found.out:
        if found.dry_run and not found.score:
            return [Path()] * len(found.sigma_rel)
        raise ConfigError("missing --out; see erw ema --help")
    if found.dry_run and found.score:
        raise ConfigError("--dry-run writes nothing, so there is nothing to --score")
    out = Path(found.out)
    one = out.suffix == ".safetensors"
    if one != (len(found.sigma_rel) == 1):
        raise ConfigError(
            f"--out {out}: expected a file ending in .safetensors for one width, a folder for "
            f"several; --sigma-rel has {len(found.sigma_rel)}"
        )
    return [out] if one else [out / f"sigma-{shown(s)}.safetensors" for s in found.sigma_rel]


def _written(found: Any, sigma_rel: float, file: Path) -> dict[str, Any]:
    """Mix one average, write it, and say how near its profile is to the wanted one."""
    from erw.training import posthoc_ema

    average = posthoc_ema.reconstruct(found.run, sigma_rel, step=found.step)
    error, stored = average.mix.error, len(average.stored)
    said = f"sigma_rel {sigma_rel:g} after step {average.step}: of {stored} stored, "
    print(said + (f"profile off by {error:.2%}" if error else "itself stored"))
    if not found.dry_run:
        posthoc_ema.save(average, found.run, sigma_rel, file)
        print(file)
    return {"sigma_rel": sigma_rel, "step": average.step, "stored": stored, "error": error}


def _scores(file: Path, found: Any) -> dict[str, Any]:
    from erw.dist import world
    from erw.training import load

    with world() as here:
        return scored(str(file), load(file, device=here.device), found, here)


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
