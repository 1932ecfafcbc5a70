"""`erw doctor`: what looks off with a run, and what usually causes it."""

from typing import Annotated

from tyro.conf import Positional, arg

from erw.cli.settings import required
from erw.errors import ConfigError


def doctor(run: Annotated[Positional[str], arg(metavar="RUN")], *, images: int = 256) -> None:
    """Check a run by its own model, cache and curves: scale of latents, times, labels, EMA, losses
    beside a healthy run's. Prints a line for each; it changes nothing.

    Args:
        run: its folder.
        images: of its cache, that losses are taken on.
    """
    required(run)
    if images < 8:
        raise ConfigError(f"--images is {images}: expected at least 8")
    from erw.study.doctor import examine

    findings = examine(run, count=images)
    print(*findings, sep="\n")
    odd, count = sum(not finding.good for finding in findings), len(findings)
    print(f"{odd} of {count} checks look odd" if odd else f"{count} checks, nothing odd")
