"""`erw export`: a folder that diffusers or another erw loads."""

from dataclasses import asdict
from typing import Annotated

from tyro.conf import Positional, arg

from erw.cli.convert import Read
from erw.cli.settings import Settings, required
from erw.errors import ConfigError


def export(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    read: Settings[Read],
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
    required(source)
    from erw.interop.export import export as write
    from erw.interop.export import push_to_hub

    # An exported folder and a run refuse options that they do not need: only what was given.
    options = {name: value for name, value in asdict(read).items() if value != getattr(Read, name)}
    given = {"format": format, "vae": vae, "checkpoint": checkpoint}
    options |= {k: v for k, v in given.items() if v not in ("", "diffusers", "last")}
    if push:
        print(push_to_hub(source, push, out=out, private=private or None, **options))
    elif out is None:
        raise ConfigError("--out is missing: the folder to write, or --push OWNER/NAME")
    else:
        print(write(source, out, **options))
