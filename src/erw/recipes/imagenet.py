"""ImageNet-1k at 256 x 256: SiT, DiT, REPA, ERW, REG and RCG in latents of sd-vae-ft, and
LightningDiT (arXiv 2501.01423) in those of VA-VAE. None has been run here yet."""

import inspect
from dataclasses import replace

from erw.config import Data, Flow, Log, Model, Optim, Run, Sample
from erw.models.sit import SIZES
from erw.plan import CODE_AS_RELEASED, PAPER_V1, PAPER_V3, REPA, SIT, Plan, repa

RECIPES: dict[str, tuple[Run, str]] = {}
"""name -> (run, lab note)"""

HOURS = {"S": 2, "B": 9, "L": 31, "XL": 45}
"""Hours of one H100 (989 TFLOP/s of bf16, 45 % of them used) for 400K full steps of 256."""

PREPARE = (
    "erw prepare IMAGENET/train --out cache/imagenet256 --image-size 256 "
    "--vae sd-vae-ft-ema --encoders dinov2-b"
)
PREPARE_VAVAE = (
    "erw prepare IMAGENET/train --out cache/imagenet256-vavae --image-size 256 "
    "--vae va-vae=vavae-imagenet256-f16d32-dinov2.pt --encoders dinov2-b"
)


def add(
    run: Run, text: str, *, hours: int, score: str = "none published", prepare: str = PREPARE
) -> None:
    """Enter a run with its lab note."""
    note = f"""
        {text}
        FID-50K to expect, without guidance if not stated: {score}. Not yet run here.
        Hardware: written for 8 GPUs of 80 GB; about {hours} hours of one H100 for {run.steps:,}
        steps of {run.data.batch_size} images at 45 % of its bf16 peak (estimate, not measured).
        Data:    {prepare}
        Command: torchrun --nproc-per-node 8 -m erw train {run.name} --out runs/{run.name}
        """
    RECIPES[run.name] = (run, inspect.cleandoc(note))


def model(size: str) -> Model:
    depth, width, heads = SIZES[size]
    return Model(depth=depth, width=width, heads=heads, patch=2)


def erw(size: str) -> Plan:
    """The warm-up of the paper (v3), at depths that suit each size."""
    if size == "XL":
        return PAPER_V3
    term = replace(PAPER_V3.align[0], block=14 if size == "L" else 8)
    return replace(PAPER_V3, warmup=10_000, depth=round(SIZES[size][0] / 5), align=(term,))


# AdamW 1e-4, batch 256, EMA 0.9999, labels dropped at 0.1, SDE sampler of 250 steps.
BASE = Run(
    steps=400_000,
    data=Data(cache=("cache/imagenet256",), batch_size=256, class_dropout=0.1),
    plan=SIT,
    optim=Optim(lr=1e-4, ema=0.9999, clip=1.0, precision="bf16", compile=True),
    sample=Sample(steps=250, solver="euler_maruyama"),
    log=Log(every=100, checkpoint=10_000, keep=3),
)
DIT = BASE.replace(flow=Flow(objective="ddpm"), sample=Sample(steps=250, solver="ddpm"))

SCORES = {
    "sit_b2_in256_base": "SiT paper: 33.0 after 400K steps",
    "sit_l2_in256_base": "SiT paper: 18.8 after 400K steps",
    "sit_xl2_in256_base": "SiT paper: 17.2 after 400K steps, 8.3 after 7M",
    "sit_b2_in256_repa": "REPA paper: 24.4 after 400K steps, 78.2 after 50K",
    "sit_l2_in256_repa": "REPA paper: 9.7 after 400K steps",
    "sit_xl2_in256_repa": "REPA paper: 7.9 after 400K steps, 19.4 after 100K",
    "sit_b2_in256_erw": "ERW v3: 51.7 to 55.6 after 50K full steps (warm-up length not stated)",
    "sit_xl2_in256_erw": "ERW v3: 12.1 after 100K warm-up and 100K full steps",
    "dit_s2_in256_base": "DiT paper: 68.4 after 400K steps",
    "dit_b2_in256_base": "DiT paper: 43.5 after 400K steps",
    "dit_l2_in256_base": "DiT paper: 23.3 after 400K steps",
    "dit_xl2_in256_base": "DiT paper: 19.5 after 400K steps, 9.6 after 7M",
    "dit_xl2_in256_repa": "REPA paper: 12.3 after 400K steps",
}

for family, base, sizes in (("SiT", BASE, ("B", "L", "XL")), ("DiT", DIT, ("S", "B", "L", "XL"))):
    for kind in ("base", "repa", "erw"):
        for size in sizes:
            blocks = 4 if size in "SB" else 8
            plan = {"base": SIT, "repa": repa(blocks), "erw": erw(size)}[kind]
            name = f"{family.lower()}_{size.lower()}2_in256_{kind}"
            score = SCORES.get(name, "none published")
            text = f"{family}-{size}/2 on ImageNet 256 x 256, {kind}."
            run = base.replace(name=name, model=model(size), plan=plan)
            add(run, text, hours=HOURS[size], score=score)

for name, plan in (
    ("paper_v1", PAPER_V1),
    ("paper_v3", PAPER_V3),
    ("code_as_released", CODE_AS_RELEASED),
):
    run = BASE.replace(name=f"sit_xl2_in256_{name}", model=model("XL"), plan=plan)
    text = f"""SiT-XL/2 with the plan `erw.PRESETS["{name}"]`, one of three readings of the method
        that contradict each other."""
    add(run, text, hours=HOURS["XL"])

# The released configuration of 64 epochs. Its time runs from noise to data: `timestep_shift` 0.3 is
# a shift of 1 / 0.3 here, no guidance below 0.11 is guidance within (0, 0.89), and its 250 points
# are 249 steps.
LIGHTNING = BASE.replace(
    steps=80_000,
    model=replace(
        model("XL"), patch=1, rope=True, norm="rms", mlp="swiglu", input_size=16, channels=32
    ),
    data=Data(cache=("cache/imagenet256-vavae",), batch_size=1024, class_dropout=0.1),
    flow=Flow(times="logit_normal", direction=1.0),
    optim=replace(BASE.optim, lr=2e-4, betas=(0.9, 0.95)),
    sample=Sample(
        steps=249, solver="euler", guidance=10.0, interval=(0.0, 0.89), guided_channels=3,
        shift=1 / 0.3,
    ),
)  # fmt: skip
for kind, plan, text, score in (
    (
        "",
        SIT,
        "LightningDiT-XL/1 as released for 64 epochs: RoPE, RMSNorm, SwiGLU, logit-normal times, "
        "direction loss, patch 1 on 32 x 16 x 16 latents.",
        "LightningDiT: 5.14, or 2.11 with guidance 10 on 3 channels",
    ),
    ("_repa", REPA, "LightningDiT-XL/1 with REPA's alignment after block 8.", "none published"),
    (
        "_erw",
        replace(PAPER_V3, warmup=10_000),
        "LightningDiT-XL/1 with ERW as the paper (v3) has it, but 10,000 warm-up steps.",
        "none published",
    ),
):
    run = LIGHTNING.replace(name=f"lightningdit_xl1_in256{kind}", plan=plan)
    add(run, text, hours=36, score=score, prepare=PREPARE_VAVAE)

for size, score in (
    ("B", "not checked here; REG's paper reports it"),
    ("XL", "3.4 after 400K steps, 1.80 after 4M (REG paper)"),
):
    run = BASE.replace(
        name=f"sit_{size.lower()}2_in256_reg",
        model=replace(model(size), class_token="denoised"),
        plan=repa(4 if size == "B" else 8),
    )
    text = f"""SiT-{size}/2 on ImageNet 256 x 256, REG (arXiv 2507.01467): REPA, and DINOv2's class
        token denoised with the latents, its loss weighted by 0.03. Guidance as released (after 4M
        steps): --guidance 2.3 --interval 0 0.85, 250 SDE steps."""
    add(run, text, hours=HOURS[size], score=score, prepare=f"{PREPARE} --class-token")

RDM = BASE.replace(
    name="rdm_in256",
    steps=500_000,
    model=Model(net="rdm", depth=12, width=1536, num_classes=0),
    data=replace(BASE.data, batch_size=512),
    flow=Flow(prediction="x"),
    optim=replace(BASE.optim, lr=5e-4, weight_decay=0.01),
)
add(
    BASE.replace(name="sit_xl2_in256_rcg", model=replace(model("XL"), class_token="given")),
    """SiT-XL/2 on ImageNet 256 x 256, conditioned on DINOv2's class token instead of the class, as
        RCG (arXiv 2312.03701) on MoCo v3's with DiT-XL/2. Train it with --out runs/rcg, rdm_in256
        with --out runs/rcg/rdm, then erw sample runs/rcg --out DIR.""",
    hours=HOURS["XL"],
    score="RCG paper: 4.89 after 400 epochs, unconditional",
    prepare=f"{PREPARE} --class-token",
)
for run, text in (
    (
        RDM,
        """Representation diffusion model of RCG (arXiv 2312.03701), unconditional: 12 residual
        blocks of 1,536 channels that predict the clean representation, 200 epochs of batch 512.
        Ours runs on the linear path in continuous time, RCG's on 1,000 steps.""",
    ),
    (
        RDM.replace(name="rdm_in256_class", model=replace(RDM.model, num_classes=None)),
        "As rdm_in256, conditional on the class, through which images of a class are drawn.",
    ),
):
    add(run, text, hours=24, prepare=f"{PREPARE} --class-token")
