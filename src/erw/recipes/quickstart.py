"""The quickstart: composed OpenMoji at 64 x 64, a small SiT, on two CPU cores within minutes."""

import dataclasses
import inspect

from erw.config import Data, Flow, Log, Model, Optim, Run, Sample
from erw.plan import SIT, Align, Plan, constant, repa, stop_at

CACHE = "cache/quickstart"
"""The cache that `erw train` prepares where it is missing."""

REPA = repa(4, 2.0)
REPA_STOPPED = Plan(align=(Align(block=4, weight=stop_at(2.0, over=3750)),))
# A quarter of the rate and fresh moments: what a faster warm-up leaves behind slows later learning.
ERW = Plan(
    warmup=400,
    depth=2,
    align=REPA.align,
    warmup_input="noisy",
    warmup_lr=0.25,
    optimizer="fresh",
)
PAPER = Plan(warmup=400, depth=2, align=(Align(block=8, loss="nt_xent", weight=constant(0.5)),))

QUICKSTART = Run(
    name="quickstart",
    steps=1200,
    model=Model(depth=12, width=128, heads=2, patch=2, projector=256),
    data=Data(cache=(CACHE,), batch_size=32),
    flow=Flow(times="logit_normal"),
    plan=ERW,
    optim=Optim(lr=2e-3, lr_warmup=50, ema=0.995),
    sample=Sample(steps=12, solver="adams"),
    log=Log(every=25, checkpoint=250),
)

DEBUG = QUICKSTART.replace(
    name="debug",
    steps=12,
    model=Model(depth=4, width=32, heads=2, patch=2, projector=32),
    data=Data(cache=(CACHE,), batch_size=8),
    plan=dataclasses.replace(ERW, warmup=4, depth=1, align=repa(2, 2.0).align),
    sample=Sample(steps=4, solver="heun"),
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
    "quickstart_repa_stopped": (
        QUICKSTART.replace(name="quickstart_repa_stopped", plan=REPA_STOPPED),
        "REPA whose alignment ends after 3,750 steps (as in HASTE); for runs of about twice that.",
    ),
    "quickstart_paper": (
        QUICKSTART.replace(name="quickstart_paper", plan=PAPER),
        "ERW as the paper (v3) has it, depths in proportion: clean inputs, NT-Xent, weight 0.5.",
    ),
    "debug": (
        DEBUG,
        "Twelve steps of a very small model through both phases, for tests and for reading along.",
    ),
}
"""name -> (run, lab note)"""
