"""ImageNet-1k at 256 x 256 in the latents of sd-vae-ft: SiT, DiT, REPA and ERW in their sizes."""

import dataclasses
import inspect
import itertools

from erw.config import Data, Flow, Log, Model, Optim, Run, Sample
from erw.models.sit import SIZES
from erw.plan import CODE_AS_RELEASED, PAPER_V1, PAPER_V3, SIT, Plan, repa


def _model(size: str) -> Model:
    depth, width, heads = SIZES[size]
    return Model(depth=depth, width=width, heads=heads, patch=2)


BASE = Run(
    name="sit_b2_in256_base",
    steps=400_000,
    model=_model("B"),
    data=Data(cache=("cache/imagenet256",), batch_size=256, class_dropout=0.1),
    plan=SIT,
    optim=Optim(lr=1e-4, ema=0.9999, clip=1.0, precision="bf16", compile=True),
    sample=Sample(steps=250, solver="euler_maruyama"),
    log=Log(every=100, checkpoint=10_000, keep=3),
)
"""What all share: AdamW 1e-4, batch 256, EMA 0.9999, labels dropped at 0.1, SDE sampler of 250
steps."""

BASE_DIT = BASE.replace(flow=Flow(objective="ddpm"), sample=Sample(steps=250, solver="ddpm"))
"""The same with DiT's objective and sampler."""

PREPARE = (
    "erw prepare IMAGENET/train --out cache/imagenet256 --image-size 256 "
    "--vae sd-vae-ft-ema --encoders dinov2-b"
)


def _erw(size: str) -> Plan:
    """The warm-up of the paper, at the depths that suit each size."""
    if size == "XL":
        return PAPER_V3
    blocks = SIZES[size][0]
    at = {"S": 8, "B": 8, "L": 14}[size]
    term = dataclasses.replace(PAPER_V3.align[0], block=at)
    return dataclasses.replace(PAPER_V3, warmup=10_000, depth=round(blocks / 5), align=(term,))


def _repa(size: str) -> Plan:
    return repa(4 if size in "SB" else 8)


HOURS = {"S": 2, "B": 9, "L": 31, "XL": 45}
"""Hours of one H100 (989 TFLOP/s of bf16, 45 % of them used) for 400K full steps."""


def _note(text: str) -> str:
    return inspect.cleandoc(text)


SCORES = {
    ("SiT", "B", "base"): "SiT paper: 33.0 after 400K steps",
    ("SiT", "L", "base"): "SiT paper: 18.8 after 400K steps",
    ("SiT", "XL", "base"): "SiT paper: 17.2 after 400K steps, 8.3 after 7M",
    ("SiT", "B", "repa"): "REPA paper: 24.4 after 400K steps, 78.2 after 50K",
    ("SiT", "L", "repa"): "REPA paper: 9.7 after 400K steps",
    ("SiT", "XL", "repa"): "REPA paper: 7.9 after 400K steps, 19.4 after 100K",
    ("SiT", "B", "erw"): "ERW v3: 51.7 to 55.6 after 50K full steps (warm-up length not stated)",
    ("SiT", "XL", "erw"): "ERW v3: 12.1 after 100K warm-up and 100K full steps",
    ("DiT", "S", "base"): "DiT paper: 68.4 after 400K steps",
    ("DiT", "B", "base"): "DiT paper: 43.5 after 400K steps",
    ("DiT", "L", "base"): "DiT paper: 23.3 after 400K steps",
    ("DiT", "XL", "base"): "DiT paper: 19.5 after 400K steps, 9.6 after 7M",
    ("DiT", "XL", "repa"): "REPA paper: 12.3 after 400K steps",
}
"""FID-50K without guidance, where one is published."""


def _recipes() -> dict[str, tuple[Run, str]]:
    families = {"SiT": (BASE, ("B", "L", "XL")), "DiT": (BASE_DIT, ("S", "B", "L", "XL"))}
    plans = {"base": lambda size: SIT, "repa": _repa, "erw": _erw}
    recipes = {}
    for family, kind in itertools.product(families, plans):
        base, sizes = families[family]
        for size in sizes:
            name = f"{family.lower()}_{size.lower()}2_in256_{kind}"
            run = base.replace(name=name, model=_model(size), plan=plans[kind](size))
            score = SCORES.get((family, size, kind), "none published")
            note = f"""
                {family}-{size}/2 on ImageNet 256 x 256, {kind}.
                FID-50K without guidance to expect: {score}. Not yet run here.
                Hardware: written for 8 GPUs of 80 GB; about {HOURS[size]} hours of one H100 for
                400K steps at 45 % of its bf16 peak (estimate, not measured).
                Data:    {PREPARE}
                Command: torchrun --nproc-per-node 8 -m erw train {name} --out runs/{name}
                """
            recipes[name] = (run, _note(note))
    return recipes


def _variants() -> dict[str, tuple[Run, str]]:
    """The same XL model by each published reading of the method."""
    plans = {"paper_v1": PAPER_V1, "paper_v3": PAPER_V3, "code_as_released": CODE_AS_RELEASED}
    return {
        f"sit_xl2_in256_{name}": (
            BASE.replace(name=f"sit_xl2_in256_{name}", model=_model("XL"), plan=plan),
            _note(f"""
                SiT-XL/2 with the plan `erw.PRESETS["{name}"]`, one of three readings of the method
                that contradict each other. Not yet run here.
                Data:    {PREPARE}
                Command: torchrun --nproc-per-node 8 -m erw train sit_xl2_in256_{name} --out
                runs/{name} """),
        )
        for name, plan in plans.items()
    }


RECIPES = {**_recipes(), **_variants()}
"""name -> (run, lab note)"""
