"""Previews: samples of the same seeds and classes each time, as one picture.

erw.train(run, out, at=watched_steps(run, run.log.preview), evaluate=previewing(run, out))
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erw.config import Run, to_dict
from erw.dist import World
from erw.io import write_bytes
from erw.sampling.generation import Generation, generate
from erw.sampling.save import png_path, read_images, read_png
from erw.training.trained import Trained

COUNT = 16
SMALLEST = 72  # pixels: narrower images are enlarged to have room for their captions
GAP = 4
CAPTION = 18


def watched_steps(run: Run, every: int) -> tuple[int, ...]:
    """Every so many steps of full training and the last one; none for 0."""
    steps = {*range(every, run.steps + 1, every), run.steps} if every else set()
    return tuple(sorted(step for step in steps if step > run.plan.warmup))


def previewing(
    run: Run, out: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> Callable[[int, Trained, World], Sequence[dict[str, Any]]]:
    """`evaluate=` of `erw.train`: the first rank draws; `say` receives a line on each picture."""

    def preview(step: int, model: Trained, world: World) -> Sequence[dict[str, Any]]:
        path = Path(out) / "previews" / f"step-{step:08d}.png"
        if world.first and not path.is_file():  # or it was drawn before the run was stopped
            labels, options = spread(model.usual_classes), to_dict(run.sample)
            drawn = generate(model, range(COUNT), labels, **options, precision="auto").collect()
            assert drawn.images is not None, "decoded by default"
            write_bytes(path, picture(drawn.images, labels, model.class_names))
            say(f"step {step}: {path}")
        return ()

    return preview


def write_preview(generation: Generation, out: Path) -> Path:
    """The first images that `write` put into `out` as one picture next to it."""
    if out.suffix == ".npz":
        images = next(read_images(out, rows=COUNT))
    else:
        images = np.stack([read_png(png_path(out, seed))[0] for seed in generation.seeds[:COUNT]])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    path = out.with_name(f"{out.stem}-preview.png")
    write_bytes(path, picture(pixels, generation.labels, generation.model.class_names))
    return path


def spread(classes: Sequence[int], count: int = COUNT) -> list[int] | None:
    """`count` of the classes: all in turn, or evenly chosen where there are more; None: none."""
    if not (known := len(classes)):
        return None
    return [classes[i * max(known, count) // count % known] for i in range(count)]


def picture(
    images: Tensor, labels: Sequence[int] | None = None, names: Sequence[str] = (), columns: int = 4
) -> bytes:
    """Images uint8 (N, 3, H, W) row by row as PNG, captioned by the name or number of their class;
    the ground is transparent, letters a grey that reads on light and on dark pages."""
    from PIL import Image, ImageDraw

    captions = [names[y] if names else f"class {y}" for y in (labels or ())[: len(images)]]
    factor, below = (-(-SMALLEST // images.shape[-1]), CAPTION) if captions else (1, 0)
    width, height = factor * images.shape[-1], factor * images.shape[-2]
    columns = min(columns, len(images))
    size = columns * (width + GAP), -(-len(images) // columns) * (height + below + GAP)
    canvas = Image.new("RGBA", (size[0] - GAP, size[1] - GAP))
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        cell = Image.new("RGBA", (width, height + below))
        cell.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))
        if captions:
            at = (1, height + below // 2)
            ImageDraw.Draw(cell).text(at, captions[i], "#80858f", anchor="lm", font_size=11)
        canvas.paste(cell, (i % columns * (width + GAP), i // columns * (height + below + GAP)))
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
