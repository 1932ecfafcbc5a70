"""The quickstart: composed OpenMoji at 64 x 64, a small SiT, on two CPU cores within minutes."""

from dataclasses import replace

from erw.config import Data, Flow, Log, Model, Optim, Run, Sample
from erw.plan import SIT, Align, Plan, Routing, constant, repa, stop_at

CACHE, IMAGES = "cache/quickstart", 8192
"""The cache that `erw train` prepares where it is missing, with so many images."""

REPA = repa(4, 2.0)
# A quarter of the rate and fresh moments: what a faster warm-up leaves behind slows later learning.
ERW = replace(REPA, warmup=400, depth=2, warmup_input="noisy", warmup_lr=0.25, optimizer="fresh")
PAPER = Align(block=8, loss="nt_xent", weight=constant(0.5))
QUICKSTART = Run(
    steps=1200,
    model=Model(depth=12, width=128, heads=2, patch=2, projector=256),
    data=Data(cache=(CACHE,), batch_size=32),
    flow=Flow(times="logit_normal"),
    plan=ERW,
    optim=Optim(lr=2e-3, lr_warmup=50, ema=0.99),
    sample=Sample(steps=12, solver="adams"),
    log=Log(every=25, checkpoint=250),
)
DEBUG = QUICKSTART.replace(
    steps=12,
    model=Model(depth=4, width=32, heads=2, patch=2, projector=32),
    data=Data(cache=(CACHE,), batch_size=8),
    plan=replace(ERW, warmup=4, depth=1, align=repa(2, 2.0).align),
    sample=Sample(steps=4, solver="heun"),
    log=Log(every=4, checkpoint=8),
)
RDM = QUICKSTART.replace(
    steps=3000,
    model=Model(net="rdm", depth=6, width=512),
    data=replace(QUICKSTART.data, batch_size=128),
    flow=Flow(prediction="x"),
    plan=SIT,
    optim=replace(QUICKSTART.optim, lr=1e-3),
    sample=Sample(steps=50, solver="heun"),
)
STOPPED = Plan(align=(Align(block=4, weight=stop_at(2.0, over=3750)),))
TREAD = Plan(align=(), routing=Routing("tread", (3, 9), until=900))
SPRINT = Plan(align=(), routing=Routing("sprint", (3, 10), 0.25, "grid", 900, path_drop=0.1))
FUSED = replace(QUICKSTART.model, fusion=(3, 10))
RECIPES = {
    "quickstart": QUICKSTART,
    "quickstart_repa": QUICKSTART.replace(plan=REPA),
    "quickstart_sit": QUICKSTART.replace(plan=SIT),
    "quickstart_repa_stopped": QUICKSTART.replace(plan=STOPPED),
    "quickstart_paper": QUICKSTART.replace(plan=Plan(warmup=400, depth=2, align=(PAPER,))),
    "quickstart_tread": QUICKSTART.replace(plan=TREAD),
    "quickstart_sprint": QUICKSTART.replace(model=FUSED, plan=SPRINT),
    "debug": DEBUG,
    "quickstart_reg": QUICKSTART.replace(
        model=replace(QUICKSTART.model, class_token="denoised"), plan=REPA
    ),
    "quickstart_rcg": QUICKSTART.replace(
        model=replace(QUICKSTART.model, class_token="given"), plan=SIT
    ),
    "quickstart_rdm": RDM,
    "quickstart_muon": QUICKSTART.replace(plan=REPA, optim=replace(QUICKSTART.optim, name="muon")),
}
