"""Whether two results can be compared: every setting that changes a score, and where they differ.

What is compared (the run, its step, its weights) may differ. The settings below may not: FID of 50
steps and of 250, with and without guidance, of 10,000 images and of 50,000 are different numbers.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from erw.errors import DataError

MEASURED = ("count", "resolution", "reference_count", "reference_statistics")
FEATURES = ("encoder", "weights")
"""Of the network of each score that both results have."""
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
    pairs = (Difference(d.name, _plain(d.one), _plain(d.other)) for d in _pairs(one, other))
    return [d for d in pairs if d.one != d.other]


def read_result(path: str | Path) -> dict[str, Any]:
    """A result from `erw eval --out`, or the last one of a `scores.jsonl`.

    Raises FileNotFoundError, or DataError for a file without a result.
    """
    text = Path(path).read_text(encoding="utf-8").strip()
    for part in (text, text.rpartition("\n")[2]):
        try:
            result = json.loads(part)
        except json.JSONDecodeError:
            continue
        if isinstance(result, dict) and isinstance(result.get("values"), dict):
            return result
    raise DataError(f"{path} holds no result: expected a file of erw eval --out, or its scores")


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    """Every setting of both, equal or not."""
    both = (one, other)
    for key in MEASURED:
        yield Difference(key, *(r.get(key) for r in both))
    shared = sorted((one.get("values") or {}).keys() & (other.get("values") or {}).keys())
    for key, score in product(FEATURES, shared):
        networks = ((r.get("features") or {}).get(score, {}) for r in both)
        yield Difference(f"{key} of {score}", *(network.get(key) for network in networks))
    relative = any(score.startswith("fdr") for score in shared)
    for key in ("validation", "reference") if relative else ("reference",):
        hashes = [r.get(f"{key}_hash") or r.get(key) or None for r in both]
        names = [r.get(key) or None for r in both]
        if names[0] == names[1] and hashes[0] != hashes[1]:  # other images under the same name
            names = [f"{n} ({str(h)[:8]})" for n, h in zip(names, hashes, strict=True)]
        yield Difference(key, *(names if hashes[0] != hashes[1] else hashes))
    settings = [_settings(r) for r in both]
    for key in GENERATED if any(settings) else ():
        yield Difference(key, *(s.get(key) for s in settings))


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """How the images were generated. With guidance 1 its interval is without effect."""
    settings = dict(result.get("settings") or {})
    if settings.get("guidance") == 1:
        settings.pop("interval", None)
    return settings


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
