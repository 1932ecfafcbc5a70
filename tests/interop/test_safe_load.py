"""Files that nobody vouches for: read without running anything, or refused in one line."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erw.encoders import load_vae
from erw.encoders.vae import SHIPPED
from erw.errors import CheckpointError
from erw.evaluation.inception import load_inception
from erw.interop.convert import write_weights
from erw.interop.safe_load import FOLDER_FILE, Inert, read_weights

WEIGHTS = {"a": torch.arange(64.0), "b": torch.ones(2, 3)}
RAN: list[int] = []


def ran(*_args: object) -> dict[str, object]:
    """What a hostile pickle would call."""
    RAN.append(1)
    return {}


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return ran, ("x",)


class System:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("exit 1",)


def refused(path: Path, *words: str) -> None:
    RAN.clear()
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    for word in words:
        assert word in message, message
    assert not RAN


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("thing", [Hostile(), System()], ids=["function", "system"])
def test_no_code_runs(tmp_path: Path, old: bool, thing: object) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"ema": WEIGHTS, "args": thing}, path, _use_new_zipfile_serialization=not old)
    refused(path, "could run code", "nothing of it was run")


def test_no_code_runs_in_a_bare_pickle(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    for protocol in (2, 4, 5):  # torch warns of the newer ones: not beside our one line
        path.write_bytes(pickle.dumps(Hostile(), protocol))
        refused(path)


def test_stand_ins_run_nothing() -> None:
    thing = Inert("a", 1)
    assert thing.args == ("a", 1) and not hasattr(Inert, "__setstate__")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    write_weights(WEIGHTS, path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


def test_noise_is_no_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for seed in range(5):
        torch.manual_seed(seed)
        path.write_bytes(bytes(torch.randint(256, (500,)).tolist()))
        refused(path)
    path.write_text("<html>404</html>")
    refused(path, "web page")


def repacked(path: Path, *, compress: int, grow: bytes = b"") -> None:
    """The same archive with other compression and a record blown up."""
    source = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compress) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, content + grow * entry.filename.endswith("data/0"))


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(WEIGHTS, path)
    repacked(path, compress=zipfile.ZIP_DEFLATED, grow=b"\0" * 20_000_000)
    assert path.stat().st_size < 100_000
    refused(path, "zip archive", "not unpacked")


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """A bomb without compression: the directory names one stretch of the file many times."""
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(50_000)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            at = content.rindex(entry.filename.encode()) - 46
            content[at + 24 : at + 28] = struct.pack("<I", 150_000)
            content[at + 20 : at + 24] = struct.pack("<I", 150_000)
    path.write_bytes(content)
    refused(path)


def test_tensors_that_promise_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    refused(path, "4,000,000,000,000 bytes of weights")


def safetensors_file(path: Path, header: object, body: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**15]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4]},
        7,
    ],
)
def test_a_safetensors_header_that_lies(tmp_path: Path, entry: object) -> None:
    refused(safetensors_file(tmp_path / "w.safetensors", {"a": entry}, bytes(16)), "safetensors")


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(path)


def test_what_holds_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for thing in (
        [torch.ones(2)],
        {},
        {"ema": {}},
        {"a": 1},
        {"ema": {"a": torch.ones(1), "b": 2}},
    ):
        torch.save(thing, path)
        refused(path)
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "nowhere.pt")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "diffusion_pytorch_model.safetensors")
    safetensors_file(tmp_path / "diffusion_pytorch_model.safetensors", {})
    refused(tmp_path, "config.json is no JSON object")


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    save_file(WEIGHTS, path)
    assert read_weights(path)[0]["b"].tolist() == WEIGHTS["b"].tolist()


def test_legacy_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False)
    tensors, settings = read_weights(path)
    assert settings == {"weights": "model"} and torch.equal(tensors["a"], WEIGHTS["a"])


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pt"
    write_weights(WEIGHTS, path, {})

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"could not write .*No space left"):
        write_weights({"a": torch.zeros(1)}, path, {})
    assert os.listdir(tmp_path) == ["w.pt"]
    assert read_weights(path)[0].keys() == WEIGHTS.keys()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "\n<!DOCTYPE html><p>",
        "\ufeff<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    ],
)
def test_what_came_in_place_of_weights_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="a web page or a git-lfs pointer, not weights"):
        read_weights(tmp_path / name)
    folder = Path(shutil.copytree(SHIPPED["openmoji-f4c4"], tmp_path / "vae"))
    (folder / FOLDER_FILE).write_text(text)
    (tmp_path / "inception.pth").write_text(text)
    for load in (lambda: load_vae(folder), lambda: load_inception(tmp_path / "inception.pth"),
                 lambda: load_vae(f"va-vae={tmp_path / 'inception.pth'}")):  # fmt: skip
        with pytest.raises(CheckpointError, match="a web page or a git-lfs pointer, not weights"):
            load()


def test_a_header_that_begins_as_a_page_does(tmp_path: Path) -> None:
    """Its length, 60, is the code of "<"."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(ord("<"))
    content = struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.5)
    assert content.startswith(b"<")
    (tmp_path / "a.safetensors").write_bytes(content)
    assert read_weights(tmp_path / "a.safetensors")[0]["a"].tolist() == [1.5]
