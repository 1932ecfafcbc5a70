"""What files of strangers do to the readers, searched by atheris (libFuzzer) from good files on.

    python tests/helpers/fuzzing.py KIND [flags of libFuzzer]

A reader gives what it read, or raises an error of one line that a user is meant to see. Everything
else, and too much memory or time, is a finding: libFuzzer keeps the file and ends with its code.
"""

import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import numpy as np
import torch
from PIL import Image

with atheris.instrument_imports(include=["erw"]):
    import erw
    from erw.data import open_source
    from erw.data.cache import Cache
    from erw.data.images import Unreadable
    from erw.encoders import load_vae
    from erw.errors import ErwError
    from erw.evaluation.images import image_set
    from erw.io import save_tensors
    from erw.study.results import read_runs

from helpers.archives import tar
from helpers.exported import model, recipe_of
from helpers.parts import picture, vae_folder
from helpers.released import peer, save
from helpers.synthetic_study import write_study
from helpers.tiny import tiny_cache

Case = tuple[Path, Callable[[], Any]]
"""A good file, which the fuzzer rewrites, and what reads it."""


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(1, height=12, width=9)).save(file, kind)
    return file.getvalue()


def images(path: Path) -> Case:
    """Every image of a source is read."""

    def read() -> None:
        source = open_source(path)
        for i in range(min(8, len(source))):
            try:
                source[i]
            except Unreadable:  # `erw prepare` leaves such an image out and names it
                continue

    return path, read


def in_folder(root: Path, kind: str) -> Case:
    (root / "a").mkdir()
    path = root / "a" / f"0.{kind}"
    path.write_bytes(encoded(kind))
    return path, images(root)[1]


def labelled(root: Path, name: str, text: str) -> Case:
    (root / "0.png").write_bytes(encoded("png"))
    (root / name).write_text(text)
    return root / name, images(root)[1]


def zipped(root: Path) -> Case:
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.writestr("a/0.png", encoded("png"))
        archive.writestr("dataset.json", json.dumps({"labels": [["a/0.png", 1]]}))
    return images(root / "a.zip")


def tarred(root: Path) -> Case:
    return images(tar(root / "a.tar", {"0.png": encoded("png"), "0.cls": b"3"}))


def table(root: Path) -> Case:
    import pyarrow as pa
    import pyarrow.parquet

    rows = pa.table({"image": [{"bytes": encoded("png"), "path": "0.png"}], "label": [1]})
    pyarrow.parquet.write_table(rows, root / "a.parquet")
    return images(root / "a.parquet")


def array(root: Path, suffix: str) -> Case:
    rows, path = np.stack([picture(i, height=4, width=4) for i in (0, 1)]), root / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, rows)
    else:
        np.savez(path, arr_0=rows, labels=np.arange(2))
    return images(path)


def reference(root: Path) -> Case:
    path = array(root, "npz")[0]
    return path, lambda: list(image_set(path, what="reference").batches(2))


def cached(root: Path, pattern: str) -> Case:
    tiny_cache(root / "cache", count=8)

    def read() -> None:
        cache = Cache.open(root / "cache")
        cache.read(range(8), features=list(cache.features))

    return next((root / "cache").glob(pattern)), read


def run(root: Path, name: str) -> Case:
    """A run's weights or its recipe."""
    trained = model("none", channels=3)
    (root / "recipe.json").write_text(json.dumps(recipe_of(trained)))
    weights = dict(trained.net.named_parameters())
    save_tensors(root / "ema.safetensors", weights, {"step": "7"})
    return root / name, lambda: erw.load(root)


def exported(root: Path) -> Case:
    folder = erw.export(model("none", channels=3), root / "a", format="safetensors")
    return folder / "erw.json", lambda: erw.from_pretrained(folder)


def released(root: Path) -> Case:
    path = save(peer(num_classes=4, depth=1), root / "a.pt")
    return path, lambda: erw.load_pretrained(path, layout="sit", num_heads=4)


def vae(root: Path) -> Case:
    return vae_folder(root / "vae") / "config.json", lambda: load_vae(root / "vae")


def study(root: Path, name: str) -> Case:
    folder = write_study(root, seeds=1, pictures=False)
    return next(folder.glob(name)), lambda: read_runs([folder])


LABELS = json.dumps({"labels": [["0.png", 1]]})
KINDS: dict[str, Callable[[Path], Case]] = {
    "png": lambda root: in_folder(root, "png"),
    "jpeg": lambda root: in_folder(root, "jpeg"),
    "webp": lambda root: in_folder(root, "webp"),
    "metadata.csv": lambda root: labelled(root, "metadata.csv", "file_name,label\n0.png,a\n"),
    "dataset.json": lambda root: labelled(root, "dataset.json", LABELS),
    "zip": zipped,
    "tar": tarred,
    "parquet": table,
    "npy": lambda root: array(root, "npy"),
    "npz": lambda root: array(root, "npz"),
    "reference": reference,
    "manifest": lambda root: cached(root, "*.json"),
    "shard": lambda root: cached(root, "shards/*"),
    "weights": lambda root: run(root, "ema.safetensors"),
    "recipe": lambda root: run(root, "recipe.json"),
    "export": exported,
    "released": released,
    "vae": vae,
    "metrics": lambda root: study(root, "runs/*/metrics.jsonl"),
    "study": lambda root: study(root, "study.json"),
}


def main() -> None:
    kind, flags = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "case").mkdir()
        (root / "corpus").mkdir()
        path, read = KINDS[kind](root / "case")
        read()  # the good one
        (root / "corpus" / "good").write_bytes(path.read_bytes())

        def attempt(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read()
            except (ErwError, OSError) as error:
                assert "\n" not in str(error) and len(str(error)) < 2000, str(error)

        largest = 4 * len(path.read_bytes()) + 1000
        words = [sys.argv[0], f"-max_len={largest}", "-timeout=20", "-rss_limit_mb=3000", *flags]
        atheris.Setup([*words, str(root / "corpus")], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
