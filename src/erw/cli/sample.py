"""`erw sample`: images out of a run; what other verbs need for that too."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal
from unicodedata import normalize

from tyro.conf import FlagConversionOff

from erw import interop, sampling, training
from erw.cli.settings import RunDir, Settings
from erw.config import Grid, Sample
from erw.errors import ConfigError, nearest
from erw.log import Progress

GRID = Grid()
MOST_SEEDS = 10_000_000  # far more than anybody draws, and their list still fits into memory


@dataclass(frozen=True)
class Draw(Sample):
    """What to draw, and how."""

    seeds: str = "0:16"  # one image each, such as 0:16 or 3,5,8:10
    labels: str | None = None  # a class or one a seed; random: by seed; none: classes in turn
    autoguidance: str | None = None  # guide away from this weaker model, not from the null class
    batch_size: int = 64  # images at once; does not change them
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 runs the network under autocast
    compile: bool = False  # torch.compile of the blocks; pays from some hundred images on
    vae: str | None = None  # decoder of the latents; none: the run's
    checkpoint: str = "last"  # last; best, by scores while training; or a step that the run keeps
    layout: str = "auto"  # of a released file; auto tells it from keys and shapes


def sample(
    run: RunDir,
    draw: Settings[Draw] = Draw(),
    *,
    model: "training.Trained | None" = None,
    out: str,
    preview: bool = False,
    sweep: bool = False,
    grid: Annotated[Grid, FlagConversionOff] = GRID,
) -> None:
    """Draw images from a run or a released file; the same command makes what is missing.

    Args:
        run: the folder that `erw train` wrote, one of its checkpoints, a file of `erw ema`, or a
            released checkpoint.
        out: a folder of PNGs, or a file ending in .npz.
        preview: also the first 16 as one picture.
        sweep: try the guidance and averages of `grid` instead, and say which score best.
    """
    from erw.dist import current
    from erw.sampling.preview import write_preview

    model = model or interop.open_model(run)  # which says what is missing
    if sweep:
        from erw.cli.sweep import sweep_run

        return sweep_run(run, model, draw, grid, Path(out))
    generation = generation_of(model, draw)
    title, first = f"sample {generation.settings['recipe']}", current().first
    with Progress(title, len(generation), unit="images", quiet=not first) as progress:
        written = sampling.write(generation, out, progress=progress.update)
    if first:
        print(written)
    if first and preview:
        print(write_preview(generation, written))


def generation_of(model: "training.Trained", draw: Draw) -> "sampling.Generation":
    """The images that the options ask `erw.generate` for."""
    from erw.dist import current

    weak, device = draw.autoguidance, current().device
    labels: Any = draw.labels
    if labels not in (None, "random"):
        names = [normalize("NFC", name) for name in model.class_names]
        labels = normalize("NFC", labels)  # a terminal may spell it otherwise
        texts = [labels] if labels in names else labels.split(",")  # a name may have a comma
        numbers = [label_number(text.strip(), names) for text in texts]
        labels = numbers[0] if len(numbers) == 1 else numbers
    same = [field.name for field in fields(Sample)] + ["batch_size", "precision", "compile", "vae"]
    return sampling.generate(
        model,
        seeds_of(draw.seeds),
        labels,
        autoguidance=interop.open_model(weak, device=device) if weak else None,
        **{name: getattr(draw, name) for name in same},
    )


def seeds_of(text: str) -> list[int]:
    """3,5,8:10 -> [3, 5, 8, 9]."""
    seeds: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?::(\d+))?", part.strip())):
            raise ConfigError(f"--seeds: expected numbers and ranges as in 3,5,8:10, got {text!r}")
        start = int(match[1])
        if int(match[2] or 0) - start > MOST_SEEDS:
            raise ConfigError(f"--seeds: {part} is more than {MOST_SEEDS:,} images")
        seeds += range(start, int(match[2])) if match[2] else [start]
    return seeds


def label_number(text: str, names: Sequence[str]) -> int:
    """A class by its name, else by its number; #2 is a number in any case."""
    number = text.removeprefix("#")
    if text not in names:
        if not number.isdecimal():
            raise ConfigError(f"--labels: no class {text!r}{nearest(text, names)}")
        return int(number)
    label = names.index(text)
    if text.isdecimal() and label != int(text) < len(names):
        both = f"the name of class #{label} and the number of {names[int(text)]!r}"
        raise ConfigError(f"--labels: {text} is {both}: give #{label} or #{text}")
    return label
