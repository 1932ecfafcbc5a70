"""Frozen parts: vision encoders (images to patch tokens) and VAEs (images to latents and back)."""

from .base import Encoder
from .own import ModuleEncoder
from .registry import load_encoder
from .vae import VAE, load_vae

__all__ = ["VAE", "Encoder", "ModuleEncoder", "load_encoder", "load_vae"]
