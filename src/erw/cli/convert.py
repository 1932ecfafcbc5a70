"""`erw convert`: weights in a released layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from erw.cli.settings import Settings, call


@dataclass(frozen=True)
class Read:
    """How the input is read.

    Attributes:
        layout: of the input; auto detects it from keys and shapes.
        which: averaged or plain weights, where a training checkpoint has both.
        num_heads: attention heads, where neither width nor shapes say it.
        input_size: side of the latent, where the file does not say it, or for another resolution.
        depth: blocks of the full model, for a warm-up's file.
        prediction: of a flow model whose file does not say it: velocity, noise, score or x.
        path_type: linear, cosine (SiT's GVP) or vp, likewise; both are saved with the weights.
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


def main(args: Sequence[str]) -> None:
    call("convert", convert, args)


def convert(
    source: Annotated[Positional[str], arg(metavar="IN")],
    out: Annotated[Positional[str], arg(metavar="OUT")],
    how: Settings[Read],
    *,
    to: str,
) -> None:
    """Write weights in a released layout.

    Args:
        source: a .pt, .pth, .bin or .safetensors file, a diffusers DiT folder, or a run's folder.
        out: a file; its ending picks the format.
        how: how the input is read.
        to: layout of the output: dit, diffusers-dit, sit, repa, erw, reg or lightningdit.
    """
    from erw.interop.convert import convert as write

    origin = write(source, out, to=to, **asdict(how))
    print(f"{source}: {origin}\n{out}: {to}")
