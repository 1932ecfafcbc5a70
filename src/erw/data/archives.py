"""Tar archives and WebDataset shards, read in place: nothing is unpacked."""

import errno
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from erw.data.files import Entry, hidden, named_bytes
from erw.data.images import EXTENSIONS, WHITE, Unreadable, decode
from erw.data.labels import classes
from erw.data.limits import lift_file_limit
from erw.errors import DataError

LABELS = (".cls", ".json", ".txt")
_JSON_KEYS = ("label", "cls", "class")
_CAPTIONS = 20  # images from which texts that mostly differ are taken for captions


class Place(NamedTuple):
    """Where a file's bytes lie: in which archive, from where, how many."""

    archive: int
    start: int
    size: int


class Tars:
    """The bytes inside one or more uncompressed tar archives, by path; safe from any thread.

    Headers are read once, then any member with one `pread`. Of members of equal path the last
    counts, as tar has it; a link inside an archive is what it points to.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.root, self.paths = paths[0], tuple(paths)
        self._names = _told_apart(self.paths)
        self._files: dict[int, int] = {}
        self._places: dict[str, Place] = {}
        lift_file_limit(len(self.paths) + 256)
        for number, path in enumerate(self.paths):
            self._index(number, path)

    def _index(self, number: int, path: Path) -> None:
        last = 0
        links: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    last = max(last, archive.offset)  # the next header
                    name = member.name.removeprefix("./")
                    if hidden(name):
                        continue
                    if member.isfile():
                        place = Place(number, member.offset_data, member.size)
                        self._places[self.key(number, name)] = place
                    elif member.islnk() or member.issym():
                        base = posixpath.dirname(name) if member.issym() else ""
                        links[name] = posixpath.normpath(posixpath.join(base, member.linkname))
            self._files[number] = os.open(path, os.O_RDONLY)
        except (tarfile.TarError, EOFError, OSError) as error:
            if getattr(error, "errno", None) == errno.EMFILE:
                raise DataError(
                    f"{len(self.paths)} archives cannot be open at once: raise the limit of open "
                    "files (ulimit -n), or join some"
                ) from error
            raise DataError(
                f"{path} is not a whole, uncompressed tar archive ({error}): copy it again, or "
                "uncompress it (images do not compress, and a member could not be read alone)"
            ) from error
        for name, target in links.items():
            nowhere = Place(number, 0, -1)
            self._places[self.key(number, name)] = self._places.get(
                self.key(number, links.get(target, target)), nowhere
            )
        ends = [p.start + max(p.size, 0) for p in self._places.values() if p.archive == number]
        end = -(-max(ends, default=0) // 512) * 512
        # Cut at a header it would pass for a shorter archive: a whole one ends with empty blocks.
        if os.pread(self._files[number], 512, max(end, last)) != bytes(512):
            raise DataError(f"{path} is cut short: copy it again")

    def key(self, number: int, name: str) -> str:
        """The path of a member; with several archives, the archive's name comes first."""
        return f"{self._names[number]}/{name}" if self._names[number] else name

    def inside(self, key: str) -> str:
        """A member's path in its archive."""
        name = self._names[self._places[key].archive]
        return key.removeprefix(f"{name}/") if name else key

    @cached_property
    def flat(self) -> bool:
        """Whether no archive has folders."""
        return not any("/" in self.inside(key) for key in self._places)

    def class_path(self, key: str) -> str:
        """The path whose folders name a member's class: of flat archives, each is a folder."""
        if self._names[0] and self.flat:
            return f"{self._names[self._places[key].archive].removesuffix('.tar')}/{_name(key)}"
        return self.inside(key)

    def entries(self) -> Iterator[Entry]:
        for key, place in self._places.items():
            yield Entry(key, max(place.size, 0))

    def read(self, key: str) -> bytes:
        archive, start, size = self._places[key]
        if size < 0:
            raise Unreadable("a link to a file that is not in the archive")
        data = os.pread(self._files[archive], size, start)
        if len(data) != size:
            raise Unreadable("cut short inside the archive")
        return data

    def where(self, key: str) -> str:
        return f"{self.paths[self._places[key].archive]}!{self.inside(key)}"

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def __getstate__(self) -> tuple[Path, ...]:
        return self.paths

    def __setstate__(self, paths: tuple[Path, ...]) -> None:
        self.__init__(paths)  # type: ignore[misc]


def _told_apart(paths: Sequence[Path]) -> list[str]:
    """What stands for each of several archives: its name, or its path where names are equal."""
    if len(paths) == 1:
        return [""]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


class WebDataset:
    """Shards of a WebDataset: files of one name up to its first dot make one sample.

    Labels are in NAME.cls (a number), NAME.json ("label", "cls" or "class") or, failing these,
    NAME.txt (a class name); without any the set has no classes. Of several images in a sample the
    one whose ending has one dot is meant.
    """

    def __init__(
        self,
        files: Tars,
        *,
        labelled: bool = True,
        background: tuple[int, int, int] = WHITE,
    ) -> None:
        self.files, self.background = files, background
        several = len(files.paths) > 1
        self.name = files.root.parent.name if several else files.root.name
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
            if image := self._image(sample):
                self._keys.append(image)
                told.append(self._told(sample) if labelled else None)
        if not self._keys:
            raise DataError(f"no images in {self.files.root}: expected a WebDataset or images")
        if len(told) >= _CAPTIONS and 2 * len({x for x in told if isinstance(x, str)}) > len(told):
            raise DataError(
                f"{self.files.root}: most images have a text of their own, which are captions "
                "rather than classes: give --classes none to leave them out"
            )
        self.class_names, labels = classes(told, where=str(self.files.root))
        self._labels = np.asarray(labels, dtype=np.int32)
        digest = blake3(json.dumps([self.class_names, background]).encode())
        for key, label in zip(self._keys, labels, strict=True):
            digest.update(named_bytes(f"{key}\0{sizes[key]}\0{label}\n"))
        self._fingerprint = digest.hexdigest()[:32]

    def _image(self, sample: dict[str, str]) -> str | None:
        """The one image of a sample; None if it has none."""
        images = {end: key for end, key in sample.items() if _last(end) in EXTENSIONS}
        plain = [key for ending, key in images.items() if ending.count(".") == 1]
        found = plain if len(images) > 1 else list(images.values())
        if images and len(found) != 1:
            shown = ", ".join(map(self.files.where, images.values()))
            raise DataError(f"one sample of a WebDataset has several images: {shown}; keep one")
        return found[0] if found else None

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
    """Whether images have files of labels with the same stem beside them.

    NAME.txt and NAME.json of images in class folders may say anything; the folders tell then.
    """
    keys = {key for key, *_ in files.entries()}
    images = [key for key in keys if _last(key) in EXTENSIONS]
    stems = {key[: len(key) - len(_name(key))] + _name(key).partition(".")[0] for key in images}
    if any(f"{stem}.cls" in keys for stem in stems):
        return True
    foldered = len({posixpath.dirname(files.inside(key)) for key in images}) > 1
    return not foldered and any(f"{stem}{ending}" in keys for stem in stems for ending in LABELS)


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _last(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()
