"""Published files by name, from a server on this machine: whole and checked, or a line of help."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from erw.cli import main
from erw.errors import DataError
from erw.evaluation import inception_weights, published
from erw.evaluation.inception_weights import find_inception
from helpers.images import save_pngs
from helpers.images import stripes as pictures


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder; of a name that begins with "short" only half of what it promises."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        data = source.read()
        if Path(self.path).name.startswith("short"):
            data = data[: len(data) // 2]
        outputfile.write(data)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which its files can be had."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ERW_OFFLINE", "0")
    monkeypatch.delenv("ERW_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_weights_come_by_name_and_only_once(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, address = served
    name = next(iter(inception_weights.FILES))
    (folder / name).write_bytes(b"weights" * 1000)
    monkeypatch.setitem(inception_weights.FILES, name, f"{address}/{name}")
    with pytest.raises(DataError, match=r"expected 6726825d.*thrown away"):
        find_inception()
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    monkeypatch.setattr(inception_weights, "SHA256", digest[:8])
    found = find_inception()
    assert found == tmp_path / "home" / "erw" / "weights" / name
    assert found.read_bytes() == b"weights" * 1000 and len(list(found.parent.iterdir())) == 1
    (folder / name).unlink()
    assert find_inception() == found


@pytest.mark.parametrize(
    ("name", "reason"), [("none.npz", "not found"), ("short.npz", "cut off after")]
)
def test_what_cannot_be_had_is_told_in_one_line(
    served: tuple[Path, str], tmp_path: Path, name: str, reason: str
) -> None:
    folder, address = served
    (folder / "short.npz").write_bytes(bytes(5000))
    path = tmp_path / "kept" / name
    with pytest.raises(FileNotFoundError, match=rf"(?i){reason}.*put it at .*{name}") as raised:
        published.download(f"{address}/{name}", path)
    assert "\n" not in str(raised.value) and not list(path.parent.iterdir())


def test_no_network_is_told_in_one_line(
    tmp_path: Path, served: tuple[Path, str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"refused.*put it at"):
        published.download("http://127.0.0.1:9/x", tmp_path / "x")
    monkeypatch.setenv("ERW_OFFLINE", "1")
    images = str(save_pngs(tmp_path / "a", pictures(3)))
    capsys.readouterr()
    assert main(["eval", images, "--reference", images, "--metrics", "fid"]) == 2
    line = capsys.readouterr().err
    assert "pt_inception" in line and "--weights FILE" in line and line.count("\n") == 1
    reference = "VIRTUAL_imagenet256_labeled.npz"
    assert main(["eval", images, "--reference", reference]) == 2
    line = capsys.readouterr().err
    assert f"put it at {tmp_path}" in line and line.count("\n") == 1


def test_reference_batches_come_by_name(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, address = served
    name = "VIRTUAL_imagenet64_labeled.npz"
    np.savez(folder / name, arr_0=pictures(4).permute(0, 2, 3, 1).numpy())
    monkeypatch.setitem(published.REFERENCES, name, f"{address}/{name}")
    images = str(save_pngs(tmp_path / "a", pictures(4)))
    assert main(["eval", images, "--reference", name]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("fd_lite2") and f"downloading {address}/{name}" in said.err
    whole = (folder / name).read_bytes()
    (tmp_path / "home" / "erw" / "references" / name).unlink()
    (folder / name).write_bytes(whole[:-100])
    assert main(["eval", images, "--reference", name]) == 2
    assert "damaged" in capsys.readouterr().err
