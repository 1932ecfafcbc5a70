"""Named runs: frozen values, each with a line of lab note."""

import tomllib
from dataclasses import replace
from pathlib import Path

from erw.config import Run
from erw.errors import ConfigError, nearest
from erw.recipes import imagenet, methods, quickstart

_NOTES: dict[str, str] = tomllib.loads(Path(__file__).with_name("notes.toml").read_text())
_RECIPES = quickstart.RECIPES | imagenet.RECIPES | methods.RECIPES


def names() -> tuple[str, ...]:
    """Every recipe's name."""
    return tuple(_RECIPES)


def recipe(name: str) -> Run:
    """The recipe of that name. Raises ConfigError if there is none."""
    if name not in _RECIPES:
        raise ConfigError(f"no recipe {name!r}{nearest(name, _RECIPES)}")
    return _RECIPES[name].replace(name=name)


def note(name: str) -> str:
    """The lab note of a recipe: what it is, and the score to expect."""
    return _NOTES[name]


def tiny(run: Run) -> Run:
    """The same run at a size that a CPU trains in seconds: every phase and option, few steps.

    Depths keep their proportion; the cache must be a small one (`--data.cache`).
    """
    model, plan = replace(run.model, fusion=run.model.fusion and (2, 3)), run.plan
    if plan.routing.kind != "none":
        plan = replace(plan, routing=replace(plan.routing, blocks=(2, 3), until=8))

    def shallow(depth: int) -> int:
        return max(1, round(depth * 4 / model.depth))

    align = [replace(term, block=shallow(term.block)) for term in plan.align]
    align = [replace(t, target_block=t.target_block and shallow(t.target_block)) for t in align]
    if model.head_depth:
        model = replace(model, head_depth=1, head_width=64, head_heads=2)
    return run.replace(
        name=f"{run.name}-tiny",
        steps=12,
        model=replace(
            model,
            depth=4,
            width=32,
            heads=2,
            projector=32,
            input_size=None,
            channels=None,
            internal=model.internal and shallow(model.internal),
        ),
        data=replace(run.data, batch_size=8),
        plan=replace(
            plan,
            warmup=4 if plan.warmup else 0,
            depth=shallow(plan.depth),
            align=tuple(align),
            warmup_batch=8 if plan.warmup_batch else None,
        ),
        optim=replace(run.optim, lr=1e-3, accumulate=1, compile=False, lr_warmup=0),
        sample=replace(run.sample, steps=4),
        log=replace(run.log, every=4, checkpoint=8),
    )
