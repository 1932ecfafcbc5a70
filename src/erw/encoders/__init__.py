"""Frozen parts: vision encoders (images to patch tokens) and VAEs (images to latents and back)."""

from .base import Encoder
from .registry import load_encoder

__all__ = ["Encoder", "load_encoder"]
