"""The frozen networks of a cache: loaded, described, and run to the same bytes on any cores.

On a CPU the result of an operation may depend on how many threads share it. So none does: a batch
is cut into pieces of fixed size, each encoded by one thread.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from erw.data.images import WHITE
from erw.data.manifest import CacheSpec, EncoderSpec, SourceSpec, VaeSpec
from erw.data.quantize import FORMATS
from erw.data.sources import Source
from erw.encoders.base import counted_flops
from erw.errors import ConfigError
from erw.io import weight_hash

PIECE = 4  # images: enough for a matrix product, few enough for a core's cache


class Networks:
    """VAE (None where only features are made) and encoders, loaded where they are given by name."""

    def __init__(self, vae: Any, encoders: Sequence[Any], *, precision: str, device: str) -> None:
        from erw.encoders import load_encoder, load_vae

        if precision not in ("float32", "bfloat16"):
            raise ConfigError(f"unknown precision {precision!r}: choose float32 or bfloat16")
        self.precision, self.device = precision, device
        self.vae = load_vae(vae, device=device) if isinstance(vae, str) else vae
        loaded = [load_encoder(e, device=device) if isinstance(e, str) else e for e in encoders]
        self.encoders = {encoder.name: encoder for encoder in loaded}
        if len(self.encoders) < len(loaded):
            raise ConfigError(f"an encoder is named twice: {', '.join(e.name for e in loaded)}")

    @torch.no_grad()
    def run(
        self, network: Any, images: Tensor, labels: Tensor, pool: ThreadPoolExecutor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs of a network, float32, for uint8 images (B, 3, H, W) and their labels (B,).

        On a CPU piece by piece in the threads of a pool of `one_thread_each`.
        """
        device = torch.device(self.device).type
        if pool and device == "cpu":
            pieces = pool.map(partial(self.run, network), images.split(PIECE), labels.split(PIECE))
            return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            labelled = getattr(network, "class_names", None) is not None
            out = network(*(x.to(self.device) for x in (images, labels)[: 1 + labelled]))
        return tuple(x.float() for x in (out if isinstance(out, tuple) else (out,)))


def cache_spec(
    source: Source, networks: Networks, *, features: str | None = None, class_token: bool,
    like: CacheSpec | None = None, **settings: Any,
) -> CacheSpec:  # fmt: skip
    """The spec of a cache; `settings`: those of `prepare` that are fields of a `CacheSpec`. Raises
    ConfigError for an impossible one."""
    vae, size = networks.vae, settings["image_size"]
    if size < vae.factor or size % vae.factor:
        raise ConfigError(f"image size {size} is no multiple of {vae.factor}, as {vae.name} needs")
    if settings["rows_per_shard"] < 1:
        raise ConfigError(f"rows_per_shard is {settings['rows_per_shard']}: expected at least 1")
    one = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=networks.device)
    flops, factor = counted_flops(lambda: vae.encode(one)), vae.factor
    scale, shift = _plain(vae.scale), _plain(vae.shift)
    return CacheSpec(
        source=SourceSpec(source.name, source.fingerprint(), len(source)),
        background=WHITE,
        crop="adm",
        precision=networks.precision,
        latent_shape=(vae.channels, size // factor, size // factor),
        vae=VaeSpec(vae.name, vae.weight_hash, factor, scale, shift, flops, vae.revision),
        encoders=encoder_specs(source, networks, size, features, class_token, like),
        **settings,
    )


def encoder_specs(
    source: Source, networks: Networks, size: int, features: str | None, class_token: bool,
    like: CacheSpec | None,
) -> tuple[EncoderSpec, ...]:  # fmt: skip
    """The encoders' part of a spec, for images of `size` pixels. `features` is one of `FORMATS`, or
    None: as in the cache `like`, else float16. Class tokens are stored with `class_token`, and
    where `like` has them."""
    if features not in (None, *FORMATS):
        raise ConfigError(f"unknown features {features!r}: choose one of {', '.join(FORMATS)}")
    encoders = networks.encoders.values()
    if class_token and not any(encoder.dim_class for encoder in encoders):
        names = ", ".join(networks.encoders) or "no encoder"
        raise ConfigError(f"{names} has no class token to store: name one that has, as dinov2-b")
    before, specs = {encoder.name: encoder for encoder in (like.encoders if like else ())}, []
    for encoder in encoders:
        if encoder.class_names not in (None, tuple(source.class_names)):
            raise ConfigError(f"{encoder.name} is of other classes: leave out its :SCALE")
        old, weights = before.get(encoder.name), weight_hash(encoder)
        token = encoder.dim_class if class_token or (old and old.class_dim) else 0
        flops, form = encoder.flops(size, both=token > 0), features or (old and old.format)
        specs.append(EncoderSpec(
            encoder.name, weights, encoder.dim, encoder.grid(size), flops, form or "float16", token,
            encoder.revision,
        ))  # fmt: skip
    return tuple(specs)


def _plain(values: Tensor | None) -> Any:
    """Numbers per channel, or one for all, for JSON; None where the cache measures it."""
    numbers = () if values is None else tuple(values.double().flatten().tolist())
    return numbers if len(numbers) > 1 else next(iter(numbers), None)
