"""ERW around diffusers' FluxTransformer2DModel. Model untouched; the five marked lines are ERW's.

    python examples/flux_diffusers.py              # a tiny Flux on stand-in data: seconds on a CPU
    python examples/flux_diffusers.py --no-tiny    # Flux at a quarter of its depth, for a large GPU

Flux has joint blocks first and single-stream ones after; AT may name either kind. Both return
(text, image), and `Aligned` takes the last of a tuple: the image tokens.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

import erw
import standin

AT = "transformer_blocks.1"  # the output of the second joint block: there the L2R part ends
TINY = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2}
TINY |= {"joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6)}
LARGE = {"num_layers": 5, "num_single_layers": 10}  # the rest is as released: width 3072


def make_model(*, tiny: bool = True) -> FluxTransformer2DModel:
    """Flux's transformer with random weights; a token holds a 2 x 2 patch of 16 channels."""
    return FluxTransformer2DModel(in_channels=64, **(TINY if tiny else LARGE))


def positions(side: int) -> torch.Tensor:
    """Flux wants each token's place: (T, 3) with row and column in the last two."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def train(*, steps: int = 60, batch_size: int = 16, tiny: bool = True) -> list[standin.Losses]:
    """Warm up for a third of the steps, then train in full; returns every step's losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, side = make_model(tiny=tiny).to(device), 8 if tiny else 64
    net = erw.Aligned(model, at=AT, width=model.inner_dim, dim=standin.DIM).to(device)  # ERW 1
    plan = erw.Plan(warmup=steps // 3, align=erw.half_life(1.0, over=steps))  # ERW 2
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)  # model and projector
    sizes = {
        "channels": 16,
        "side": side,
        "text_dim": model.config.joint_attention_dim,
        "pooled_dim": model.config.pooled_projection_dim,
    }
    ids = (positions(side // 2).to(device), torch.zeros(5, 3, device=device))  # of image, of text
    losses = []
    for step in range(steps):
        phase = plan(step)  # ERW 3: warm-up or full, and what each loss weighs
        x, _, text, pooled, z = (part.to(device) for part in standin.batch(batch_size, **sizes))
        x = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)  # (B, T, 64): packed latents
        t = torch.rand(batch_size, device=device) * (not phase.clean)  # clean warm-up: t = 0
        noise, s = torch.randn_like(x), t[:, None, None]
        x_t, velocity = (1 - s) * x + s * noise, noise - x

        out, align = net(  # ERW 4: in warm-up the blocks after AT do not run, and out is None
            x_t, text, pooled, t, *ids, targets=z, stop=phase.warmup
        )
        flow = (out.sample - velocity).square().mean() if out else torch.zeros((), device=device)
        loss = phase.weight("flow") * flow + phase.weight("align") * align  # ERW 5

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(standin.Losses(phase.name, flow.item(), align.item()))
        if step % 10 == 9:
            print(f"{step + 1:4d} {losses[-1]}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    train(steps=args.steps, tiny=args.tiny)
