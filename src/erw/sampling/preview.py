"""Previews: samples of the same seeds and classes each time, as one picture.

While training, `RUN/previews/step-00001000.png` after every `log.preview` steps:

    erw.train(run, out, at=preview_steps(run), evaluate=previewing(run, out))

Drawing changes neither the weights nor the numbers of the run.
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
from erw.io import write_bytes, write_json
from erw.sampling.generation import Generation, generate
from erw.sampling.save import png_path, read_images, read_png
from erw.training.trained import Trained

COUNT = 16
FOLDER = "previews"
SMALLEST = 72  # pixels: narrower images are enlarged to have room for their captions
FONT = 11
CAPTION = 18
GREY = (128, 133, 143)


def watched_steps(run: Run, every: int) -> tuple[int, ...]:
    """Every so many steps of full training and the last one; none for 0.

    Warm-up is left out: the later blocks have not begun to learn.
    """
    steps = {*range(every, run.steps + 1, every), run.steps} if every else set()
    return tuple(sorted(step for step in steps if step > run.plan.warmup))


def preview_steps(run: Run) -> tuple[int, ...]:
    """The steps after which `log.preview` draws a picture."""
    return watched_steps(run, run.log.preview)


def previewing(
    run: Run, out: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> Callable[[int, Trained, World], Sequence[dict[str, Any]]]:
    """`evaluate=` of `erw.train`: the first rank draws; `say` receives a line on each picture."""

    def preview(step: int, model: Trained, world: World) -> Sequence[dict[str, Any]]:
        path = Path(out) / FOLDER / f"step-{step:08d}.png"
        if not world.first or path.is_file():  # drawn before the run was stopped
            return ()
        options = to_dict(run.sample)
        labels = spread(model.num_classes)
        generation = generate(model, range(COUNT), labels, **options, precision="auto")
        images = generation.collect().images
        assert images is not None, "decoded by default"
        write_picture(images, generation, path)
        say(f"step {step}: {path}")
        return ()

    return preview


def write_preview(generation: Generation, out: str | Path) -> Path:
    """The first images that `save.write` put into `out` as one picture next to it."""
    out, seeds = Path(out), generation.seeds[:COUNT]
    if out.suffix == ".npz":
        images = next(read_images(out, rows=len(seeds)))
    else:
        images = np.stack([read_png(png_path(out, seed)) for seed in seeds])
    path = out.with_name(f"{out.stem}-preview.png")
    write_picture(torch.from_numpy(images).permute(0, 3, 1, 2), generation, path)
    return path


def write_picture(images: Tensor, generation: Generation, path: Path) -> None:
    """The first images of a generation as a picture, with a JSON file of how they were made."""
    names, count = generation.model.class_names, len(images)
    labels = None if generation.labels is None else generation.labels[:count]
    write_bytes(path, picture(images, labels, names))
    meta = {"seeds": generation.seeds[:count], "labels": labels, "class_names": names}
    write_json(path.with_suffix(".json"), meta | {"settings": generation.settings})


def spread(num_classes: int, count: int = COUNT) -> list[int] | None:
    """`count` classes: all in turn, or evenly chosen where there are more; None: unconditional."""
    if not num_classes:
        return None
    if num_classes <= count:
        return [i % num_classes for i in range(count)]
    return [i * num_classes // count for i in range(count)]


def picture(
    images: Tensor,
    labels: Sequence[int] | None = None,
    names: Sequence[str] = (),
    *,
    columns: int = 4,
    gap: int = 4,
) -> bytes:
    """Images uint8 (N, 3, H, W) row by row as PNG, captioned by the name or number of their class.

    Gaps and the ground of captions are transparent, the letters a grey that reads on light and on
    dark pages. Captions are cut to the image's width; images narrower than `SMALLEST` are enlarged
    by a whole factor for them.
    """
    from PIL import Image, ImageDraw, ImageFont

    captions = [names[y] if names else f"class {y}" for y in labels or ()]
    factor, below = (-(-SMALLEST // images.shape[-1]), CAPTION) if captions else (1, 0)
    width, height = factor * images.shape[-1], factor * images.shape[-2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + below + gap) - gap)
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().contiguous().numpy()):
        left, top = (i % columns) * (width + gap), (i // columns) * (height + below + gap)
        cell = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(cell, (left, top))
        if captions:
            text = captions[i]
            while len(text) > 1 and draw.textlength(text, font=font) > width:
                text = text.removesuffix("…")[:-1] + "…"
            middle = (left + width // 2, top + height + below // 2)
            draw.text(middle, text, GREY, font, anchor="mm")
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
