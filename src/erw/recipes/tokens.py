"""ImageNet-1k at 256 x 256 with the teacher's class token: REG denoises it beside the latents."""

import dataclasses
import inspect

from erw.config import Model, Run
from erw.models.cost import sit_flops
from erw.models.sit import SIZES
from erw.plan import REPA
from erw.recipes.imagenet import BASE, PREPARE

PREPARE_TOKENS = f"{PREPARE} --class-token true"


def _model(size: str) -> Model:
    depth, width, heads = SIZES[size]
    return Model(depth=depth, width=width, heads=heads, patch=2, class_token="denoised")


def _hours(size: str) -> int:
    """Hours of one H100 (989 TFLOP/s of bf16, 45 % of them used) for 400K full steps."""
    depth, width, _ = SIZES[size]
    cost = sit_flops(
        depth=depth, width=width, tokens=256, patch=2, channels=4, class_token=768
    ).total
    return round(400_000 * 256 * cost / (0.45 * 989e12) / 3600)


def _reg(size: str, score: str) -> tuple[str, tuple[Run, str]]:
    name = f"sit_{size.lower()}2_in256_reg"
    plan = dataclasses.replace(REPA, align_depth=4 if size == "B" else 8)
    note = f"""
        SiT-{size}/2 on ImageNet 256 x 256, REG (arXiv 2507.01467): REPA, and DINOv2's class token
        denoised beside the latents, its loss weighted by 0.03.
        FID-50K without guidance to expect: {score}. Not yet run here.
        Guidance as released (after 4M steps): --guidance 2.3 --interval 0 0.85, 250 SDE steps.
        Hardware: written for 8 GPUs of 80 GB; about {_hours(size)} hours of one H100 for 400K
        steps at 45 % of its bf16 peak (estimate, not measured).
        Data:    {PREPARE_TOKENS}
        Command: torchrun --nproc-per-node 8 -m erw train {name} --out runs/{name}
        """
    return name, (BASE.replace(name=name, model=_model(size), plan=plan), inspect.cleandoc(note))


RECIPES = dict(
    [
        _reg("B", "not checked here; REG's paper reports it"),
        _reg("XL", "3.4 after 400K steps, 1.80 after 4M (REG paper)"),
    ]
)
"""name -> (run, lab note)"""
