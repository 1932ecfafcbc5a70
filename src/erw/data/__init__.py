"""Sources of images, the cache of latents and features, and what reads it."""

from .cache import Batch, Cache, FeatureSpec
from .loader import Loader, prefetch
from .prepare import prepare
from .sources import Source, open_source

__all__ = [
    "Batch",
    "Cache",
    "FeatureSpec",
    "Loader",
    "Source",
    "open_source",
    "prefetch",
    "prepare",
]
