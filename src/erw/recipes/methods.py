"""What the field found after ERW, a recipe each, on SiT-XL/2 and on the built-in images. Blocks and
weights of SiT-XL/2 are those of the papers or their code; docs/methods.md describes the methods.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from erw.config import Run
from erw.plan import Align, Plan, constant, stop_at
from erw.recipes import imagenet, quickstart


class Setting(NamedTuple):
    """A run without alignment, and what of the methods depends on its model and cache."""

    base: Run
    block: int  # whose output is aligned
    late: int  # the later block that it is aligned with
    weight: float  # of REPA
    encoders: tuple[str, str]
    vae: str


XL = Setting(imagenet.SIT_XL, 8, 16, 0.5, ("dinov2-b", "clip-l"), "sd-vae-ft-ema")
SMALL = Setting(
    quickstart.RECIPES["quickstart_sit"], 4, 8, 2.0, ("efficientnet-lite0", "efficientnet-lite2"),
    "openmoji-f4c4",
)  # fmt: skip


def methods(setting: Setting) -> dict[str, Run]:
    """Suffix of the name -> recipe."""
    base, block, late, repa, (first, second), vae = setting

    def align(weight: float, target: str = "encoder", **changes: Any) -> Align:
        options: dict[str, Any] = {"block": block, "target": target} | changes
        options |= {} if target.startswith("encoder") else {"phase": "full"}
        return Align(weight=constant(weight), **options)

    terms: dict[str, tuple[Align, ...]] = {
        "irepa": (align(2 * repa, projector="conv", normalize="irepa"),),
        "layersync": (align(0.2, "block", target_block=late, projector="none"),),
        "sra": (align(0.5, "ema", target_block=round(base.model.depth * 0.7), earlier=0.2),),
        "vae_repa": (align(repa, f"encoder:vae:{vae}"),),
        "dispersive": (
            align(0.25, "none", block=base.model.depth, projector="none", loss="dispersive"),
        ),
        "multi": (
            align(repa, f"encoder:{first}"),
            align(repa / 2, f"encoder:{second}", name="second", block=late),
        ),
    }
    return {suffix: base.replace(plan=Plan(align=aligned)) for suffix, aligned in terms.items()} | {
        "ig": base.replace(
            model=replace(base.model, internal=block), sample=replace(base.sample, internal=1.4)
        ),
        "cfm": base.replace(flow=replace(base.flow, contrastive=0.05)),
    }


def haste(setting: Setting, teacher: str, *, heads: int, blocks: range, over: int) -> Run:
    """HASTE: features after `block`, and for half a weight in all the attention of `blocks` with
    that of `teacher`, of so many heads, four blocks later; both for `over` steps."""
    features = Align(
        block=setting.block, target=f"encoder:{setting.encoders[0]}",
        weight=stop_at(setting.weight, over=over),
    )  # fmt: skip
    attention = (
        Align(
            name=f"attention{block}", block=block, heads=heads, projector="none", loss="attention",
            target=f"encoder:{teacher}#attention{block + 4}",
            weight=stop_at(0.5 / len(blocks), over=over),
        )
        for block in blocks
    )  # fmt: skip
    return setting.base.replace(plan=Plan(align=(features, *attention)))


def self_transcendence(setting: Setting, teacher: str) -> Run:
    """Its second phase: for half the steps aligned with guided tokens of an earlier run."""
    target, half = f"encoder:run:runs/{teacher}#{setting.late}:30", setting.base.steps // 2
    term = Align(block=setting.block, target=target, weight=stop_at(setting.weight, over=half))
    return setting.base.replace(plan=Plan(align=(term,)))


def best(sprint: Run) -> Run:
    """SPRINT with modern blocks, guided by a second head in front of its routed blocks (`erw study
    third`)."""
    parts: dict[str, Any] = {"rope": True, "qk_norm": True, "norm": "rms", "mlp": "swiglu"}
    internal = sprint.plan.routing.blocks[0] - 1
    return sprint.replace(
        model=replace(sprint.model, internal=internal, **parts),
        sample=replace(sprint.sample, internal=1.4),
    )


RECIPES = {f"sit_xl2_in256_{suffix}": run for suffix, run in methods(XL).items()}
RECIPES["sit_xl2_in256_haste"] = haste(XL, "dinov2-b", heads=12, blocks=range(5, 9), over=250_000)
RECIPES |= {f"quickstart_{suffix}": run for suffix, run in methods(SMALL).items()}
RECIPES["sit_xl2_in256_self"] = self_transcendence(XL, "sit_xl2_in256_vae_repa")
RECIPES["quickstart_haste"] = haste(
    SMALL, "run:runs/quickstart_repa", heads=SMALL.base.model.heads, blocks=range(3, 5), over=750
)
# Half the batch for twice the steps, and as large a share of them with all tokens.
RECIPES["best"] = best(quickstart.RECIPES["quickstart_sprint"]).replace(
    steps=2 * quickstart.QUICKSTART.steps,
    data=replace(quickstart.QUICKSTART.data, batch_size=16),
    plan=replace(quickstart.SPRINT, routing=replace(quickstart.SPRINT.routing, until=1800)),
)
RECIPES["sit_xl2_in256_best"] = best(imagenet.RECIPES["sit_xl2_in256_sprint"])
RECIPES["quickstart_self"] = self_transcendence(SMALL, "quickstart_vae_repa")
