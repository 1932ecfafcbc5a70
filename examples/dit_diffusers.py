"""ERW around diffusers' DiTTransformer2DModel. Model untouched; the five marked lines are ERW's.

python examples/dit_diffusers.py              # a tiny DiT on stand-in data: seconds on a CPU
python examples/dit_diffusers.py --no-tiny    # the shape of DiT-XL/2, for a GPU
python examples/dit_diffusers.py --method irepa        # or layersync, which has no encoder
"""

import argparse
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import erw
import standin

AT = "transformer_blocks.1"  # the output of the second block: there the L2R part ends
TINY = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "sample_size": 8}
XL_2 = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}


METHODS: dict[str, Any] = {  # steps -> options of Aligned and the plan
    "erw": lambda n: ({}, erw.Plan(warmup=n // 3, align=erw.half_life(1.0, over=n))),
    "irepa": lambda n: (
        {"projector": "conv", "normalize": "irepa"}, erw.Plan(align=erw.constant(1.0))
    ),
    "layersync": lambda n: ({"projector": "none"}, erw.Plan(align=erw.constant(0.2))),
}  # fmt: skip
LATER = "transformer_blocks.2"  # LayerSync's target: the output of a later block


def make_model(*, tiny: bool = True) -> DiTTransformer2DModel:
    """DiT with random weights; 4 channels out, so it predicts the velocity and no variance."""
    sizes = TINY if tiny else XL_2
    return DiTTransformer2DModel(in_channels=4, out_channels=4, patch_size=2, **sizes)


def train(
    *, steps: int = 60, batch_size: int = 16, tiny: bool = True, method: str = "erw"
) -> list[standin.Losses]:
    """Train as the method's plan says; returns every step's losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(tiny=tiny).to(device)
    options, plan = METHODS[method](steps)  # ERW 1
    net = erw.Aligned(model, at=AT, width=model.inner_dim, dim=standin.DIM, **options)  # ERW 2
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)  # model and projector
    losses = []
    for step in range(steps):
        phase = plan(step)  # ERW 3: warm-up or full, and what each loss weighs
        batch = standin.batch(batch_size, channels=4, side=model.config.sample_size)
        x, labels = batch.x.to(device), batch.labels.to(device)
        z = LATER if method == "layersync" else batch.z.to(device)
        t = torch.rand(batch_size, device=device) * (not phase.clean)  # clean warm-up: t = 0
        noise, s = torch.randn_like(x), t[:, None, None, None]
        x_t, velocity = (1 - s) * x + s * noise, noise - x

        out, align = net(  # ERW 4: in warm-up the blocks after AT do not run, and out is None
            x_t, timestep=(999 * t).long(), class_labels=labels, targets=z, stop=phase.warmup
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
    parser.add_argument("--method", choices=METHODS, default="erw")
    args = parser.parse_args()
    torch.manual_seed(0)
    train(steps=args.steps, tiny=args.tiny, method=args.method)
