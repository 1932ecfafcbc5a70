"""LightningDiT-XL/1 (arXiv 2501.01423) on ImageNet-1k at 256 x 256, in the latents of VA-VAE."""

import dataclasses
import inspect

from erw.config import Data, Flow, Log, Model, Optim, Run, Sample
from erw.models.sit import SIZES
from erw.plan import PAPER_V3, REPA, SIT, Plan

DEPTH, WIDTH, HEADS = SIZES["XL"]
BASE = Run(
    name="lightningdit_xl1_in256",
    steps=80_000,
    model=Model(
        depth=DEPTH,
        width=WIDTH,
        heads=HEADS,
        patch=1,
        rope=True,
        norm="rms",
        mlp="swiglu",
        input_size=16,
        channels=32,
    ),
    data=Data(cache=("cache/imagenet256-vavae",), batch_size=1024, class_dropout=0.1),
    flow=Flow(times="logit_normal", direction=1.0),
    plan=SIT,
    optim=Optim(lr=2e-4, betas=(0.9, 0.95), ema=0.9999, clip=1.0, precision="bf16", compile=True),
    sample=Sample(
        steps=249,
        solver="euler",
        guidance=10.0,
        interval=(0.0, 0.89),
        guided_channels=3,
        shift=1 / 0.3,
    ),
    log=Log(every=100, checkpoint=10_000, keep=3),
)
"""The released configuration of 64 epochs. Its time runs from noise to data: `timestep_shift` 0.3
is a shift of 1 / 0.3 here, no guidance below 0.11 is guidance within (0, 0.89), and its 250 points
are 249 steps."""

PREPARE = (
    "erw prepare IMAGENET/train --out cache/imagenet256-vavae --image-size 256 "
    "--vae va-vae=vavae-imagenet256-f16d32-dinov2.pt --encoders dinov2-b"
)


def _entry(name: str, plan: Plan, text: str, score: str) -> tuple[Run, str]:
    note = f"""
        {text}
        FID-50K to expect: {score}. Not yet run here.
        Hardware: written for 8 GPUs of 80 GB; about 36 hours of one H100 for 80K steps of
        1024 images at 45 % of its bf16 peak (estimate, not measured).
        Data:    {PREPARE}
        Command: torchrun --nproc-per-node 8 -m erw train {name} --out runs/{name}
        """
    return BASE.replace(name=name, plan=plan), inspect.cleandoc(note)


RECIPES = {
    name: _entry(name, plan, text, score)
    for name, plan, text, score in (
        (
            "lightningdit_xl1_in256",
            SIT,
            "LightningDiT-XL/1 as released for 64 epochs: RoPE, RMSNorm, SwiGLU, logit-normal "
            "times, direction loss, patch 1 on 32 x 16 x 16 latents.",
            "LightningDiT: 5.14 without guidance, 2.11 with (guidance 10 on 3 channels)",
        ),
        (
            "lightningdit_xl1_in256_repa",
            REPA,
            "LightningDiT-XL/1 with REPA's alignment after block 8.",
            "none published",
        ),
        (
            "lightningdit_xl1_in256_erw",
            dataclasses.replace(PAPER_V3, warmup=10_000),
            "LightningDiT-XL/1 with ERW as the paper (v3) has it, but 10,000 warm-up steps.",
            "none published",
        ),
    )
}
"""name -> (run, lab note)"""
