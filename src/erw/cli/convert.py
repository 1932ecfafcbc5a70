"""`erw convert` and `erw export`: weights in a released layout, or a folder for diffusers."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from erw.cli.settings import Settings
from erw.errors import ConfigError
from erw.interop.convert import convert as write_layout
from erw.interop.export import export as write_export
from erw.interop.export import push_to_hub

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
    how: Settings[Read],
    *,
    to: str,
) -> None:
    """Write weights in a released layout.

    Args:
        source: a .pt, .pth, .bin or .safetensors file, a diffusers DiT folder, or a run's folder.
        out: a file; its ending picks the format.
        to: layout of the output: dit, diffusers-dit, sit, repa, erw, reg or lightningdit.
    """
    print(f"{source}: {write_layout(source, out, to=to, **asdict(how))}\n{out}: {to}")


def export(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    how: Settings[Read],
    *,
    out: str | None = None,
    format: str = "diffusers",
    vae: str = "",
    checkpoint: str = "last",
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write a folder that diffusers or another erw loads, and push it to the hub.

    Args:
        source: a run's folder, an exported folder, or a released checkpoint, which the settings
            below say how to read.
        out: a new folder; with --push none: SOURCE-export.
        format: diffusers or safetensors.
        vae: another VAE than the model's own.
        checkpoint: of a run: last, best or a step.
        push: upload it to the Hugging Face hub as OWNER/NAME.
        private: the new repository is private.
    """
    # An exported folder and a run refuse options that they do not need: only what was given.
    options = {name: value for name, value in asdict(how).items() if value != getattr(Read, name)}
    given = {"format": format, "vae": vae, "checkpoint": checkpoint}
    options |= {k: v for k, v in given.items() if v not in ("", "diffusers", "last")}
    if push:
        print(push_to_hub(source, push, out=out, private=private or None, **options))
    elif out is None:
        raise ConfigError("--out is missing: the folder to write, or --push OWNER/NAME")
    else:
        print(write_export(source, out, **options))
