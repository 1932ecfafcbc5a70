"""Sources of images, the cache of latents and features, and what reads it."""

import lazy_loader

BUILT_IN = ("openmoji", "openmoji-test")  # names of the built-in sets of images

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
