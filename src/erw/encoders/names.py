"""Encoders and VAEs by name, known without torch: widths, and where weights come from."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def known(kind: str) -> dict[str, Any]:
    """A table of `hub.toml`, such as "encoders" or "vaes"."""
    return tomllib.loads((FOLDER / "hub.toml").read_text("utf-8"))[kind]


HUB: dict[str, str] = known("encoders")  # name -> weights
# name -> folder, of the VAEs that come with the package
SHIPPED = {path.parent.name: path.parent for path in FOLDER.glob("weights/*/config.json")}
# channels of the patch tokens by the size in the name of an entry of `HUB`
SIZES = {"s": 384, "b": 768, "l": 1024, "h": 1280, "g": 1536, "so400m": 1152}


def described() -> Iterator[tuple[str, int, str]]:
    """Every encoder by name, the width of its patch tokens, and where its weights are from."""
    for name, width in known("widths").items():
        file = name.startswith("mocov3")
        yield name, width, f"RCG's file, as {name}=FILE" if file else "installed (here)"
    for name, hub in HUB.items():
        size = "l" if name == "convnextv2-b" else re.sub("-(reg|336)$", "", name).split("-")[1]
        yield name, SIZES[size], hub + " (here)" * in_hub_cache(hub)
    for name, folder in SHIPPED.items():
        channels = json.loads((folder / "config.json").read_text())["block_out_channels"]
        yield f"vae:{name}", channels[-1], "installed (here)"


def at_hand() -> list[str]:
    """The encoders whose weights are on this machine."""
    return [name for name, _, origin in described() if origin.endswith("(here)")]


def in_hub_cache(hub: str) -> bool:
    """Whether weights of OWNER/NAME[@REVISION] are in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache as find

    repo, _, revision = hub.partition("@")
    names = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
    return any(isinstance(find(repo, name, revision=revision or None), str) for name in names)
