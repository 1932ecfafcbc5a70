"""Data sets of the Hugging Face hub: splits, columns, its local cache; and no network."""

import io
import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from erw.cli import main
from erw.data import Cache, open_source
from erw.data.sources.hub import sets
from erw.errors import DataError
from helpers.hub import COMMIT, Hub, endpoint
from helpers.parts import CLASSES, picture

pyarrow = pytest.importorskip("pyarrow")


def photo(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(number)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, numbers: range, *, image: str = "image", label: str = "label") -> Path:
    """A Parquet file as `datasets` pushes it to the hub."""
    from pyarrow import parquet

    table = pyarrow.table(
        {
            image: [{"bytes": photo(n), "path": f"{n}.png"} for n in numbers],
            label: pyarrow.array([n % 3 for n in numbers], pyarrow.int64()),
        }
    )
    features = {label: {"names": list(CLASSES), "_type": "ClassLabel"}}
    told = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata({"huggingface": told}), path)
    return path


def pushed(root: Path) -> Path:
    """Two files of train and one of test, as the hub lists them."""
    write(root / "data" / "train-00000-of-00002.parquet", range(0, 4))
    write(root / "data" / "train-00001-of-00002.parquet", range(4, 7))
    write(root / "data" / "test-00000-of-00001.parquet", range(20, 22))
    return root


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the hub's local cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fetched(cache: Path, name: str, revision: str = "main") -> Path:
    """Where a data set of that name lies once it was downloaded."""
    folder = cache / f"datasets--{name.replace('/', '--')}"
    (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_a_split_by_name(offline: Path, tmp_path: Path) -> None:
    pushed(fetched(offline, "someone/pictures"))
    local = pushed(tmp_path / "copy")
    where = "hf:someone/pictures"
    source = open_source(where, split="train")
    assert len(source) == 7 and source.class_names == CLASSES
    for i in range(7):
        pixels, label = source[i]
        assert label == i % 3 and np.array_equal(pixels, picture(i))
    assert len(open_source(where, split="test")) == 2
    with pytest.raises(DataError, match=r"several sets: name one of test, train with --split"):
        open_source(where)
    with pytest.raises(DataError, match="no set dev: name one of test, train"):
        open_source(where, split="dev")
    by_pattern = open_source(local / "data" / "train-*")
    assert by_pattern.fingerprint() == source.fingerprint()
    assert source.name == "someone/pictures:train"
    assert open_source(local, split="train").fingerprint() == source.fingerprint()
    assert open_source(local, split="test").name == "copy:test"
    with pytest.raises(DataError, match=r"copy has no set dev: name one of test, train"):
        open_source(local, split="dev")
    with pytest.raises(DataError, match="has no splits or subsets inside"):
        open_source(local / "data" / "train-*", split="train")
    with pytest.raises(DataError, match="has no splits or subsets inside"):
        open_source(local / "data" / "train-*", subset="small")


class DataHub(Hub):
    """One data set, as `dataset_info` and `snapshot_download` ask for it."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - shared on purpose
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/someone/pictures") and "/tree/" not in self.path:
            siblings = [{"rfilename": name} for name in self.files]
            self.reply({"id": "someone/pictures", "sha": COMMIT, "siblings": siblings})
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), DataHub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield DataHub
    server.shutdown()
    server.server_close()


def test_only_the_split_is_downloaded_and_once(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pushed(tmp_path / "copy")
    hub.files |= {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.parquet")}
    for _ in range(2):
        source = open_source("hf:someone/pictures", split="test")
        assert len(source) == 2 and np.array_equal(source[1][0], picture(21))
    got = [name for name in hub.asked if name.endswith(".parquet")]
    assert set(got) == {"data/test-00000-of-00001.parquet"}
    capsys.readouterr()  # the bars of the downloads
    assert main(["prepare", "hf:someone/other", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "someone/other on the Hugging Face hub cannot be fetched" in said[0]


def test_no_network_is_said_in_one_line(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["prepare", "hf:someone/else", "--out", str(tmp_path / "x"), "--split", "train"]
    assert main(args) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: data set someone/else on the Hugging Face")
    assert "OfflineModeIsEnabled" in said[0] and "give its folder" in said[0]
    assert not (tmp_path / "x").exists()
    with pytest.raises(DataError, match=r"cannot be fetched .*Repo id must be"):
        open_source("hf:nothing/of/the/kind")


def test_a_revision_and_the_hubs_own_parquet_copy(offline: Path) -> None:
    root = fetched(offline, "someone/scripted", "refs/convert/parquet")
    write(root / "default" / "train" / "0000.parquet", range(3))
    assert len(open_source("hf:someone/scripted@refs/convert/parquet")) == 3
    with pytest.raises(DataError, match="cannot be fetched"):
        open_source("hf:someone/scripted@main")


def test_columns_with_unusual_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "set" / "0.parquet", range(4), image="picture", label="kind")
    with pytest.raises(DataError, match=r"no column image: found picture, kind; name .*--columns"):
        open_source(path)
    with pytest.raises(DataError, match="no column photo: found picture, kind"):
        open_source(path, columns=("photo",))
    both, one = (open_source(path, columns=c) for c in (("picture", "kind"), ("picture",)))
    assert both.class_names == one.class_names == CLASSES  # the metadata tells what holds labels
    assert both.fingerprint() != one.fingerprint()
    with pytest.raises(DataError, match="is no table, so it has no columns picture"):
        (tmp_path / "loose").mkdir()
        Image.fromarray(picture(0)).save(tmp_path / "loose" / "a.png")
        open_source(tmp_path / "loose", columns=("picture",))
    with pytest.raises(DataError, match=r"holds \.parquet and image files"):
        open_source(tmp_path)
    args = ["prepare", str(tmp_path / "set"), "--columns", "picture", "kind", "--vae", "none"]
    args += ["--out", str(tmp_path / "cache"), "--image-size", "16"]
    assert main(args) == 0
    cache = Cache.open(tmp_path / "cache")
    assert len(cache) == 4 and cache.class_names == CLASSES
    assert cache.manifest.spec.source.name == "set"


def test_sets_by_their_paths() -> None:
    files = ["data/train-0.parquet", "validation/0.parquet", "small/val/0.parquet", "0.parquet"]
    assert sets(files) == {
        ("", "train"): ["0.parquet", "data/train-0.parquet"],
        ("", "validation"): ["validation/0.parquet"],
        ("small", "validation"): ["small/val/0.parquet"],
    }


def test_the_split_is_told_anywhere_in_a_files_name() -> None:
    found = sets(
        [
            "imagenet1k-train-0000.tar",
            "imagenet1k-validation-00.tar",
            "imagenet-1k-train-00000-of-00002.arrow",
            "data/test-00000-of-00001.parquet",
            "plain.parquet",
            "train/more_val.parquet",
        ]
    )
    assert {split: len(files) for (_, split), files in found.items()} == {
        "train": 3, "validation": 2, "test": 1
    }  # fmt: skip
