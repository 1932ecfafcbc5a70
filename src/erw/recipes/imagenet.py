"""ImageNet-1k at 256 x 256: SiT, DiT, REPA, ERW, REG and RCG in latents of sd-vae-ft,
LightningDiT (arXiv 2501.01423) in those of VA-VAE, DiT^DH (arXiv 2510.11690) in DINOv2's tokens.
Written for 8 GPUs of 80 GB; none has been run here yet: scores are published FID-50K, without
guidance if not stated.

    erw prepare IMAGENET/train --out cache/imagenet256 --image-size 256 --vae sd-vae-ft-ema \\
        --encoders dinov2-b      (REG and RCG: --class-token)
    erw prepare IMAGENET/train --out cache/imagenet256-vavae --image-size 256 \\
        --vae va-vae=vavae-imagenet256-f16d32-dinov2.pt --encoders dinov2-b
    erw prepare IMAGENET/train --out cache/imagenet256-rae --image-size 256 --vae rae-dinov2-b \\
        --encoders --flip --online      (stored, its latents are 2 TB)
    torchrun --nproc-per-node 8 -m erw train sit_xl2_in256_erw --out runs/erw
"""

from dataclasses import replace

from erw.config import SIZES, Data, Flow, Log, Model, Optim, Run, Sample
from erw.plan import PAPER_V3, PRESETS, REPA, SIT, Plan, Routing, repa


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

SIT_XL = BASE.replace(model=model("XL"))
RECIPES: dict[str, Run] = {}
for family, base, sizes in (("sit", BASE, ("B", "L", "XL")), ("dit", DIT, ("S", "B", "L", "XL"))):
    for kind in ("base", "repa", "erw"):
        for size in sizes:
            plan = {"base": SIT, "repa": repa(4 if size in "SB" else 8), "erw": erw(size)}[kind]
            name = f"{family}_{size.lower()}2_in256_{kind}"
            RECIPES[name] = base.replace(model=model(size), plan=plan)
for name in ("paper_v1", "paper_v3", "code_as_released"):
    RECIPES[f"sit_xl2_in256_{name}"] = BASE.replace(model=model("XL"), plan=PRESETS[name])

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
# As released, but for a constant rate (theirs falls by 5 % until step 100,000) and SiT's embedding
# of times and initial weights. The shift of times is sqrt(m / 4096), m numbers in a latent.
RAE_SHIFT = (768 * 16 * 16 / 4096) ** 0.5
RAE = LIGHTNING.replace(
    steps=100_000,
    model=replace(LIGHTNING.model, channels=768, head_depth=2, head_width=2048, head_heads=16),
    data=replace(LIGHTNING.data, cache=("cache/imagenet256-rae",)),
    flow=Flow(times="logit_normal", shift=RAE_SHIFT),
    optim=replace(LIGHTNING.optim, ema=0.9995),
    sample=Sample(steps=50, solver="euler", shift=RAE_SHIFT),
)
RDM = BASE.replace(
    steps=500_000,
    model=Model(net="rdm", depth=12, width=1536, num_classes=0),
    data=replace(BASE.data, batch_size=512),
    flow=Flow(prediction="x"),
    optim=replace(BASE.optim, lr=5e-4, weight_decay=0.01),
)
REG = BASE.replace(model=replace(model("XL"), class_token="denoised"), plan=repa(8))
TREAD = Plan(align=(), routing=Routing("tread", (3, 25), until=300_000))
SPRINT = Plan(align=(), routing=Routing("sprint", (3, 26), 0.25, "grid", 300_000, path_drop=0.1))
RECIPES |= {
    "sit_xl2_in256_tread": BASE.replace(model=model("XL"), plan=TREAD),
    "sit_xl2_in256_sprint": BASE.replace(model=replace(model("XL"), fusion=(3, 26)), plan=SPRINT),
    "lightningdit_xl1_in256": LIGHTNING,
    "lightningdit_xl1_in256_repa": LIGHTNING.replace(plan=REPA),
    "lightningdit_xl1_in256_erw": LIGHTNING.replace(plan=replace(PAPER_V3, warmup=10_000)),
    "sit_xl1_in256_rae": RAE,
    "sit_b2_in256_reg": BASE.replace(
        model=replace(model("B"), class_token="denoised"), plan=repa(4)
    ),
    "sit_xl2_in256_reg": REG,
    "sit_xl2_in256_muon": SIT_XL.replace(plan=repa(8), optim=replace(BASE.optim, name="muon")),
    "sit_xl2_in256_rcg": BASE.replace(model=replace(model("XL"), class_token="given")),
    "rdm_in256": RDM,
    "rdm_in256_class": RDM.replace(model=replace(RDM.model, num_classes=None)),
}
