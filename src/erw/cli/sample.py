"""`erw sample`: images out of a run; what other verbs need for that too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from erw.cli.settings import Run, Settings, call, first, peek
from erw.config import Sample, nearest, to_dict
from erw.dist import current, world
from erw.errors import ConfigError
from erw.interop import open_model
from erw.log import Progress
from erw.sampling import Generation, generate, write
from erw.training import Trained


@dataclass(frozen=True)
class Draw:
    """What to draw, besides the sampler's settings.

    Attributes:
        seeds: one image each, such as 0:16 or 3,5,8:10.
        labels: a class or one per seed, by number or name; random: drawn by seed; none: the
            classes in turn.
        autoguidance: guide away from this weaker model (a run, one of its checkpoints, or a
            released file) instead of the null class.
        batch_size: images at once; does not change them.
        precision: bf16 runs the network under autocast.
        compile: torch.compile of the network's blocks; pays from some hundred images on.
        vae: decoder of the latents; none: the one that the run was trained with.
        rdm: run that makes the representations, for a run that is given them; none: rdm in its
            own folder.
        checkpoint: last; best, by the scores taken while training; or a step that the run keeps.
        layout: of a released file; auto tells it from keys and shapes.
    """

    seeds: str = "0:16"
    labels: str | None = None
    autoguidance: str | None = None
    batch_size: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    vae: str | None = None
    rdm: str | None = None
    checkpoint: str = "last"
    layout: str = "auto"


def main(args: Sequence[str]) -> None:
    with world():
        model = None
        if first("sample", args, "a run, or a released checkpoint,"):
            model = peek("sample", open_run, args)
        sampler = model.run.sample if model else Sample()
        call("sample", sample, args, {"model": model}, sampler=sampler)


def open_run(run: Run, *, checkpoint: str = "last", layout: str = "auto") -> Trained:
    """The model that the options name, on this process's device."""
    return open_model(run, checkpoint=checkpoint, layout=layout, device=current().device)


def sample(
    run: Run,
    sampler: Settings[Sample],
    draw: Settings[Draw],
    model: Trained,
    *,
    out: str,
    preview: bool = False,
    dry_run: bool = False,
) -> None:
    """Draw images from a run or a released file; the same command makes what is missing.

    Args:
        run: the folder that `erw train` wrote, one of its checkpoints, a file of `erw ema`, or a
            released checkpoint.
        sampler: how images are drawn.
        draw: which images.
        out: a folder of PNGs, or a file ending in .npz.
        preview: also the first 16 as one picture.
        dry_run: print all settings, draw nothing.
    """
    generation = generation_of(model, sampler, draw)
    if dry_run:
        print("\n".join(f"{name:<14}{value}" for name, value in generation.settings.items()))
        print(f"{'images':<14}{len(generation)}")
        return
    first = current().first
    title, count = f"sample {generation.settings['recipe']}", len(generation)
    with Progress(title, count, unit="images", quiet=not first) as progress:
        written = write(generation, out, progress=progress.update)
    if first:
        print(written)
    if first and preview:
        from erw.sampling.preview import write_preview

        print(write_preview(generation, written))


def generation_of(model: Trained, sampler: Sample, draw: Draw) -> Generation:
    """The images that the options ask `erw.generate` for."""
    device = current().device
    if draw.rdm:
        model = _with_rdm(model, draw.rdm)
    labels: Any = draw.labels
    if labels not in (None, "random"):
        numbers = [_label(text, model.class_names) for text in labels.split(",")]
        labels = numbers[0] if len(numbers) == 1 else numbers
    weak = open_model(draw.autoguidance, device=device) if draw.autoguidance else None
    return generate(
        model,
        seeds_of(draw.seeds),
        labels,
        **to_dict(sampler),
        autoguidance=weak,
        batch_size=draw.batch_size,
        precision=draw.precision,
        compile=draw.compile,
        vae=draw.vae,
    )


def _with_rdm(model: Trained, path: str) -> Trained:
    """The run with its representations from the run at `path`."""
    from erw.training.trained import fitting_rdm, load

    if model.run.model.class_token != "given":
        raise ConfigError("--rdm is for a run that is given representations: leave it out")
    rdm = fitting_rdm(load(path, device=current().device), model.run)
    return replace(model, rdm=rdm, class_names=rdm.class_names)


def seeds_of(text: str) -> list[int]:
    """3,5,8:10 -> [3, 5, 8, 9]. Raises ConfigError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?::(\d+))?", part.strip())):
            raise ConfigError(
                f"--seeds: expected numbers and ranges such as 3,5,8:10, got {text!r}"
            )
        start = int(match[1])
        seeds += range(start, int(match[2])) if match[2] else [start]
    return seeds


def _label(text: str, names: Sequence[str]) -> int:
    text = text.strip()
    if text.isdecimal():
        return int(text)
    if text not in names:
        raise ConfigError(f"--labels: no class {text!r}{nearest(text, names)}")
    return names.index(text)
