"""Two caches that go together, and what is done to them: for tests of adding and of joining."""

from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from erw.data import Cache
from erw.data.prepare import add_encoders
from helpers.parts import make, photos, picture, vae_folder

OTHER = "efficientnet-lite2@64"
Parts = SimpleNamespace


def two_caches(root: Path) -> Parts:
    """24 photos of three classes, 10 more of one of them and of a new one; a cache of each."""
    vae, folder, more = vae_folder(root / "vae"), photos(root / "set"), root / "more"
    for label, name in enumerate(("bear", "Zebra")):
        (more / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(picture(100 + label * 5 + i)).save(more / name / f"{i}.png")
    make(folder, root / "first", vae, encoder=True)
    make(more, root / "second", vae, encoder=True)
    return Parts(root=root, vae=vae, folder=folder, more=more)


def add(source: Path | None, out: Path, *names: str, **options: object) -> Cache:
    """`add_encoders`, of `OTHER` if none is named, in the batches of `make`."""
    names = names or (OTHER,)
    return add_encoders(source, out, encoders=names, batch_size=4, progress=False, **options)


def damage(path: Path) -> None:
    """Change the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def times(out: Path) -> dict[str, int]:
    """When each file of a cache was written."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
