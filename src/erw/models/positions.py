"""Where a token is: frozen sin-cos tables added to the tokens, and rotary ones for queries and
keys."""

import torch
from torch import Tensor


def sincos_2d(width: int, grid: int) -> Tensor:
    """Frozen 2-D sin-cos positions (grid * grid, width), row-major.

    The first half of the channels holds the column, the second the row, each as sines then cosines
    of width / 4 frequencies (MAE, arXiv 2111.06377; DiT and SiT use the same).
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")

    def one_axis(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1).double() * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    return torch.cat([one_axis(columns), one_axis(rows)], dim=1).float()


def rope_2d(head_dim: int, grid: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (grid * grid, head_dim) of axial rotary positions.

    EVA-02's form (arXiv 2303.11331), also LightningDiT's: the first half of a head turns with the
    row, the second with the column; channels 2i and 2i + 1 form a pair that turns by one angle.
    """
    half = head_dim // 2
    omega = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angle = torch.cat([p.reshape(-1, 1).double() * omega for p in (rows, columns)], dim=1)
    angle = angle.repeat_interleave(2, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved channel pairs of x (B, heads, T, head_dim) by the angles of
    `rope_2d`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of times (B,): cosines, then sines, periods up to 10,000."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) / half * steps)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
