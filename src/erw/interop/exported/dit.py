"""DiT for diffusers' DiTPipeline, as DiT itself has it."""

from typing import Any

from diffusers import DiTTransformer2DModel


class DiT(DiTTransformer2DModel):
    """diffusers' network with DiT's own time frequencies.

    They are 10000^(-i / 128); diffusers divides by 127, so that the same weights would be told
    other times. All else is equal, once `norm_eps` is 1e-6.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        return super().forward(*args, **kwargs)
