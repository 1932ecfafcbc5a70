"""`erw cost --to-target`: what it cost to reach a score, and how methods compare by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from erw.cli.settings import Parser, add_settings, changed


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        metric: name of the score: fd_lite2 in studies, any that a run was scored with.
        target: the score to reach; none: each method's final score alone, by the others.
        over: the cost; epochs gives E@FID-k where the metric is fid.
    """

    metric: str = "fd_lite2"
    target: float | None = None
    over: Literal["flops", "epochs", "images", "steps", "seconds"] = "flops"


def to_target(args: Sequence[str]) -> None:
    """Print cost to a target and speed-ups with their spread; with --out write JSON and figure."""
    text = (
        "RESULTS: studies (a folder or results.json) or runs that were scored while training\n"
        "(--eval.every), several of which are seeds of one method if they differ in nothing else."
    )
    usage = "--to-target RESULTS... [--metric fd_lite2] [--target SCORE] [--out STEM]"
    parser = Parser("erw cost", text, usage=usage)
    parser.add_argument("--to-target", nargs="+", metavar="RESULTS", required=True)
    parser.add_argument("--out", metavar="STEM", help="write STEM.json and the figure beside it")
    add_settings(parser, Target())
    found = parser.read(args)
    how = changed(Target(), found)
    from erw.study.target import compared, told
    from erw.study.tracks import tracks_of

    metric = how.metric.replace("-", "_")
    tracks = tracks_of(found.to_target, metric=metric, over=how.over)
    record = compared(tracks, metric=metric, over=how.over, target=how.target)
    print("\n".join(told(record)))
    if found.out:
        from erw.study.plots import save_figure, target_figure

        drawn = save_figure(lambda theme: target_figure(record, theme), found.out, data=record)
        print("\n".join(map(str, drawn)))
