"""Archives, tables and arrays hold the same images as the folder they were made from."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from erw.data import open_source
from erw.errors import DataError
from helpers.archives import png, tar
from helpers.parts import CLASSES, make, photos

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos") / "set", each=3)


def images_in(folder: Path) -> list[tuple[Path, int]]:
    """Images with their label, in the order that the folder is read."""
    return [(p, CLASSES.index(p.parent.name)) for p in sorted(folder.rglob("*.*"))]


def same(source, folder: Path, *, labelled: bool = True) -> None:
    """Equal pixels and labels, in whatever order."""
    wanted = open_source(folder)
    assert len(source) == len(wanted)

    def key(item: tuple[np.ndarray, int]) -> tuple[bytes, int]:
        return item[0].tobytes(), item[1] if labelled else 0

    found = sorted(key(source[i]) for i in range(len(source)))
    assert found == sorted(key(wanted[i]) for i in range(len(wanted)))


def to_tar(folder: Path, out: Path) -> Path:
    files = {f"train/{p.relative_to(folder)}": p.read_bytes() for p, _ in images_in(folder)}
    return tar(out / "photos.tar", files)


def to_webdataset(folder: Path, out: Path) -> Path:
    """Three shards; numbers in .cls, as ImageNet's shards have them."""
    for shard, name in enumerate(CLASSES):
        files = {}
        for path, label in images_in(folder):
            if path.parent.name == name:
                files[f"{shard}_{path.stem}{path.suffix}"] = path.read_bytes()
                files[f"{shard}_{path.stem}.cls"] = f"{label}\n".encode()
        tar(out / f"photos-{shard:03d}.tar", files)
    return out


def rows(folder: Path, *, paths: bool = False) -> tuple[dict, dict]:
    """Columns and metadata as `datasets` stores images and a ClassLabel."""
    found = images_in(folder)
    cells = [
        {"bytes": None if paths else p.read_bytes(), "path": str(p) if paths else p.name}
        for p, _ in found
    ]
    label = {"names": list(CLASSES), "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    columns = {"image": cells, "label": [label for _, label in found]}
    return columns, {"huggingface": json.dumps(info)}


def to_parquet(folder: Path, out: Path) -> Path:
    from pyarrow import parquet

    columns, metadata = rows(folder)
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    (out / "data").mkdir(parents=True)
    for part in range(2):
        path = out / "data" / f"train-0000{part}-of-00002.parquet"
        parquet.write_table(table.slice(part * 5, 5), path, row_group_size=2)
    return out


def to_arrow(folder: Path, out: Path, *, stream: bool = True, paths: bool = False) -> Path:
    from pyarrow import ipc

    columns, metadata = rows(folder, paths=paths)
    kinds = [("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
             ("label", pyarrow.int64())]  # fmt: skip
    table = pyarrow.table(columns, schema=pyarrow.schema(kinds)).replace_schema_metadata(metadata)
    out.mkdir(parents=True)
    path = out / "data-00000-of-00001.arrow"
    opened = (ipc.new_stream if stream else ipc.new_file)(path, table.schema)
    with opened as writer:
        writer.write_table(table, max_chunksize=4)
    (out / "state.json").write_text("{}")
    return out


@pytest.mark.parametrize("write", [to_tar, to_webdataset, to_parquet, to_arrow])
def test_the_same_images(write: Callable[[Path, Path], Path], folder: Path, tmp_path: Path) -> None:
    path = write(folder, tmp_path / "packed")
    source = open_source(path)
    same(source, folder)
    numbered = tuple("012") if write is to_webdataset else CLASSES
    assert source.class_names == numbered
    assert source.fingerprint() == open_source(path).fingerprint()
    assert source.location(0).startswith(str(tmp_path))
    bare = open_source(path, classes="none")
    assert bare.class_names == () and {bare[i][1] for i in range(len(bare))} == {0}
    assert bare.fingerprint() != source.fingerprint()


def test_a_cache_of_a_parquet_set_has_the_folders_latents(folder: Path, tmp_path: Path) -> None:
    packed = make(open_source(to_parquet(folder, tmp_path / "hf")), tmp_path / "a", "none")
    plain = make(folder, tmp_path / "b", "none")
    assert packed.class_names == plain.class_names
    a, b = packed.read(range(9)), plain.read(range(9))
    assert a.mean.equal(b.mean) and a.labels.equal(b.labels)


def test_patterns_and_arrow_files_with_paths(folder: Path, tmp_path: Path) -> None:
    to_webdataset(folder, tmp_path / "wds")
    assert len(open_source(str(tmp_path / "wds" / "photos-*.tar"))) == 9
    assert len(open_source(tmp_path / "wds" / "photos-001.tar")) == 3
    same(open_source(to_arrow(folder, tmp_path / "file", stream=False)), folder)
    same(open_source(to_arrow(folder, tmp_path / "paths", paths=True)), folder)


def test_tables_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="no column image: found text"):
        open_source(tmp_path / "text.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_source(tmp_path / "bad.parquet")
    both = to_parquet(folder, tmp_path / "both")
    train = next((both / "data").iterdir())
    train.with_name("test-00000-of-00001.parquet").write_bytes(train.read_bytes())
    with pytest.raises(DataError, match=r"both has several sets: name one of test, train with"):
        open_source(both)
    assert len(open_source(str(both / "data" / "train-*.parquet"))) == 9


def test_hidden_files_and_large_endings(tmp_path: Path) -> None:
    (tmp_path / "set" / ".cache").mkdir(parents=True)
    (tmp_path / "set" / ".cache" / "x.parquet").write_bytes(b"")
    (tmp_path / "set" / "._t.tar").write_bytes(b"")
    (tmp_path / "set" / "1.png").write_bytes(png(1))
    assert len(open_source(tmp_path / "set")) == 1
    assert len(open_source(tar(tmp_path / "UP.TAR", {"1.png": png(1)}))) == 1
    np.save(tmp_path / "up.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "up.npy").rename(tmp_path / "UP.NPY")
    assert len(open_source(tmp_path / "UP.NPY")) == 2


def test_two_kinds_of_packed_files(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"1.png": png(1)})
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"holds \.parquet and \.tar files: name one kind by"):
        open_source(tmp_path)
