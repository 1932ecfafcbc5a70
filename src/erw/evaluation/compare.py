"""Whether two results can be compared: every setting that changes a score, and where they differ.

What is compared (the run, its step, its weights) may differ. The settings below may not: FID of 50
steps and of 250, with and without guidance, of 10,000 images and of 50,000 are different numbers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from erw.errors import DataError

MEASURED = ("count", "resolution", "reference_count", "reference_statistics")
GENERATED = (
    *("solver", "steps", "guidance", "interval", "guided_channels", "autoguidance_weights"),
    *("shift", "atol", "rtol", "path", "labels", "vae", "vae_weights", "precision", "ema"),
)
"""Settings that a generation carries."""


class Difference(NamedTuple):
    """A setting in which two results differ; None: not stated."""

    name: str
    one: Any
    other: Any

    def __str__(self) -> str:
        one, other = ("not stated" if v is None else v for v in (self.one, self.other))
        return f"{self.name} {one} here, {other} there"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Everything that makes two results (`Scores.to_dict()`, or its JSON) not comparable.

    A generation and images of unknown origin differ in whatever is not stated.
    """
    both = [json.loads(json.dumps(result)) for result in (one, other)]  # a tuple is a list
    pairs = [Difference(name, *(r.get(name) for r in both)) for name in MEASURED]
    scores = sorted(both[0]["values"].keys() & both[1]["values"].keys())
    for name in ("encoder", "weights"):
        for score in scores:
            networks = (r["features"][score][name] for r in both)
            pairs.append(Difference(f"{name} of {score}", *networks))
    relative = any(score.startswith("fdr") for score in scores)
    for name in ("validation", "reference") if relative else ("reference",):
        if both[0][f"{name}_hash"] != both[1][f"{name}_hash"]:
            images = (f"{r[name]} ({r[f'{name}_hash'][:8]})" if r[name] else None for r in both)
            pairs.append(Difference(name, *images))
    settings = [result.get("settings") or {} for result in both]
    for each in settings:
        if each.get("guidance") == 1:
            each.pop("interval", None)  # without effect
    pairs += [Difference(name, *(s.get(name) for s in settings)) for name in GENERATED]
    return [pair for pair in pairs if pair.one != pair.other]


def read_result(path: str | Path) -> dict[str, Any]:
    """A result from `erw eval --out`, or the last one of a `scores.jsonl`.

    Raises FileNotFoundError, or DataError for a file without a result.
    """
    text = Path(path).read_text(encoding="utf-8").strip()
    for part in (text, text.rpartition("\n")[2]):
        try:
            result = json.loads(part)
            if {"values", "features"} <= result.keys():
                return result
        except (json.JSONDecodeError, AttributeError):
            continue
    raise DataError(f"{path} holds no result: expected a file of erw eval --out, or its scores")
