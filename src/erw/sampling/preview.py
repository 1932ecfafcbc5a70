"""Previews: a few samples of the same seeds and classes each time, as one picture.

While training, `RUN/previews/step-00001000.png` after every `log.preview` steps:

    erw.train(run, out, at=preview_steps(run), evaluate=previewing(run, out))

Training itself is not touched: neither its weights nor its numbers depend on being looked at.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erw.config import Run, to_dict
from erw.io import write_bytes, write_json
from erw.sampling.files import read_images
from erw.sampling.generate import Generation, generate
from erw.sampling.grid import grid_png
from erw.sampling.png import png_path, read_png
from erw.training.trained import Trained

COUNT = 16
FOLDER = "previews"


def watched_steps(run: Run, every: int) -> tuple[int, ...]:
    """Every so many steps of full training, and the last one; none for 0.

    In warm-up nothing is drawn: the later blocks have not begun to learn.
    """
    found = {*range(every, run.steps + 1, every), run.steps} if every else set()
    return tuple(sorted(step for step in found if step > run.plan.warmup))


def preview_steps(run: Run) -> tuple[int, ...]:
    """The steps after which `log.preview` asks for a picture."""
    return watched_steps(run, run.log.preview)


def previewing(
    run: Run, out: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> Callable[[int, Trained], None]:
    """What `erw.train` calls at these steps; `say` is given a line on each picture."""

    def look(step: int, model: Trained) -> None:
        labels = spread(model.num_classes)
        how = to_dict(run.sample)
        drawn = generate(model, range(COUNT), labels, **how, precision="auto")
        images = drawn.collect().images
        assert images is not None
        path = Path(out) / FOLDER / f"step-{step:08d}.png"
        write_picture(images, drawn, path)
        say(f"step {step}: {path}")

    return look


def beside(generation: Generation, out: str | Path) -> Path:
    """A picture of the first images that `write` has made of `generation` in `out`, beside it."""
    out, seeds = Path(out), generation.seeds[:COUNT]
    if out.suffix == ".npz":
        images = next(read_images(out, rows=len(seeds)))
    else:
        images = np.stack([read_png(png_path(out, seed)) for seed in seeds])
    path = out.with_name(f"{out.stem}-preview.png")
    write_picture(torch.from_numpy(images).permute(0, 3, 1, 2), generation, path)
    return path


def write_picture(
    images: Tensor, generation: Generation, path: Path, *, paper: bool = True
) -> None:
    """A picture of the first images of a generation, and beside it as JSON how they were made."""
    names, count = getattr(generation.model, "class_names", ()), len(images)
    labels = None if generation.labels is None else generation.labels[:count]
    write_bytes(path, picture(images, labels, names, paper=paper))
    made = {"seeds": generation.seeds[:count], "labels": labels, "class_names": names}
    made |= {"settings": generation.settings}
    write_json(path.with_suffix(".json"), made)


def spread(num_classes: int, count: int = COUNT) -> list[int] | None:
    """`count` classes: all in turn, or evenly chosen where there are more; None: there are none."""
    if not num_classes:
        return None
    if num_classes <= count:
        return [i % num_classes for i in range(count)]
    return [i * num_classes // count for i in range(count)]


def picture(
    images: Tensor, labels: Sequence[int] | None, names: Sequence[str], *, paper: bool = True
) -> bytes:
    """Images uint8 (N, 3, H, W) in a grid as PNG, their classes below by name, or by number."""
    said = [names[y] if names else f"class {y}" for y in labels or ()]
    return grid_png(images, names=said, paper=paper)
