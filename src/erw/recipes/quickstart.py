"""The quickstart: composed OpenMoji at 64 x 64, a small SiT, on two CPU cores within minutes."""

import dataclasses
import inspect

from erw.config import Data, Log, Model, Optim, Run, Sample
from erw.plan import SIT, Plan, constant

ERW = Plan(warmup=200, depth=2, align=constant(2.0), align_depth=6, warmup_input="noisy")
REPA = Plan(align=constant(2.0), align_depth=6)

QUICKSTART = Run(
    name="quickstart",
    steps=1500,
    model=Model(depth=12, width=192, heads=3, patch=2, projector=256),
    data=Data(cache="cache/quickstart", batch_size=64),
    plan=ERW,
    optim=Optim(lr=1e-3, lr_warmup=20, ema=0.99),
    sample=Sample(steps=25, solver="heun"),
    log=Log(every=25, checkpoint=250),
)

DEBUG = QUICKSTART.replace(
    name="debug",
    steps=12,
    model=Model(depth=4, width=32, heads=2, patch=2, projector=32),
    data=Data(cache="cache/quickstart", batch_size=8),
    plan=dataclasses.replace(ERW, warmup=4, depth=1, align_depth=2),
    sample=Sample(steps=4),
    log=Log(every=4, checkpoint=8),
)

RECIPES = {
    "quickstart": (
        QUICKSTART,
        inspect.cleandoc("""
            ERW on the built-in images: 9 classes, 64 x 64, latents 4 x 16 x 16, 64 tokens.
            Hardware: 2 CPU cores, about 5 minutes.
            Data:    erw prepare openmoji --out cache/quickstart --image-size 64 (see its --help)
            Command: erw train quickstart --out runs/quickstart
            """),
    ),
    "quickstart_repa": (
        QUICKSTART.replace(name="quickstart_repa", plan=REPA),
        "REPA as in quickstart: full training alone, with an alignment weight tuned for this data.",
    ),
    "quickstart_sit": (
        QUICKSTART.replace(name="quickstart_sit", plan=SIT),
        "SiT as in quickstart: full training alone, without alignment.",
    ),
    "debug": (
        DEBUG,
        "Twelve steps of a very small model through both phases, for tests and for reading along.",
    ),
}
"""name -> (run, lab note)"""
