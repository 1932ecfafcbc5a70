"""Whether two results can be compared: every setting that changes a score, and where they differ.

What is compared (the run, its step, its weights) may differ; the settings below may not.
"""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from erw.errors import DataError

MEASURED = ("count", "resolution", "reference_count", "reference_statistics")
GENERATED = (
    *("solver", "steps", "guidance", "interval", "guided_channels", "autoguidance_weights"),
    *("shift", "atol", "rtol", "path", "labels", "vae", "vae_weights", "precision", "ema"),
)
"""Settings that a generation carries."""


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Everything that makes two results (`Scores.to_dict()`, or its JSON) not comparable, in words.

    A generation and images of unknown origin differ in whatever is not stated.
    """
    both = [json.loads(json.dumps(result)) for result in (one, other)]  # a tuple is a list
    pairs: dict[str, list[Any]] = {name: [r.get(name) for r in both] for name in MEASURED}
    scores = sorted(both[0]["values"].keys() & both[1]["values"].keys())
    for name, score in product(("encoder", "weights"), scores):
        pairs[f"{name} of {score}"] = [r["features"][score][name] for r in both]
    relative = any(score.startswith("fdr") for score in scores)
    for name in ("validation", "reference") if relative else ("reference",):
        hashes = [r[f"{name}_hash"] for r in both]
        if hashes[0] != hashes[1]:
            pairs[name] = [
                f"{r[name]} ({r[f'{name}_hash'][:8]})" if r[name] else None for r in both
            ]
    settings = [result.get("settings") or {} for result in both]
    for each in settings:
        if each.get("guidance") == 1:
            each.pop("interval", None)  # without effect
    pairs |= {name: [s.get(name) for s in settings] for name in GENERATED}
    texts = {n: ["not stated" if v is None else v for v in values] for n, values in pairs.items()}
    return [f"{name} {a} here, {b} there" for name, (a, b) in texts.items() if a != b]


def read_result(path: str | Path) -> dict[str, Any]:
    """A result from `erw eval --out`, or the last one of a `scores.jsonl`.

    Raises FileNotFoundError, or DataError for a file without a result.
    """
    text = Path(path).read_text(encoding="utf-8").strip()
    try:
        result = json.loads(text.rpartition("\n")[2])
        result["values"], result["features"]
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise DataError(f"{path} holds no result: expected a file of erw eval --out") from error
    return result
