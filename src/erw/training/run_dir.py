"""A run's folder: whether what is in it is this run, and what its recipe.json says."""

from pathlib import Path
from typing import Any

import torch

import erw
from erw.config import Run, differences, from_dict, to_dict
from erw.data.cache import Cache
from erw.errors import CheckpointError
from erw.io import weight_hash
from erw.training.checkpoint import paths, step_of
from erw.training.flops import Ledger
from erw.training.trained import RDM, RECIPE, Trained, read_recipe

MAY_CHANGE = (
    "steps", "data.cache", "log.", "sample.", "eval.", "optim.on_nan", "optim.spike",
    "optim.recompute", "dist.",
)  # fmt: skip
"""Settings that another start of the same run may change: they alter no step already made. A cache
may lie elsewhere: its content is compared by a hash. `steps` may while no rate would change."""


def claim(
    folder: Path, run: Run, resolved: Run, cache: Cache, ledger: Ledger, *, init: Trained | None
) -> dict[str, Any]:
    """The content of `recipe.json`.

    Raises CheckpointError if the folder holds another run, naming differences, or other files.
    """
    recipe: dict[str, Any] = {
        "erw": erw.__version__,
        "torch": torch.__version__,
        "run": to_dict(run),
        "resolved": to_dict(resolved),
        "cache": {
            "identity": cache.identity,
            "rows": len(cache),
            "vae": cache.vae["name"],
            "scaling": getattr(cache, "scaling", None),  # if measured: samples are decoded with it
            "class_names": list(cache.class_names),
            "empty_classes": [i for i, count in enumerate(cache.class_counts() or ()) if not count],
        },
        "cost": {"teacher": ledger.teacher, "rates": [rate._asdict() for rate in ledger.rates]},
        "init": None,
    }
    if init:
        identity = weight_hash(init.net) + "-heads" * bool(len(init.projectors))
        recipe["init"] = dict(source=init.source, identity=identity, message=init.origin)
    if (folder / RECIPE).exists():
        before = read_recipe(folder)
        # Settings that came after that run was begun have their defaults in it.
        changes = differences(to_dict(from_dict(Run, before["resolved"])), recipe["resolved"])
        different = [change for change in changes if not change.startswith(MAY_CHANGE)]
        if before["erw"].startswith("0.1."):
            different.append(f"erw {before['erw']}, which read images in another order")
        elif before["cache"]["identity"] != cache.identity:
            different.append(f"the contents of data.cache {cache.address}")
        starts = [record.get("init") or {} for record in (before, recipe)]
        if starts[0].get("identity") != starts[1].get("identity"):
            sources = [start.get("source", "fresh weights") for start in starts]
            different.append(f"what it begins with ({sources[0]}, now {sources[1]})")
        made = max(map(step_of, paths(folder / "checkpoints")), default=0)
        old, factor = before["resolved"]["steps"], run.optim.lr_factor
        same = (factor(i, old) == factor(i, run.steps) for i in range(made * (old != run.steps)))
        if (kept := next((i for i, equal in enumerate(same) if not equal), made)) < made:
            reason = f"{run.optim.schedule} lets them change until step {kept}, not at {made}"
            different.append(f"steps ({old}, now {run.steps}; optim.schedule {reason})")
        if different:
            problem = f"{folder} holds another run, which differs in {'; '.join(different[:4])}"
            raise CheckpointError(f"{problem}; change --out")
    elif any(path.name != RDM for path in folder.glob("[!.]*")):
        raise CheckpointError(f"{folder} holds other files and no run; choose an empty --out")
    return recipe
