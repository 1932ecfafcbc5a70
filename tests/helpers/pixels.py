"""A tiny pixel-space model, ten of its images, and a process that makes half of them.

Processes import what they run by name, and tests are not importable, so it is here.
"""

import torch
import torch.distributed as dist

from erw.config import Run
from erw.models.sit import SiT
from erw.sampling.generation import Generation, generate
from erw.sampling.save import write
from erw.training.trained import Trained

RUN = Run()


def trained(num_classes: int = 3, *, seed: int = 0, run: Run = RUN) -> Trained:
    """A tiny pixel-space model (VAE "none") with random weights everywhere, the zero layers too."""
    net = SiT(
        input_size=8,
        channels=3,
        depth=2,
        width=32,
        heads=2,
        patch=2,
        num_classes=num_classes,
        out_channels=3 * run.flow.outputs,
        internal=run.model.internal,
    )
    rng = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        weight.data.normal_(0, 0.15, generator=rng)
    names = tuple(f"class {i}" for i in range(num_classes))
    return Trained(net.eval().requires_grad_(False), run, "none", names, 0)


MODEL = trained()


def ten() -> Generation:
    return generate(MODEL, range(10), steps=2, batch_size=4)


def share(rank: int, store: str, out: str) -> None:
    """One of two processes that make ten images together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        drawn: list[int] = []
        write(ten(), out, progress=drawn.append)
        assert sum(drawn) == 5
    finally:
        dist.destroy_process_group()
