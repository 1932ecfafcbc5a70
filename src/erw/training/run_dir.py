"""A run's folder: who may write in it, and whether what is there is this run."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import erw
from erw.config import Run, from_dict, to_dict
from erw.data.cache import Cache
from erw.errors import CheckpointError, FolderInUseError
from erw.models.cost import StepCost
from erw.training.init import init_record
from erw.training.trained import RDM, RECIPE, Trained, read_recipe

MAY_CHANGE = (
    "steps",
    "data.cache",
    "log.every",
    "log.checkpoint",
    "log.keep",
    "log.snapshot",
    "log.preview",
    "sample.",
    "eval.",
)
"""Settings that another start of the same run may change: they alter no step already made.

A cache may lie elsewhere: what it holds is compared by its hash.
"""


@contextlib.contextmanager
def locked(folder: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder; released by the system however the process ends.

    If another process holds it, `waiting` is called and it is waited for.

    Raises:
        FolderInUseError: another process holds it, and no `waiting` is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if waiting is None:
                raise FolderInUseError(
                    f"another process is training in {folder}; wait for it, or choose another --out"
                ) from error
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim(
    folder: Path,
    run: Run,
    resolved: Run,
    cache: Cache,
    cost: StepCost,
    *,
    init: Trained | None = None,
) -> str:
    """The text of `recipe.json`, once the one that is there is found to be of the same run.

    Raises:
        CheckpointError: the folder holds another run, or other files; the first differences are
        named.
    """
    begins_with = init_record(init) if init else None
    if (folder / RECIPE).exists():
        there = read_recipe(folder)
        # Settings that came after that run was begun have their defaults in it.
        before = to_dict(from_dict(Run, there["resolved"]))
        different = differences(before, to_dict(resolved))
        if there["cache"]["identity"] != cache.identity:
            different.append(f"the contents of data.cache {cache.where}")
        began, begins = (there.get("init") or {}), (begins_with or {})
        if began.get("identity") != begins.get("identity"):
            one, two = (of.get("source", "fresh weights") for of in (began, begins))
            different.append(f"what it begins with: {one} (there) against {two}")
        if different:
            raise CheckpointError(
                f"{folder} holds another run, which differs in {'; '.join(different[:4])}; "
                "choose another --out, or give the same settings to go on with it"
            )
    elif any(path.name != RDM and not path.name.startswith(".") for path in folder.iterdir()):
        raise CheckpointError(f"{folder} holds other files and no run; choose an empty --out")
    recipe = {
        "erw": erw.__version__,
        "torch": torch.__version__,
        "run": to_dict(run),
        "resolved": to_dict(resolved),
        "cache": {
            "identity": cache.identity,
            "rows": len(cache),
            "vae": cache.vae["name"],
            # Where the cache measured it: samples are decoded with the same.
            "scaling": getattr(cache, "scaling", None),
            "class_names": list(cache.class_names),
        },
        "cost": cost.__dict__,
        "init": begins_with,
    }
    return json.dumps(recipe, indent=1) + "\n"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """'optim.lr 0.0001 (there) against 0.0002', for every setting that may not change."""
    before, after = json_flat(old), json_flat(new)
    return [
        f"{key} {before.get(key)!r} (there) against {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]


def json_flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, with tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= json_flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
