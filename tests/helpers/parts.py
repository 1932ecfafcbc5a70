"""Small real parts for the tests of the data's way: a VAE folder, image folders, a cache."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from PIL import Image

from erw.data import Cache
from erw.data.prepare import prepare
from erw.encoders import load_encoder, load_vae

CLASSES = ("apple", "bear", "cup")
ENCODER = "efficientnet-lite0@64"


def vae_folder(folder: Path) -> Path:
    """A tiny AutoencoderKL of factor 4 with random weights, as diffusers saves it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    network.save_pretrained(folder)
    return folder


def picture(number: int, *, height: int = 40, width: int = 52) -> np.ndarray:
    """Smooth colours that depend on the number, uint8 (height, width, 3)."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(6 * (x * np.cos(number + k) + y * np.sin(number + k))) for k in range(3)]
    return ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)


def photos(folder: Path, *, each: int = 8) -> Path:
    """A folder of three class folders with `each` images, JPEG and PNG in turn."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            image = Image.fromarray(picture(label * each + i))
            image.save(folder / name / f"{i:03d}.{'jpg' if i % 2 else 'png'}")
    return folder


def make(
    source: Any, out: Path, vae: Path | str, *, encoder: bool = False, **options: Any
) -> Cache:
    """`prepare` with settings that suit the parts above; 24 photos give 4 shards."""
    options = {"image_size": 32, "rows_per_shard": 7, "batch_size": 4, "progress": False} | options
    options.setdefault("encoders", [load_encoder(ENCODER)] if encoder else [])
    return prepare(source, out, vae=load_vae(vae), **options)


def files(cache: Path) -> dict[str, bytes]:
    """Every file that belongs to a cache's identity, by path inside."""
    found = {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


@dataclass(frozen=True)
class TwoCaches:
    """Two folders of images with caches `first` and `second` under `root`, and their VAE."""

    root: Path
    vae: Path
    folder: Path
    more: Path


def two_caches(root: Path) -> TwoCaches:
    """24 photos of three classes, 10 more of one of them and of a new one; a cache of each."""
    vae, folder, more = vae_folder(root / "vae"), photos(root / "set"), root / "more"
    for label, name in enumerate(("bear", "Zebra")):
        (more / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(picture(100 + label * 5 + i)).save(more / name / f"{i}.png")
    make(folder, root / "first", vae, encoder=True)
    make(more, root / "second", vae, encoder=True)
    return TwoCaches(root=root, vae=vae, folder=folder, more=more)


def write_checked(cache: Path, manifest: dict[str, Any]) -> None:
    """A manifest as somebody might have made it, with the hash that it ought to have."""
    checked = {key: value for key, value in manifest.items() if key != "check"}
    checked["check"] = blake3(json.dumps(checked, sort_keys=True).encode()).hexdigest()
    (cache / "manifest.json").write_text(json.dumps(checked))
