"""Train the small VAE that ships with erw on the composed OpenMoji images (train glyphs only).

    python scripts/train_vae.py --out src/erw/encoders/weights/openmoji-f4c4

Loss: L1 + mean squared error + distance of EfficientNet-Lite0's early features (normalised per
position, as in LPIPS, arXiv 1801.03924) + a small KL. The EMA weights are written in float16 in
the folder format of diffusers (latents_mean and latents_std in its config.json), and a sheet of
held-out originals over their reconstructions goes to --sheet.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.data.sources.openmoji import OpenMojiSet
from erw.encoders import load_encoder

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
    "sample_size": 64,
}
TAPS = (2, 4, 6)  # trunk modules (stem, activation, blocks): strides 2, 4 and 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--minutes", type=float, default=15.0, help="time to train")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=3e-6, help="weight of the KL, summed a pixel")
    parser.add_argument("--perceptual", type=float, default=0.3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="folder of a VAE to go on from")
    parser.add_argument("--sheet", type=Path, help="PNG of held-out reconstructions")
    return parser.parse_args()


def pixels(source: OpenMojiSet, start: int, count: int) -> Tensor:
    """Images start..start+count as float32 (count, 3, 64, 64) in [-1, 1]."""
    images = np.stack([source[i][0] for i in range(start, start + count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class Perceptual(nn.Module):
    """Squared distance of unit-length early features of EfficientNet-Lite0, summed over taps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = load_encoder("efficientnet-lite0").trunk[: max(TAPS) + 1]

    def features(self, x: Tensor) -> list[Tensor]:
        x, kept = (x * 127.5 + 0.5) / 128, []  # [-1, 1] -> (0..255 - 127) / 128
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in TAPS:
                kept.append(F.normalize(x.float(), dim=1))
        return kept

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(real)
        pairs = zip(self.features(made), wanted, strict=True)
        return sum((a - b).square().sum(1).mean() for a, b in pairs)


def rate(progress: float, peak: float) -> float:
    """Linear rise over the first 3% of the time, then a cosine to 1% of the peak."""
    if progress < 0.03:
        return peak * max(progress / 0.03, 0.02)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def train(args: argparse.Namespace) -> nn.Module:
    """Train for args.minutes on fresh compositions; returns the VAE with its EMA weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**CONFIG)
    if args.init:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.init).state_dict())
    vae.train()
    average = [p.detach().clone() for p in vae.parameters()]
    perceptual = Perceptual()
    optimiser = torch.optim.AdamW(
        vae.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    source = OpenMojiSet("train", count=10**9, seed=1000 + args.seed)
    began, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate(progress, args.lr)
        real = pixels(source, step * args.batch, args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(real).latent_dist
            made = vae.decode(posterior.sample()).sample.float()
            seen = perceptual(made, real)
        error = made - real
        kl = posterior.kl().mean() / (real.shape[-1] * real.shape[-2])
        loss = error.abs().mean() + error.square().mean() + args.perceptual * seen + args.kl * kl
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0, error_if_nonfinite=True)
        optimiser.step()
        step += 1
        decay = min(args.ema, step / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in vae.parameters()], 1 - decay)
        progress = (time.monotonic() - began) / (60 * args.minutes)
        if step % 50 == 0 or progress >= 1:
            psnr = -10 * math.log10(error.square().mean().item() / 4)
            print(
                f"step {step}  l1 {error.abs().mean():.4f}  psnr {psnr:.2f}  features {seen:.3f}  "
                f"kl {kl:.3f}  norm {norm:.2f}  {args.minutes * (1 - progress):.1f} min left",
                flush=True,
            )
    for parameter, value in zip(vae.parameters(), average, strict=True):
        parameter.data.copy_(value)
    return vae.eval()


@torch.no_grad()
def statistics(vae: nn.Module, count: int = 2048) -> dict[str, list[float]]:
    """Mean and deviation of sampled train latents, per channel, as diffusers names them."""
    source = OpenMojiSet("train", count=count, seed=7)
    dists = [vae.encode(pixels(source, i, 64)).latent_dist for i in range(0, count, 64)]
    latents = torch.cat([d.sample(torch.Generator().manual_seed(0)) for d in dists])
    deviation, mean = torch.std_mean(latents, (0, 2, 3))
    return {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}


@torch.no_grad()
def save(vae: nn.Module, args: argparse.Namespace) -> None:
    """Write float16 weights, measure them on held-out glyphs, and draw the sheet."""
    from PIL import Image

    vae.half().float()  # measured as it will be loaded
    vae.register_to_config(scaling_factor=1.0, **statistics(vae))
    vae.half().save_pretrained(args.out)
    vae.float()
    held_out = pixels(OpenMojiSet("test", count=1024), 0, 1024)
    made = torch.cat(
        [vae.decode(vae.encode(x).latent_dist.mean).sample for x in held_out.split(64)]
    )
    error = made.clamp(-1, 1) - held_out
    psnr = -10 * (error.square().mean((1, 2, 3)) / 4).log10().mean()
    print(f"held-out glyphs: PSNR {psnr:.2f} dB, L1 {error.abs().mean() / 2:.4f} of the range 0..1")
    if args.sheet:
        rows = torch.stack([held_out[:96], made[:96].clamp(-1, 1)], 1).reshape(6, 16, 2, 3, 64, 64)
        sheet = rows.permute(0, 2, 4, 1, 5, 3).reshape(6 * 2 * 64, 16 * 64, 3)
        Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(args.sheet)


def main() -> None:
    args = parse()
    save(train(args), args)


if __name__ == "__main__":
    main()
