"""`erw export`: a folder that diffusers or another erw loads."""

from __future__ import annotations

from collections.abc import Sequence

from erw.cli.convert import Read
from erw.cli.settings import Parser, add_settings
from erw.config import to_dict
from erw.errors import ConfigError
from erw.interop.export import FORMATS


def export(args: Sequence[str]) -> None:
    """Write a folder that diffusers or another erw loads, and push it to the hub if asked to."""
    what = (
        "SOURCE: a run's folder, a folder exported before, or a released checkpoint of a flow "
        "model, which the settings below say how to read."
    )
    usage = "SOURCE --out DIR [--format FORMAT] [--push OWNER/NAME]"
    parser = Parser("erw export", what, usage=usage)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--out", metavar="DIR", help="a new folder; with --push: SOURCE-export")
    parser.add_argument("--format", choices=FORMATS, help=f"[{FORMATS[0]}]")
    parser.add_argument("--vae", metavar="NAME", help="another VAE than the model's own")
    parser.add_argument("--checkpoint", metavar="WHICH", help="of a run: last, best or a step")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="the new repository is private")
    add_settings(parser, Read())
    found = parser.read(args)
    known = {"format", "vae", "checkpoint", *to_dict(Read())}
    how = {k: v for k, v in vars(found).items() if k in known and v is not None}
    from erw.interop import push_to_hub
    from erw.interop.export import export as go

    if found.push:
        private = found.private or None
        print(push_to_hub(found.source, found.push, out=found.out, private=private, **how))
    elif found.out is None:
        raise ConfigError("--out is missing: the folder to write, or --push OWNER/NAME")
    else:
        print(go(found.source, found.out, **how))
