"""ERW around a transformer of one's own, in a loop of one's own. The five marked lines are ERW's.

    python examples/own_loop.py    # plain PyTorch layers on stand-in data: seconds on a CPU

This model carries time and class in an extra first token. The encoder has no feature for that one,
so `select=` drops it from what a block returns.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import erw
import standin

AT = "blocks.1"  # the output of the second block: there the L2R part ends


class MyTransformer(nn.Module):
    """Latents (B, 4, 8, 8), times (B,) and labels (B,) to a velocity like the latents."""

    def __init__(self, *, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.patches, self.positions = nn.Linear(16, width), nn.Parameter(torch.randn(16, width))
        self.time, self.label = nn.Linear(1, width), nn.Embedding(standin.CLASSES, width)
        layer = {"nhead": 4, "dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, norm_first=True, **layer) for _ in range(depth)
        )
        self.out = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(F.unfold(x, 2, stride=2).transpose(1, 2)) + self.positions
        first = self.time(t[:, None]) + self.label(y)
        h = torch.cat([first[:, None], h], dim=1)  # (B, 1 + T, width)
        for block in self.blocks:
            h = block(h)
        return F.fold(self.out(h[:, 1:]).transpose(1, 2), x.shape[-2:], 2, stride=2)


def train(*, steps: int = 60, batch_size: int = 16) -> list[standin.Losses]:
    """Warm up for a third of the steps, then train in full; returns every step's losses."""
    model = MyTransformer()
    net = erw.Aligned(model, at=AT, width=64, dim=standin.DIM, select=lambda h: h[:, 1:])  # ERW 1
    plan = erw.Plan(warmup=steps // 3, align=erw.half_life(1.0, over=steps))  # ERW 2
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)  # model and projector
    losses = []
    for step in range(steps):
        phase = plan(step)  # ERW 3: warm-up or full, and what each loss weighs
        x, y, *_, z = standin.batch(batch_size, channels=4, side=8)
        t = torch.rand(batch_size) * (not phase.clean)  # clean warm-up: t = 0
        noise, s = torch.randn_like(x), t[:, None, None, None]
        x_t, velocity = (1 - s) * x + s * noise, noise - x

        v, align = net(x_t, t, y, targets=z, stop=phase.warmup)  # ERW 4: in warm-up v is None
        flow = torch.zeros(()) if v is None else (v - velocity).square().mean()
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
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    train(steps=args.steps)
