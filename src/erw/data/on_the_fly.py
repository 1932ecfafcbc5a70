"""Training without a cache: a folder that reads like one, but encodes images when they are read.

It holds one file, `online.json`: where the images are and the spec of a cache of them.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erw.config import from_dict
from erw.data.cache import Cache, Part, Rows
from erw.data.manifest import CacheSpec, Manifest
from erw.data.networks import Networks, cache_spec
from erw.data.sources import BUILT_IN, HUB, open_source
from erw.data.writer import cropped
from erw.errors import CacheError, ConfigError, DataError, raised_as
from erw.io import hash_file, weight_hash, write_json

ONLINE = "online.json"


@dataclass(frozen=True)
class Recipe:
    """Contents of `online.json`. `where`, `options`: as `open_source` takes them; `encoders`: name
    in the spec -> as `load_encoder` takes it."""

    where: str
    options: dict
    vae: str
    encoders: dict[str, str]
    settings: CacheSpec


class Online(Cache):
    """A `Cache` whose rows are decoded, cropped and encoded when they are read. The folder is made
    by `write`. Raises `CacheError` where the images have changed.

    VAE and encoders are loaded on first use, on the GPU if there is one; batches lie there. A row
    is the same in any batch, up to the networks' rounding.
    """

    threads = 1  # the encoders already use every core

    def __init__(self, path: Path) -> None:
        file = path / ONLINE
        with raised_as(CacheError, f"{file} is damaged: make it again"):
            values = json.loads(file.read_text())
            spec = CacheSpec.from_json(values["settings"])
            self._recipe = recipe = from_dict(Recipe, values | {"settings": spec})
            if spec.vae.scale is None or [e.name for e in spec.encoders] != list(recipe.encoders):
                raise ValueError("its VAE or encoders are not those of its settings")
        with raised_as(CacheError, f"the images that {file} names are not found, make it again"):
            self.source = source = open_source(recipe.where, **recipe.options)
        if source.fingerprint() != spec.source.fingerprint:
            raise CacheError(f"the images of {recipe.where} have changed: make another {path}")
        names, counts = tuple(source.class_names), source.class_counts()
        manifest = Manifest(spec, len(source), 0, names, (), (), (), counts)
        super().__init__([Part(str(path), manifest, hash_file(file)[:32], lambda _: file)])
        self.encoded = 1 << 62  # every image of every step
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="crop")

    def columns(
        self, names: Sequence[str], indices: Rows, flipped: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """As `Cache.columns`, in float32 as the networks give them; those that are not named do not
        run. Raises DataError for a bad image."""
        item = torch.tensor(np.asarray(indices, dtype=np.int64))
        pixels, labels = zip(*self._pool.map(self._load, item.tolist()), strict=True)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        columns = {"item": item, "label": torch.tensor(labels), "image": images}
        if flipped is not None:
            mirrored = torch.from_numpy(flipped)[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        run = partial(self._networks.run, images=images, labels=columns["label"])
        if "moments" in names:
            (columns["moments"],) = run(self._networks.vae.encode)
        for name in self.features:
            token = f"class.{name}" in names
            if token or f"features.{name}" in names:
                encoder = self._networks.encoders[name]
                outputs = run(encoder.both if token else encoder)
                columns |= zip((f"features.{name}", f"class.{name}"), outputs, strict=False)
        return {name: columns[name] for name in names}

    def _load(self, index: int) -> tuple[np.ndarray, int]:
        bad = f"{self.source.location(index)}: take it out, or prepare without --online"
        with raised_as(DataError, bad):
            return cropped(self.source, index, self.spec)

    @cached_property
    def _networks(self) -> Networks:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vae, encoders = self._recipe.vae, [*self._recipe.encoders.values()]
        networks = Networks(vae, encoders, precision=self.spec.precision, device=device)
        specs: tuple[Any, ...] = (self.spec.vae, *self.spec.encoders)
        for spec, network in zip(specs, (networks.vae, *networks.encoders.values()), strict=True):
            if weight_hash(network) != spec.weight_hash:
                raise CacheError(f"{self.path} was made with other weights of {spec.name}")
        return networks


def write(
    source: str | Path, out: str | Path, *, vae: str, encoders: Sequence[str] = (), image_size: int,
    class_token: bool = False, flip: bool = False, precision: str = "bfloat16", seed: int = 0,
    **options: Any,
) -> Online:  # fmt: skip
    """Make a folder that reads like a cache of these images but encodes while training.

    Arguments are those of `prepare`, networks by name; further `options` go to `open_source`.
    Raises CacheError where `out` holds something else, ConfigError for a VAE without a scale.
    """
    out = Path(out).expanduser()
    if str(source) in BUILT_IN:
        options["seed"] = seed
    elif not str(source).startswith(HUB):
        source = Path(source).expanduser().absolute()
    images = open_source(str(source), **options)
    networks = Networks(vae, encoders, precision=precision, device="cpu")
    if networks.vae.scale is None:
        raise ConfigError(f"VAE {networks.vae.name} is scaled by measuring: leave --online out")
    spec = cache_spec(
        images, networks, image_size=image_size, class_token=class_token, flip=flip, seed=seed,
        rows_per_shard=1, images=True,
    )  # fmt: skip
    if not (out / ONLINE).exists():
        if out.is_dir() and any(out.iterdir()):
            raise CacheError(f"{out} is not empty: choose another folder")
        names = dict(zip(networks.encoders, encoders, strict=True))
        settings = {"where": str(source), "options": options, "vae": vae, "encoders": names}
        write_json(out / ONLINE, settings | {"settings": asdict(spec)})
    online = Online(out)
    if changed := online.spec.differences(spec):
        raise CacheError(f"{out} was made with other settings: {', '.join(changed)}")
    return online
