"""Tar archives, which hold class folders or a WebDataset, read in place: nothing is unpacked."""

import os
import tarfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from erw.data.images import Unreadable
from erw.data.sources.base import Entry, Files, hidden
from erw.errors import DataError, one_line


class Place(NamedTuple):
    """The bytes of a member: number of the archive, offset and size."""

    archive: int
    start: int
    size: int


class Tars(Files):
    """The files inside one or more uncompressed tar archives; safe from any thread.

    Headers are read once. Of several archives, a key begins with the archive's name. Of members of
    equal path the last counts, as tar has it; links are left alone.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths[0])
        self.name = paths[0].parent.name if len(paths) > 1 else paths[0].name
        self.paths = paths
        if len(paths) > 1 and len({path.name for path in paths}) == len(paths):
            self._names = [f"{path.name}/" for path in paths]
        elif len(paths) > 1:
            common = os.path.commonpath([path.parent for path in paths])
            self._names = [f"{path.relative_to(common).as_posix()}/" for path in paths]
        else:
            self._names = [""]
        self._places: dict[str, Place] = {}
        links = sum(self._index(number, path) for number, path in enumerate(paths))
        self.notes = [f"{links} links inside archives are left alone"] if links else []

    def _index(self, number: int, path: Path) -> int:
        """Note where each member lies; the number of links is returned."""
        end = links = 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    end = max(end, archive.offset)  # of the next header
                    name = member.name.removeprefix("./")
                    if hidden(name):
                        continue
                    if member.issparse():
                        raise DataError(
                            f"{path}!{name} is stored without its empty blocks (tar --sparse), "
                            "which is not read: pack it again without that option"
                        )
                    links += member.islnk() or member.issym()
                    if member.isfile():
                        place = Place(number, member.offset_data, member.size)
                        self._places[self._names[number] + name] = place
                        end = max(end, -(-(place.start + place.size) // 512) * 512)
            # Cut at a header it would pass for a shorter archive: a whole one ends with empty
            # blocks.
            if _read(path, end, 512) != bytes(512):
                raise DataError(f"{path} is cut short: copy it again")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"{path} is not a whole, uncompressed tar archive ({one_line(error)}): copy it "
                "again, or uncompress it (images do not compress, and a member could not be read "
                "alone)"
            ) from error
        return links

    @cached_property
    def entries(self) -> list[Entry]:
        return sorted(Entry(key, place.size) for key, place in self._places.items())

    def read(self, key: str) -> bytes:
        number, start, size = self._places[key]
        data = _read(self.paths[number], start, size)
        if len(data) != size:
            raise Unreadable("cut short inside the archive")
        return data

    def location(self, key: str) -> str:
        return f"{self.paths[self._places[key].archive]}!{self.inside(key)}"

    def inside(self, key: str) -> str:
        return key.removeprefix(self._names[self._places[key].archive])


def _read(path: Path, start: int, size: int) -> bytes:
    """Some bytes of a file, opened anew: a thousand archives would exceed the open files."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(size)
