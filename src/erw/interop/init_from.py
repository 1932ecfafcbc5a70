"""Fine-tuning: a run of ours or a released checkpoint as what another run begins with."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from erw.config import Run
from erw.errors import CheckpointError, ConfigError
from erw.interop.layouts import TABLE
from erw.interop.pretrained import alignment_heads
from erw.training.checkpoint import paths, read
from erw.training.trained import Trained, is_run

OF_THE_RUN = ("projector", "input_size", "channels", "num_classes")


def adopt(run: Run, model: Trained) -> Run:
    """The run with the architecture, path and prediction of the model that it begins with."""
    own, flow, theirs = {k: getattr(run.model, k) for k in OF_THE_RUN}, run.flow, model.run.flow
    if flow.objective == theirs.objective:  # `starting_point` refuses another
        flow = dataclasses.replace(flow, path=theirs.path, prediction=theirs.prediction)
    return run.replace(model=dataclasses.replace(model.run.model, **own), flow=flow)


def starting_point(
    model: Trained,
    run: Run,
    class_names: Sequence[str],
    num_classes: int,
    *,
    projectors: bool = False,
) -> Trained:
    """`model` adapted to a resolved `run` on data of `num_classes` classes named `class_names`.

    Label rows go by name where both sides have names; otherwise they stay where they are if there
    are as many. A new class begins as the null class. With `projectors` the alignment heads for the
    run's targets come along: by name from a run of ours, by order from a released file.

    Raises ConfigError, CheckpointError: the run has another objective, prediction or targets.
    """
    theirs, ours = model.run.flow, run.flow
    for name in ("objective", "prediction"):
        if getattr(ours, name) != getattr(theirs, name):
            both = f"{getattr(ours, name)}, {model.source} has {getattr(theirs, name)}"
            raise ConfigError(f"flow.{name} is {both}; leave it out, or choose a recipe with it")
    words = [model.origin or f"run {model.run.name} after {model.step} steps"]
    net, heads = copy.deepcopy(model.net), nn.ModuleList()
    if (table := dict(net.named_parameters()).get(TABLE)) is not None:
        rows, message = label_rows(model.class_names, len(table) - 1, class_names, num_classes)
        table.data = table.data[[*rows, len(table) - 1]]
        net.null_class = num_classes
        words.append(message)
    if projectors:
        heads = _heads(model, run)
        words.append(f"with its alignment heads for {', '.join(n for n, _ in _targets(run))}")
    sizes = dataclasses.replace(model.run.model, num_classes=net.null_class)
    started: dict[str, Any] = {
        "class_names": tuple(class_names),
        "empty_classes": (),  # the cache's take the place of its own
        "projectors": heads,
        "origin": "; ".join(words),
    }
    return dataclasses.replace(model, net=net, run=model.run.replace(model=sizes), **started)


def label_rows(
    old: Sequence[str], old_count: int, new: Sequence[str], new_count: int
) -> tuple[list[int], str]:
    """For each new class the row of the old table that it begins as, and that in words.

    `old` and `new` are names, empty where unknown. Row `old_count` is the null class.
    """
    if old and new:
        by_name = {name: row for row, name in enumerate(old)}
        rows = [by_name.get(name, old_count) for name in new]
        matched = sum(name in by_name for name in new)
        return rows, f"{matched} of {new_count} classes by name, the others from no class"
    if old_count == new_count:
        return list(range(new_count)), f"{new_count} classes as they are"
    return [old_count] * new_count, f"{new_count} classes, all from no class"


def _heads(model: Trained, run: Run) -> nn.ModuleList:
    """The model's alignment heads, if they are for the run's targets."""
    targets, heads, ours = _targets(run), model.projectors, list[tuple[str, str]]()
    saved = paths(Path(model.source) / "checkpoints") if is_run(model.source) else ()
    if saved:  # the average's, in the newest checkpoint
        tensors, stem, ours = read(saved[-1])[0], "ema.projectors.", _targets(model.run)
        tensors = {k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)}
        heads = alignment_heads(tensors, model.net.width, [kind for _, kind in ours], saved[-1])
    if not targets or len(heads) != len(targets) or ours not in ([], targets):
        has = ", ".join(name for name, _ in ours) or f"{len(heads)} without names"
        raise CheckpointError(
            f"{model.source} has alignment heads for {has}, the run aligns with "
            f"{', '.join(name for name, _ in targets) or 'nothing'}; leave out --init-projectors"
        )
    return heads


def _targets(run: Run) -> list[tuple[str, str]]:
    """What each projector of a resolved run aligns with (an encoder, or another target), and its
    kind."""
    pairs = ((t, name) for t in run.plan.active for name in t.encoders(run.data.features) or [""])
    return [(name or term.target, term.projector) for term, name in pairs]
