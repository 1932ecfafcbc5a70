"""Tar archives and WebDataset shards, read in place: nothing is unpacked."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from ..errors import DataError
from .files import Entry
from .images import EXTENSIONS, WHITE, Unreadable, decode
from .labels import classes

LABELS = (".cls", ".json", ".txt")
_JSON_KEYS = ("label", "cls", "class")


class Place(NamedTuple):
    """Where a file's bytes lie: in which archive, from where, how many."""

    archive: int
    start: int
    size: int


class Tars:
    """The bytes inside one or more uncompressed tar archives, by path; safe from any thread.

    Headers are read once, then any member with one `pread`. Of members of equal path the last
    counts, as tar has it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.root, self.paths = paths[0], tuple(paths)
        self._files: dict[int, int] = {}
        self._places: dict[str, Place] = {}
        for number, path in enumerate(self.paths):
            self._index(number, path)

    def _index(self, number: int, path: Path) -> None:
        last = 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    last = max(last, archive.offset)  # the next header
                    parts = member.name.removeprefix("./").split("/")
                    if member.isfile() and not any(part.startswith(".") for part in parts):
                        place = Place(number, member.offset_data, member.size)
                        self._places[self.key(number, "/".join(parts))] = place
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"{path} is not a whole, uncompressed tar archive ({error}): copy it again, or "
                "uncompress it (images do not compress, and a member could not be read alone)"
            ) from error
        self._files[number] = os.open(path, os.O_RDONLY)
        ends = [p.start + p.size for p in self._places.values() if p.archive == number]
        end = -(-max(ends, default=0) // 512) * 512
        # Cut at a header it would pass for a shorter archive: a whole one ends with empty blocks.
        if os.pread(self._files[number], 512, max(end, last)) != bytes(512):
            raise DataError(f"{path} is cut short: copy it again")

    def key(self, number: int, name: str) -> str:
        """The path of a member; with several archives, the archive's name comes first."""
        return name if len(self.paths) == 1 else f"{self.paths[number].name}/{name}"

    def entries(self) -> Iterator[Entry]:
        for key, place in self._places.items():
            yield Entry(key, place.size)

    def read(self, key: str) -> bytes:
        archive, start, size = self._places[key]
        data = os.pread(self._files[archive], size, start)
        if len(data) != size:
            raise Unreadable("cut short inside the archive")
        return data

    def where(self, key: str) -> str:
        archive = self.paths[self._places[key].archive]
        return f"{archive}!{key.removeprefix(f'{archive.name}/')}"

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def __getstate__(self) -> tuple[Path, ...]:
        return self.paths

    def __setstate__(self, paths: tuple[Path, ...]) -> None:
        self.__init__(paths)  # type: ignore[misc]


class WebDataset:
    """Shards of a WebDataset: files of one name up to its first dot make one sample.

    Labels are in NAME.cls (a number), NAME.json ("label", "cls" or "class") or, failing these,
    NAME.txt (a class name); without any the set has no classes.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        labelled: bool = True,
        background: tuple[int, int, int] = WHITE,
    ) -> None:
        self.files, self.background = Tars(sorted(paths)), background
        self.name = paths[0].parent.name if len(paths) > 1 else paths[0].name
        samples: dict[str, dict[str, str]] = {}
        sizes: dict[str, int] = {}
        for key, size, _ in self.files.entries():
            folder, _, name = key.rpartition("/")
            stem, _, ending = name.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[f".{ending.lower()}"] = key
            sizes[key] = size
        self._keys: list[str] = []
        told: list[int | str | None] = []
        for sample in samples.values():
            images = [key for ending, key in sample.items() if _last(ending) in EXTENSIONS]
            if images:
                self._keys.append(images[0])
                told.append(self._told(sample) if labelled else None)
        if not self._keys:
            raise DataError(f"no images in {self.files.root}: expected a WebDataset or images")
        self.class_names, labels = classes(told, where=str(self.files.root))
        self._labels = np.asarray(labels, dtype=np.int32)
        digest = blake3(json.dumps([self.class_names, background]).encode())
        for key, label in zip(self._keys, labels, strict=True):
            digest.update(f"{key}\0{sizes[key]}\0{label}\n".encode())
        self._fingerprint = digest.hexdigest()[:32]

    def _told(self, sample: dict[str, str]) -> int | str | None:
        for ending in LABELS:
            if ending not in sample:
                continue
            text = self.files.read(sample[ending]).decode("utf-8", "replace").strip()
            try:
                if ending == ".cls":
                    return int(text)
                if ending == ".txt":
                    return text
                table = json.loads(text)
                found = next((table[key] for key in _JSON_KEYS if key in table), None)
                if found is not None:
                    return found if isinstance(found, int) else str(found)
            except (ValueError, TypeError) as error:
                where = self.files.where(sample[ending])
                raise DataError(f"{where} is no label ({error})") from error
        return None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        data = self.files.read(self._keys[index])
        return decode(data, background=self.background), int(self._labels[index])

    def where(self, index: int) -> str:
        """The archive and member of image `index`."""
        return self.files.where(self._keys[index])

    def fingerprint(self) -> str:
        """Of members' names and sizes, labels, class names and the background colour."""
        return self._fingerprint


def is_webdataset(files: Tars) -> bool:
    """Whether images have label files of the same stem beside them."""
    keys = {key for key, *_ in files.entries()}
    images = (key for key in keys if _last(key) in EXTENSIONS)
    first = next(iter(sorted(images)), None)
    if first is None:
        return False
    folder, _, name = first.rpartition("/")
    stem = f"{folder}/" * bool(folder) + name.partition(".")[0]
    return any(f"{stem}{ending}" in keys for ending in LABELS)


def _last(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()
