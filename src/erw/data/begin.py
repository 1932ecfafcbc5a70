"""What a cache is to hold: noted in a new folder, or agreed with what was noted there before."""

import json
from pathlib import Path
from typing import Any

from erw.data import growth
from erw.data.claims import settling
from erw.data.manifest import MANIFEST, REJECTED, SETTINGS
from erw.data.settings import begun, differences
from erw.data.sources import Source
from erw.errors import CacheError
from erw.io import write_text


def begin(out: Path, wanted: dict[str, Any], source: Source, *, append: bool) -> dict[str, Any]:
    """Note the settings in a new folder, or compare them with those it was begun with."""
    foreign = out.is_dir() and any(_foreign(item) for item in out.iterdir())
    if begun(out) is None:  # anew, and after looking: another rank may have begun it just now
        if append:
            raise CacheError(f"no cache at {out} to append to: leave --append out to begin one")
        if foreign:
            raise CacheError(f"{out} is no cache and not empty: choose another folder")
        (out / "shards").mkdir(parents=True, exist_ok=True)
    with settling(out):
        found = begun(out)
        if found is None:
            return write_settings(out, wanted)
        return _agreed(out, found, wanted, source, append=append)


def _agreed(
    out: Path, found: dict[str, Any], wanted: dict[str, Any], source: Source, *, append: bool
) -> dict[str, Any]:
    """The settings `found`, with one more source if that is what is wanted; errors if others."""
    known = wanted["source"] in growth.sources(found)
    names = [encoder["name"] for encoder in wanted["encoders"]]
    left_out = [e for e in found["encoders"] if "beside" in e and e["name"] not in names]
    before = found | {"encoders": [e for e in found["encoders"] if e not in left_out]}
    if known or append:
        before["source"] = wanted["source"]
        if wanted["source"] != found["source"] and found["crop"] != "random":
            before["seed"] = wanted["seed"]  # of the images; crops do not need it
    if changed := differences(before, wanted):
        hint = "choose another folder or remove it"
        if append:
            hint = "what is appended is made alike: leave these out"
        elif [change.split()[0] for change in changed] == ["source.fingerprint"]:
            hint = (
                "files or labels have changed since, or --classes, --columns, --split or --subset "
                "are not those that it was begun with; choose another folder for others"
            )
        elif all(change.startswith("source.") for change in changed):
            hint = f"choose another folder or delete {out}"
            if (out / MANIFEST).exists():
                hint = "if these images are to be added, say --append"
        elif all(change.startswith("encoders.") for change in changed):
            hint += ", or add an encoder to it with --add-encoder"
        raise CacheError(f"{out} was begun with other settings: {', '.join(changed)}; {hint}")
    if known:
        return found  # FLOPs may be counted otherwise by another torch: keep the first
    return write_settings(out, growth.append(out, found, source, wanted["source"]))


def part_of(
    settings: dict[str, Any], source: Source, told: dict[str, Any]
) -> tuple[growth.Part, int]:
    """The source with its rows' numbers and labels, and which of the cache's sources it is."""
    sources = growth.sources(settings)
    if told not in sources:
        names = ", ".join(f"{s['name']} ({s['count']} images)" for s in sources)
        raise CacheError(
            f"{source.name} ({told['count']} images) is not what the cache was made of, or has "
            f"changed since: expected {names}"
        )
    number = sources.index(told)
    classes = tuple(settings.get("class_names", source.class_names))
    first = sum(s["count"] for s in sources[:number])
    return growth.Part(source, first=first, class_names=classes), number


def write_settings(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are read back."""
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    write_text(out / SETTINGS, text)
    return json.loads(text)


def _foreign(item: Path) -> bool:
    """Something that no process beginning this cache just now would have put there."""
    if item.name == "shards" and item.is_dir():
        return any(not inner.name.startswith(".") for inner in item.iterdir())
    return not item.name.startswith(".") and item.name != REJECTED  # of images that were no use
