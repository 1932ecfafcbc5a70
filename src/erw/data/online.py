"""Training without a cache: a folder that reads like one, but encodes what is asked for each time.

It holds one file, `online.json`: where the images are and what a cache of them would be made with.
`Cache.open` gives an `Online` for it, so nothing else needs to know.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erw.data.cache import Batch, Cache
from erw.data.images import Unreadable, crop
from erw.data.manifest import VERSION, Manifest
from erw.data.settings import describe, differences, load_networks, weight_hash
from erw.data.shards import hash_file
from erw.data.sources import BUILT_IN, HUB, Source, open_source
from erw.data.sources import where as place
from erw.errors import CacheError, ConfigError, DataError
from erw.io import write_text
from erw.rng import seeded

ONLINE = "online.json"


class Online(Cache):
    """A `Cache` whose rows are decoded, cropped and encoded when they are read.

    VAE and encoders are loaded on first use and live on the GPU if there is one; an encoder whose
    features are not asked for does not run. A row is the same for any batch, up to the rounding of
    the networks (bfloat16 unless told otherwise).
    """

    threads = 1  # its networks are run by

    def __init__(self, path: Path, told: dict[str, Any], source: Source) -> None:
        settings = told["settings"]
        classes = max(1, len(source.class_names))
        manifest = Manifest(
            version=VERSION,
            settings=settings,
            rows=len(source),
            rejected=0,
            class_names=tuple(source.class_names),
            class_counts=(0,) * classes,
            latent_shape=tuple(settings["latent_shape"]),
            latent_mean=(),
            latent_std=(),
            fidelity={},
            shards=(),
        )
        super().__init__(path, manifest)
        self.source, self._told = source, told
        self._parts: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="online")

    @classmethod
    def open(cls, path: str | Path) -> "Online":
        """Open a folder that `write` made. `CacheError` if the images are not those any more."""
        path = Path(path).expanduser()
        try:
            told = json.loads((path / ONLINE).read_text())
            where, options, settings = told["where"], told["options"], told["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path / ONLINE} is damaged ({error}): make it again") from error
        source = open_source(where, **options)
        if source.fingerprint() != settings["source"]["fingerprint"]:
            raise CacheError(
                f"the images of {where} have changed since {path} was made: make another"
            )
        return cls(path, told, source)

    @cached_property
    def identity(self) -> str:
        """A hash of where the images are, what they are and how they are encoded."""
        return hash_file(self.path / ONLINE)[:32]

    @property
    def encoded(self) -> int:
        """No bound: every image of every step is encoded, however often it was before."""
        return 1 << 62

    def verify(self) -> list[str]:
        """Nothing is stored, so nothing is damaged."""
        return []

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        *,
        features: Sequence[str] = (),
        token: str = "",
        flipped: np.ndarray | None = None,
    ) -> Batch:
        """As `Cache.read`. Raises `DataError` for an image that cannot be read."""
        turn = flipped is not None and bool(flipped.any())
        self.require(encoders=features, token=token, flip=turn)
        images, labels = self._images(indices)
        if flipped is not None:
            turned = torch.from_numpy(np.asarray(flipped))
            images[turned] = images[turned].flip(-1)
        vae = self._part("vae")
        mean, std = self._encode(vae.encode, images)[0].chunk(2, 1)
        shift, scale = vae.scaling
        mean, std = (mean - shift) * scale, std * scale
        given = {}
        for name in {*features, token} - {""}:
            part = self._part(name)
            given[name] = self._encode(part.both if name == token else part, images)
        whole = given[token][1] if token else None
        tokens = tuple(given[name][0] for name in features)
        return Batch(mean, std, labels.to(mean.device), tokens, whole)

    def read_stored(self, *args: Any, **options: Any) -> Any:
        """As `read`: nothing is stored, and the features are on the device already."""
        return self.read(*args, **options)

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The cropped images, uint8 (B, 3, H, W)."""
        return self._images(indices)[0]

    def items(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Numbers of these rows' images in the source: the same."""
        return np.asarray(indices, dtype=np.int64)

    def _images(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        settings = self.manifest.settings

        def load(index: int) -> tuple[np.ndarray, int]:
            try:
                image, label = self.source[index]
                seed = seeded(settings["seed"], index)
                return crop(image, self.image_size, kind=settings["crop"], seed=seed), label
            except Unreadable as error:
                raise DataError(
                    f"{place(self.source, index)}: {error}; take it out, or prepare without "
                    "--online, which lists and skips such images"
                ) from error

        loaded = list(self._pool.map(load, [int(index) for index in indices]))
        size = self.image_size
        pixels = (
            np.stack([image for image, _ in loaded]) if loaded else np.empty((0, size, size, 3))
        )
        images = torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor([label for _, label in loaded], dtype=torch.int64)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, network: Any, images: Tensor) -> tuple[Tensor, ...]:
        device = self._device
        low = self.manifest.settings["precision"] == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            out = network(images.to(device))
        return tuple(x.float() for x in (out if isinstance(out, tuple) else (out,)))

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _part(self, name: str) -> Any:
        """The VAE or an encoder, loaded once, with the weights that the settings tell."""
        if name not in self._parts:
            from erw.encoders import load_encoder, load_vae

            device, settings = str(self._device), self.manifest.settings
            part: Any
            if name == "vae":
                part, told = load_vae(self._told["vae"], device=device), settings["vae"]
            else:
                part = load_encoder(self._told["encoders"][name], device=device)
                told = next(e for e in settings["encoders"] if e["name"] == name)
            if weight_hash(part) != told["weight_hash"]:
                raise CacheError(f"{self.path} was made with other weights of {told['name']}")
            self._parts[name] = part
        return self._parts[name]


def write(
    where: str | Path,
    out: str | Path,
    *,
    vae: str,
    encoders: Sequence[str] = (),
    image_size: int,
    crop: str = "adm",
    class_token: bool = False,
    flip: bool = False,
    precision: str = "bfloat16",
    seed: int = 0,
    **options: Any,
) -> Online:
    """Make a folder that reads like a cache of these images but encodes while training.

    Arguments are those of `prepare`, by name since they are loaded again for every run; `options`
    are those of `open_source`. Raises `CacheError` if `out` holds something else.
    """
    out = Path(out).expanduser()
    if not all(isinstance(part, str) for part in (vae, *encoders)):
        raise ConfigError("encoding online needs VAE and encoders by name: they are loaded again")
    if str(where) in BUILT_IN:
        options["seed"] = seed
    elif not str(where).startswith(HUB):
        where = Path(where).expanduser().absolute()
    where = str(where)
    source = open_source(where, **options)
    networks = load_networks(vae, encoders, precision=precision, device="cpu")
    if networks.vae.scale is None:
        raise ConfigError(
            f"VAE {networks.vae.name} is scaled by what is measured while a cache is stored: leave "
            "--online out, or put its statistics beside the weights"
        )
    settings = describe(
        source, networks, image_size=image_size, crop=crop, rows_per_shard=1, seed=seed,
        class_token=class_token, flip=flip, images=True,
    )  # fmt: skip
    names = {e.name: name for e, name in zip(networks.encoders, encoders, strict=True)}
    told = {"where": where, "options": options, "vae": vae, "encoders": names, "settings": settings}
    path = out / ONLINE
    if path.exists():
        changed = differences(json.loads(path.read_text())["settings"], settings)
        if changed:
            raise CacheError(f"{out} was made with other settings: {', '.join(changed)}")
        return Online.open(out)
    if out.is_dir() and any(out.iterdir()):
        raise CacheError(f"{out} is not empty: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(told, indent=1, sort_keys=True) + "\n")
    return Online.open(out)
