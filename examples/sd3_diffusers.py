"""ERW around diffusers' SD3Transformer2DModel. Model untouched; the five marked lines are ERW's.

    python examples/sd3_diffusers.py              # a tiny SD3 on stand-in data: seconds on a CPU
    python examples/sd3_diffusers.py --no-tiny    # the shape of SD3-medium, for a large GPU

A joint block returns (text, image), and `Aligned` takes the last of a tuple: the image tokens.
Where the image comes first (CogView4, HunyuanVideo), give it `select=lambda out: out[0]`.
"""

import argparse

import torch
from diffusers import SD3Transformer2DModel

import erw
import standin

AT = "transformer_blocks.1"  # the output of the second block: there the L2R part ends
TINY = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "sample_size": 8}
TINY |= {"joint_attention_dim": 24, "pooled_projection_dim": 20, "caption_projection_dim": 64}
MEDIUM = {"num_attention_heads": 24, "num_layers": 24, "caption_projection_dim": 1536}


def make_model(*, tiny: bool = True) -> SD3Transformer2DModel:
    """SD3's transformer with random weights."""
    return SD3Transformer2DModel(in_channels=16, out_channels=16, **(TINY if tiny else MEDIUM))


def train(*, steps: int = 60, batch_size: int = 16, tiny: bool = True) -> list[standin.Losses]:
    """Warm up for a third of the steps, then train in full; returns every step's losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(tiny=tiny).to(device)
    net = erw.Aligned(model, at=AT, width=model.inner_dim, dim=standin.DIM).to(device)  # ERW 1
    plan = erw.Plan(warmup=steps // 3, align=erw.half_life(1.0, over=steps))  # ERW 2
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)  # model and projector
    sizes = {
        "channels": 16,
        "side": model.config.sample_size,
        "text_dim": model.config.joint_attention_dim,
        "pooled_dim": model.config.pooled_projection_dim,
    }
    losses = []
    for step in range(steps):
        phase = plan(step)  # ERW 3: warm-up or full, and what each loss weighs
        x, _, text, pooled, z = (part.to(device) for part in standin.batch(batch_size, **sizes))
        t = torch.rand(batch_size, device=device) * (not phase.clean)  # clean warm-up: t = 0
        noise, s = torch.randn_like(x), t[:, None, None, None]
        x_t, velocity = (1 - s) * x + s * noise, noise - x

        out, align = net(  # ERW 4: in warm-up the blocks after AT do not run, and out is None
            x_t, text, pooled, 1000 * t, targets=z, stop=phase.warmup
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
