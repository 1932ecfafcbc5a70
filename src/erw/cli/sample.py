"""`erw sample`: images out of a run; what other verbs need for that too."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from erw.cli.settings import Parser, add_settings, changed
from erw.config import Sample, nearest, to_dict
from erw.errors import ConfigError

if TYPE_CHECKING:
    from erw.sampling import Generation
    from erw.training import Trained

BUILT_IN = "openmoji"


@dataclass(frozen=True)
class Draw:
    """What to draw, besides the sampler's settings.

    Attributes:
        seeds: one image each, such as 0:16 or 3,5,8:10.
        labels: a class or one per seed, by number or name; random: drawn by seed; none: the
            classes in turn.
        autoguidance: guide away from this weaker model (a run, one of its checkpoints, or a
            released file) in place of the null class.
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


def sample(args: Sequence[str]) -> None:
    """Draw images from a run or a released file; the same command makes what is missing."""
    model, found = trained("sample", args, out="a folder of PNGs, or a file ending in .npz")
    from erw.dist import world
    from erw.log import Console
    from erw.sampling import write

    drawing = generation(model, found)
    if found.dry_run:
        print("\n".join(f"{name:<14}{value}" for name, value in drawing.settings.items()))
        print(f"{'images':<14}{len(drawing)}")
        return
    console, done = Console(f"sample {drawing.settings['recipe']}"), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        console.step(done, len(drawing))

    with world() as here:
        made = write(drawing, found.out, progress=progress)
        if here.first:
            print(made)
        if found.preview and here.first:
            from erw.sampling.preview import write_preview

            print(write_preview(drawing, found.out))


def trained(verb: str, args: Sequence[str], *, out: str) -> tuple[Trained, Any]:
    """The model named first in `args`, loaded, and the options after it; defaults are its own."""
    usage = "RUN --out PATH [--SETTING VALUE ...]"
    what = (
        "RUN: the folder that `erw train` wrote, one of its checkpoints, a file of `erw ema`, or a "
        "released checkpoint."
    )
    own = Sample()
    model = None
    if args and not args[0].startswith("-"):
        model = opened(args)
        own = model.run.sample if model.run else own
    parser = Parser(f"erw {verb}", what, usage=usage)
    parser.add_argument("--out", required=True, metavar="PATH", help=out)
    parser.add_argument("--dry-run", action="store_true", help="print all settings, draw nothing")
    parser.add_argument("--preview", action="store_true", help="also the first 16 as one picture")
    add_settings(parser, own)
    add_settings(parser, Draw())
    if model is None:
        if set(args) & {"-h", "--help"}:
            parser.parse_args(["--help"])
        raise ConfigError(f"erw {verb} needs a run first: the folder that `erw train` wrote")
    return model, parser.read(args[1:])


def opened(args: Sequence[str]) -> Trained:
    """The model named first in `args`, with the weights that `--checkpoint` among them names."""
    from erw.interop import open_model

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("checkpoint", "layout"):
        default = getattr(Draw, name)
        parser.add_argument(f"--{name}", nargs="?", default=default, const=default)
    found = vars(parser.parse_known_args(args[1:])[0])
    return open_model(args[0], **found, device=pick_device("auto"))


def generation(model: Trained, found: Any, draw: Draw = Draw()) -> Generation:
    """What the options ask `erw.generate` for; `draw` has the values of those not given."""
    from erw.interop import open_model
    from erw.sampling import generate

    how = changed(model.run.sample if model.run else Sample(), found)
    what = changed(draw, found)
    seeds = numbers(what.seeds, name="--seeds")
    if what.rdm:
        model = _with_rdm(model, what.rdm)
    labels: Any = what.labels
    if labels not in (None, "random"):
        given = [_label(text, model.class_names) for text in labels.split(",")]
        labels = given[0] if len(given) == 1 else given
    weak = what.autoguidance
    return generate(
        model,
        seeds,
        labels,
        **to_dict(how),
        autoguidance=open_model(weak, device=pick_device("auto")) if weak else None,
        batch_size=what.batch_size,
        precision=what.precision,
        compile=what.compile,
        vae=what.vae,
    )


def _with_rdm(model: Trained, path: str) -> Trained:
    """The run with its representations from the run at `path`."""
    from erw.training import Trained as Run
    from erw.training.trained import fitting_rdm, load

    if not (isinstance(model, Run) and model.run.model.class_token == "given"):
        raise ConfigError("--rdm is for a run that is given representations: leave it out")
    rdm = fitting_rdm(load(path, device=pick_device("auto")), model.run)
    return replace(model, rdm=rdm, class_names=rdm.class_names)


def numbers(text: str, *, name: str) -> list[int]:
    """3,5,8:10 -> [3, 5, 8, 9]. Raises ConfigError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?::(\d+))?", part.strip())):
            raise ConfigError(f"{name}: expected numbers and ranges such as 3,5,8:10, got {text!r}")
        first = int(match[1])
        found += range(first, int(match[2])) if match[2] else [first]
    return found


def pick_device(name: str) -> str:
    """`auto` as the device there is. Raises ConfigError for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try auto or cpu") from None
    return name


def _label(text: str, names: Sequence[str]) -> int:
    text = text.strip()
    if text.isdecimal():
        return int(text)
    if text not in names:
        raise ConfigError(f"--labels: no class {text!r}{nearest(text, names)}")
    return names.index(text)
