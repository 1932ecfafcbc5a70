"""`erw convert`: weights in a released layout."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from erw.cli.settings import Settings, required

Layout = Literal["auto", "dit", "sit", "repa", "erw", "reg", "lightningdit", "diffusers-dit"]


@dataclass(frozen=True)
class Read:
    """How the input is read."""

    layout: Layout = "auto"  # of the input; auto detects it from keys and shapes
    which: Literal["ema", "model"] = "ema"  # averaged or plain weights, where a file has both
    num_heads: int | None = None  # attention heads, where neither width nor shapes say it
    input_size: int | None = None  # side of the latent, for a file without it or a new resolution
    depth: int | None = None  # blocks of the full model, for a warm-up's file
    prediction: str | None = None  # velocity, noise, score or x, if a flow model does not say it
    path_type: str | None = None  # linear, cosine (SiT's GVP) or vp, likewise


def convert(
    source: Annotated[Positional[str], arg(metavar="IN")],
    out: Annotated[Positional[str], arg(metavar="OUT")],
    read: Settings[Read],
    *,
    to: str,
) -> None:
    """Write weights in a released layout.

    Args:
        source: a .pt, .pth, .bin or .safetensors file, a diffusers DiT folder, or a run's folder.
        out: a file; its ending picks the format.
        to: layout of the output: dit, diffusers-dit, sit, repa, erw, reg or lightningdit.
    """
    required(source)
    from erw.interop.convert import convert as write

    print(f"{source}: {write(source, out, to=to, **asdict(read))}\n{out}: {to}")
