"""Fine-tuning: a run of ours or a released checkpoint as what another run begins with."""

import copy
import dataclasses
from collections.abc import Sequence

from erw.config import Run
from erw.errors import ConfigError
from erw.interop.layouts import TABLE
from erw.training.trained import Trained

OF_THE_RUN = ("projector", "input_size", "channels", "num_classes")


def adopt(run: Run, model: Trained) -> Run:
    """The run with the architecture, path and prediction of the model that it begins with."""
    own, flow, theirs = {k: getattr(run.model, k) for k in OF_THE_RUN}, run.flow, model.run.flow
    if flow.objective == theirs.objective:  # `starting_point` refuses another
        flow = dataclasses.replace(flow, path=theirs.path, prediction=theirs.prediction)
    return run.replace(model=dataclasses.replace(model.run.model, **own), flow=flow)


def starting_point(
    model: Trained, run: Run, class_names: Sequence[str], num_classes: int
) -> Trained:
    """`model` adapted to a resolved `run` on data of `num_classes` classes named `class_names`.

    Label rows go by name where both sides have names; otherwise they stay where they are if there
    are as many. A new class begins as the null class. Alignment heads are new.

    Raises ConfigError if the run has another objective or prediction.
    """
    theirs, ours = model.run.flow, run.flow
    for name in ("objective", "prediction"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"flow.{name} is {getattr(ours, name)}, {model.source} has "
                f"{getattr(theirs, name)}; leave it out, or choose a recipe that has it"
            )
    words = [model.origin or f"run {model.run.name} after {model.step} steps"]
    net = copy.deepcopy(model.net)
    if (table := dict(net.named_parameters()).get(TABLE)) is not None:
        rows, message = label_rows(model.class_names, len(table) - 1, class_names, num_classes)
        table.data = table.data[[*rows, len(table) - 1]]
        net.null_class = num_classes
        words.append(message)
    sizes = dataclasses.replace(model.run.model, num_classes=net.null_class)
    settings, origin = model.run.replace(model=sizes), "; ".join(words)
    return dataclasses.replace(
        model, net=net, run=settings, class_names=tuple(class_names), origin=origin
    )


def label_rows(
    old: Sequence[str], old_count: int, new: Sequence[str], new_count: int
) -> tuple[list[int], str]:
    """For each new class the row of the old table that it begins as, and that in words.

    `old` and `new` are names, empty where unknown. Row `old_count` is the null class.
    """
    if old and new:
        by_name = {name: row for row, name in enumerate(old)}
        rows = [by_name.get(name, old_count) for name in new]
        known = sum(name in by_name for name in new)
        return rows, f"{known} of {new_count} classes by name, the others from no class"
    if old_count == new_count:
        return list(range(new_count)), f"{new_count} classes as they are"
    return [old_count] * new_count, f"{new_count} classes, all from no class"
