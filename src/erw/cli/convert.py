"""`erw convert`: weights in a released layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from erw.cli.settings import Parser, add_settings, changed
from erw.config import to_dict
from erw.interop.layouts import LAYOUTS


@dataclass(frozen=True)
class Read:
    """How the input is read.

    Attributes:
        layout: of the input; auto tells it from keys and shapes.
        which: averaged or plain weights, where a training checkpoint has both.
        num_heads: attention heads, where neither width nor shapes say it.
        input_size: side of the latent, where the file does not say it or another is wanted.
        depth: blocks of the full model, for a warm-up's file.
        prediction: of a flow model whose file does not say it: velocity, noise, score or x.
        path_type: linear, cosine (SiT's GVP) or vp, likewise; both are kept beside the weights.
    """

    layout: Literal["auto", "dit", "sit", "repa", "erw", "reg", "lightningdit", "diffusers-dit"] = (
        "auto"
    )
    which: Literal["ema", "model"] = "ema"
    num_heads: int | None = None
    input_size: int | None = None
    depth: int | None = None
    prediction: str | None = None
    path_type: str | None = None


def convert(args: Sequence[str]) -> None:
    """Write weights in a released layout; says what was read."""
    what = (
        "IN: a .pt, .pth, .bin or .safetensors file, a diffusers DiT folder, or a run's folder. "
        "OUT: a file; its ending picks the format."
    )
    parser = Parser("erw convert", what, usage="IN OUT --to LAYOUT [--SETTING VALUE ...]")
    parser.add_argument("source", metavar="IN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of the output")
    add_settings(parser, Read())
    found = parser.read(args)
    how = changed(Read(), found)
    from erw.interop.convert import convert as go

    origin = go(found.source, found.out, to=found.to, **to_dict(how))
    print(f"{found.source}: {origin}\n{found.out}: {found.to}")
