"""A small representation autoencoder with random weights, as diffusers saves it."""

from pathlib import Path
from typing import Any

import torch

WIDTH, GRID, SIDE = 64, 4, 16


def rae(folder: Path, kind: str = "dinov2") -> Any:
    """Of 4 x 4 tokens of 64 channels for images of 16 px, with statistics for each place."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    patch = 14 if kind == "dinov2" else 8
    network = AutoencoderRAE(
        encoder_type=kind, encoder_hidden_size=WIDTH, encoder_patch_size=patch,
        encoder_num_hidden_layers=1, encoder_input_size=GRID * patch, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64,
        patch_size=SIDE // GRID, latents_mean=torch.randn(WIDTH, GRID, GRID),
        latents_std=0.5 + torch.rand(WIDTH, GRID, GRID), noise_tau=0.8,
    )  # fmt: skip
    network.save_pretrained(folder)
    return network.eval()
