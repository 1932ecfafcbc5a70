"""Whether two results can be compared: every setting that changes a score, and where they differ.

What is being compared (the run, its step, its weights) may differ. What is listed here may not: FID
of 50 steps and of 250, with and without guidance, of 10,000 images and of 50,000 are other numbers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from erw.errors import DataError

MEASURED = {
    "count": "images",
    "resolution": "resolution",
    "reference_count": "images of the reference",
    "reference_statistics": "statistics of the reference",
}
"""Fields of a result -> in words; the reference itself is compared by hash where there is one."""
FEATURES = {
    "encoder": "features (and their resize)",
    "encoder_weights": "weights of the features' network",
}
"""The same for the network: of each score where a result says it, else of the whole result."""
GENERATED = {
    "solver": "solver",
    "steps": "sampling steps",
    "guidance": "guidance",
    "interval": "guidance interval",
    "guided_channels": "guided channels",
    "autoguidance_weights": "weaker model of autoguidance",
    "shift": "time shift of sampling",
    "atol": "absolute tolerance of sampling",
    "rtol": "relative tolerance of sampling",
    "path": "path",
    "labels": "labels",
    "vae": "VAE",
    "vae_weights": "VAE's weights",
    "precision": "precision of sampling",
    "ema": "EMA decay",
}
"""The same for the settings that a generation carries."""


class Difference(NamedTuple):
    """A setting that two results differ in. None: it is not stated."""

    name: str
    here: Any
    there: Any

    def __str__(self) -> str:
        here, there = ("not stated" if v is None else v for v in (self.here, self.there))
        return f"{self.name} {here} here, {there} there"


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Difference]:
    """Everything that makes two results (`Scores.to_dict()`, or its JSON) not comparable.

    A generation against images of unknown making differs in whatever is not stated.
    """
    found = [
        Difference(words, *pair)
        for key, words in MEASURED.items()
        if (pair := (_plain(here.get(key)), _plain(there.get(key))))[0] != pair[1]
    ]
    found += _features(here, there)
    validation = [r.get("validation_hash") or r.get("validation") or None for r in (here, there)]
    if validation[0] != validation[1] and _shared(here, there, "fdr"):
        names = (r.get("validation") or None for r in (here, there))
        found.append(Difference("validation images", *names))
    kinds = [r.get("reference_hash") or r.get("reference") for r in (here, there)]
    if kinds[0] != kinds[1]:
        found.append(Difference("reference", *(r.get("reference") for r in (here, there))))
    made = [_made(result) for result in (here, there)]
    if not any(made):
        return found
    for key, words in GENERATED.items():
        a, b = (_plain(settings.get(key)) for settings in made)
        if a != b:
            found.append(Difference(words, a, b))
    return found


def read_result(path: str | Path) -> dict[str, Any]:
    """A result from `erw eval --out`, or the last one of a `scores.jsonl`.

    Raises FileNotFoundError, or DataError for a file that holds no result.
    """
    path = Path(path)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        try:
            result = json.loads("\n".join(lines))
        except json.JSONDecodeError:
            result = json.loads(lines[-1])
    except (json.JSONDecodeError, IndexError):
        result = None
    if not isinstance(result, dict) or not isinstance(result.get("values"), dict):
        raise DataError(f"{path} holds no result: expected a file of erw eval --out, or its scores")
    return result


def _features(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Difference]:
    """The networks of the scores that both have, or where one does not say these, of all."""
    shared = [
        name
        for name in _shared(here, there)
        if all(name in (r.get("features") or {}) for r in (here, there))
    ]
    if not shared:
        return [
            Difference(words, here.get(key), there.get(key))
            for key, words in FEATURES.items()
            if here.get(key) != there.get(key)
        ]
    found = []
    for key, words in FEATURES.items():
        short = key.removeprefix("encoder_")
        for name in shared:
            a, b = (r["features"][name].get(short) for r in (here, there))
            if a != b:
                found.append(Difference(f"{words} of {name}", a, b))
    return found


def _shared(here: Mapping[str, Any], there: Mapping[str, Any], start: str = "") -> list[str]:
    """Scores that both have."""
    names = (here.get("values") or {}).keys() & (there.get("values") or {}).keys()
    return sorted(name for name in names if name.startswith(start))


def _made(result: Mapping[str, Any]) -> dict[str, Any]:
    """How the images were made. With guidance 1 its interval is without effect."""
    settings = dict(result.get("settings") or {})
    if settings.get("guidance") == 1:
        settings.pop("interval", None)
    return settings


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
