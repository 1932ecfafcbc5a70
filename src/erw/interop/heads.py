"""Alignment heads (projectors) that a fine-tuned run takes over from what it starts from."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from erw.config import Run, from_dict
from erw.errors import CheckpointError
from erw.interop.pretrained import load_pretrained
from erw.training.checkpoint import paths, read
from erw.training.init import Init
from erw.training.trained import RECIPE, read_recipe


def with_heads(init: Init, encoders: Sequence[str], **told: Any) -> Init:
    """`init` with the alignment heads of its source for these encoders.

    Heads go by the encoder's name where the source has names (a run of ours), else by their order.

    Args:
        encoders: whose features the run aligns with, in the run's order.
        told: how a released file is read: layout, num_heads, depth.

    Raises:
        CheckpointError: the source has no heads, or none for one of the encoders.
    """
    heads, names = _heads(Path(init.source), told)
    count = len({key.split(".")[0] for key in heads})
    if not heads:
        raise CheckpointError(
            f"{init.source} holds no alignment heads (a run's are in its checkpoints); leave out "
            "--init-projectors"
        )
    missing = [name for name in encoders if names and name not in names]
    if missing or not encoders or (not names and count != len(encoders)):
        has = ", ".join(names) or f"{count} without names"
        raise CheckpointError(
            f"{init.source} has alignment heads for {has}, the run aligns with "
            f"{', '.join(encoders) or 'nothing'}; leave out --init-projectors"
        )
    taken = {
        f"{place}.{key.partition('.')[2]}": value
        for place, name in enumerate(encoders)
        for key, value in heads.items()
        if key.startswith(f"{names.index(name) if names else place}.")
    }
    return dataclasses.replace(
        init,
        projectors=taken,
        identity=f"{init.identity}-heads",
        said=f"{init.said}; with its alignment heads for {', '.join(encoders)}",
    )


def _heads(source: Path, told: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Heads by name ("0.2.weight" is of head 0, layer 2), averaged; and their encoders' names."""
    if not (source / RECIPE).is_file():
        if source.is_dir():
            return {}, ()
        found = load_pretrained(source, **told)
        return found.projectors.state_dict(), ()
    own, kept = "ema.projectors.", paths(source / "checkpoints")
    tensors = read(kept[-1])[0] if kept else {}
    names = from_dict(Run, read_recipe(source)["resolved"]).data.features
    return {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}, names
