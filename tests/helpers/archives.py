"""Small images of one shade, and archives of them."""

import io
import tarfile
from pathlib import Path

from PIL import Image

from erw.data import Source


def png(shade: int) -> bytes:
    """A grey PNG of 4 x 4 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """A tar archive of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shades(source: Source) -> list[tuple[int, int]]:
    """(shade, label) of every image."""
    return [(int(source[i][0][0, 0, 0]), source[i][1]) for i in range(len(source))]
