"""Sources of images, the cache of latents and features, and what reads it."""

from erw.data.cache import Batch, Cache
from erw.data.loader import Loader, prefetch
from erw.data.sources import Source, open_source

__all__ = ["Batch", "Cache", "Loader", "Source", "open_source", "prefetch"]
