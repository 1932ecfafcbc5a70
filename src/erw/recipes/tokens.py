"""With the teacher's class token: REG denoises it beside the latents, RCG makes it first and then
images from it."""

import dataclasses
import inspect

from erw.config import Flow, Model, Run, Sample
from erw.models.sit import SIZES
from erw.plan import SIT, repa
from erw.recipes.imagenet import BASE, HOURS, PREPARE
from erw.recipes.quickstart import QUICKSTART
from erw.recipes.quickstart import REPA as QUICKSTART_REPA

PREPARE_TOKENS = f"{PREPARE} --class-token"


def _model(size: str) -> Model:
    depth, width, heads = SIZES[size]
    return Model(depth=depth, width=width, heads=heads, patch=2, class_token="denoised")


def _reg(size: str, score: str) -> tuple[str, tuple[Run, str]]:
    name = f"sit_{size.lower()}2_in256_reg"
    plan = repa(4 if size == "B" else 8)
    note = f"""
        SiT-{size}/2 on ImageNet 256 x 256, REG (arXiv 2507.01467): REPA, and DINOv2's class token
        denoised beside the latents, its loss weighted by 0.03.
        FID-50K without guidance to expect: {score}. Not yet run here.
        Guidance as released (after 4M steps): --guidance 2.3 --interval 0 0.85, 250 SDE steps.
        Hardware: written for 8 GPUs of 80 GB; about {HOURS[size]} hours of one H100 for 400K
        steps at 45 % of its bf16 peak (estimate, not measured).
        Data:    {PREPARE_TOKENS}
        Command: torchrun --nproc-per-node 8 -m erw train {name} --out runs/{name}
        """
    return name, (BASE.replace(name=name, model=_model(size), plan=plan), inspect.cleandoc(note))


RCG = BASE.replace(
    name="sit_xl2_in256_rcg",
    model=dataclasses.replace(_model("XL"), class_token="given"),
    plan=SIT,
)
RDM = BASE.replace(
    name="rdm_in256",
    steps=500_000,
    model=Model(net="rdm", depth=12, width=1536, num_classes=0),
    data=dataclasses.replace(BASE.data, batch_size=512),
    flow=Flow(prediction="x"),
    plan=SIT,
    optim=dataclasses.replace(BASE.optim, lr=5e-4, weight_decay=0.01),
)
SMALL = QUICKSTART.replace(plan=SIT)
PREPARE_SMALL = "erw prepare openmoji --out cache/quickstart --image-size 64 --class-token"


def _with_note(run: Run, note: str) -> tuple[str, tuple[Run, str]]:
    return run.name, (run, inspect.cleandoc(note))


RECIPES = dict(
    [
        _reg("B", "not checked here; REG's paper reports it"),
        _reg("XL", "3.4 after 400K steps, 1.80 after 4M (REG paper)"),
        _with_note(
            RCG,
            f"""
            SiT-XL/2 on ImageNet 256 x 256, conditioned on DINOv2's class token in place of the
            class, as RCG (arXiv 2312.03701) does on MoCo v3's with DiT-XL/2, which has FID 4.89
            after 400 epochs, unconditional. Not yet run here.
            Hardware: as sit_xl2_in256_base.
            Data:    {PREPARE_TOKENS}
            Command: torchrun --nproc-per-node 8 -m erw train sit_xl2_in256_rcg --out runs/rcg
                     erw train rdm_in256 --out runs/rcg/rdm, then erw sample runs/rcg --out DIR
            """,
        ),
        _with_note(
            RDM,
            f"""
            Representation diffusion model of RCG (arXiv 2312.03701), unconditional: 12 residual
            blocks of 1,536 channels that predict the clean representation, 200 epochs of batch 512.
            Ours runs on the linear path in continuous time, RCG's on 1,000 steps. Not yet run here.
            Hardware: one GPU, a day or less (estimate, not measured).
            Data:    {PREPARE_TOKENS}
            Command: erw train rdm_in256 --out runs/rcg/rdm
            """,
        ),
        _with_note(
            RDM.replace(
                name="rdm_in256_class", model=dataclasses.replace(RDM.model, num_classes=None)
            ),
            """
            As rdm_in256, told the class: images of a class are asked for through it.
            Command: erw train rdm_in256_class --out runs/rcg/rdm
            """,
        ),
        _with_note(
            QUICKSTART.replace(
                name="quickstart_reg",
                model=dataclasses.replace(QUICKSTART.model, class_token="denoised"),
                plan=QUICKSTART_REPA,
            ),
            f"""
            REG as in quickstart: full training alone, with EfficientNet's pooled class token.
            Data:    {PREPARE_SMALL}
            """,
        ),
        _with_note(
            SMALL.replace(
                name="quickstart_rcg",
                model=dataclasses.replace(QUICKSTART.model, class_token="given"),
            ),
            f"""
            RCG as in quickstart: images from representations.
            Data:    {PREPARE_SMALL}
            Command: erw train quickstart_rcg --out runs/rcg, erw train quickstart_rdm --out
                     runs/rcg/rdm, then erw sample runs/rcg --out DIR
            """,
        ),
        _with_note(
            SMALL.replace(
                name="quickstart_rdm",
                steps=3000,
                model=Model(net="rdm", depth=6, width=512),
                data=dataclasses.replace(QUICKSTART.data, batch_size=128),
                flow=Flow(prediction="x"),
                optim=dataclasses.replace(QUICKSTART.optim, lr=1e-3),
                sample=Sample(steps=50, solver="heun"),
            ),
            f"""
            The representation diffusion model of quickstart_rcg, told the class.
            Data:    {PREPARE_SMALL}
            Command: erw train quickstart_rdm --out runs/rcg/rdm
            """,
        ),
    ]
)
"""name -> (run, lab note)"""
