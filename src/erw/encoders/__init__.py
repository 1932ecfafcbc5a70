"""Frozen parts: vision encoders (images to patch tokens) and VAEs (images to latents and back)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
