"""Named runs: frozen values, each with its lab note.

A recipe is a `Run`; `note(name)` tells where its numbers come from, what it needs and what to
expect; `tiny(run)` is its twin that runs on a CPU in seconds.
"""

import dataclasses

from erw.config import Run, nearest
from erw.errors import ConfigError
from erw.recipes import imagenet, quickstart

_RECIPES: dict[str, tuple[Run, str]] = {
    **quickstart.RECIPES,
    **imagenet.RECIPES,
}


def names() -> tuple[str, ...]:
    """Every recipe's name."""
    return tuple(_RECIPES)


def recipe(name: str) -> Run:
    """The recipe of that name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    return _entry(name)[0]


def note(name: str) -> str:
    """The lab note of a recipe: source, hardware, hours, expected score, command."""
    return _entry(name)[1]


def tiny(run: Run) -> Run:
    """The same run at a size that a CPU trains in seconds: every phase and option, few steps.

    Depths keep their proportion; the cache must be a small one (`--data.cache`).
    """
    model, plan = run.model, run.plan
    share = 4 / model.depth

    def shallow(depth: int) -> int:
        return max(1, round(depth * share))

    return run.replace(
        name=f"{run.name}-tiny",
        steps=12,
        model=dataclasses.replace(
            model, depth=4, width=32, heads=2, projector=32, input_size=None, channels=None
        ),
        data=dataclasses.replace(run.data, batch_size=8),
        plan=dataclasses.replace(
            plan,
            warmup=4 if plan.warmup else 0,
            depth=shallow(plan.depth),
            align=tuple(
                dataclasses.replace(
                    term,
                    block=shallow(term.block),
                    target_block=term.target_block and shallow(term.target_block),
                )
                for term in plan.align
            ),
            warmup_batch=8 if plan.warmup_batch else None,
        ),
        optim=dataclasses.replace(run.optim, lr=1e-3, accumulate=1, compile=False, lr_warmup=0),
        sample=dataclasses.replace(run.sample, steps=4),
        log=dataclasses.replace(run.log, every=4, checkpoint=8),
    )


def _entry(name: str) -> tuple[Run, str]:
    if name not in _RECIPES:
        raise ConfigError(f"no recipe {name!r}{nearest(name, _RECIPES)}")
    return _RECIPES[name]
