"""Frozen parts: vision encoders (images to patch tokens) and VAEs (images to latents and back)."""

from erw.encoders.base import Encoder
from erw.encoders.own import ModuleEncoder
from erw.encoders.registry import load_encoder
from erw.encoders.vae import VAE, load_vae

__all__ = ["VAE", "Encoder", "ModuleEncoder", "load_encoder", "load_vae"]
