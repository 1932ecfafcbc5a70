"""Published files by name, from a server on this machine: checked, or one line of help."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from erw.cli import main
from erw.errors import DataError
from erw.evaluation import inception
from erw.evaluation.inception import find_inception
from erw.io import download
from helpers.images import save_pngs, stripes
from helpers.servers import web


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL of its server."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("ERW_OFFLINE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with web(folder) as server:
        yield folder, server.url


def test_weights_come_by_name_and_only_once(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, url = served
    name = Path(inception.WEIGHTS).name
    (folder / name).write_bytes(b"weights" * 1000)
    monkeypatch.setattr(inception, "WEIGHTS", f"{url}/{name}")
    with pytest.raises(DataError, match=r"sent another file.*6726825d"):
        find_inception()
    home = tmp_path / "home"
    lock = home / "erw" / "weights" / f"{name}.lock"
    assert [path for path in home.rglob("*") if path.is_file() and path != lock] == []
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest[:8])
    path = find_inception()
    assert path == tmp_path / "home" / "erw" / "weights" / name
    assert path.read_bytes() == b"weights" * 1000 and {*path.parent.iterdir()} <= {path, lock}
    (folder / name).unlink()
    assert find_inception() == path


def test_a_failed_download_is_one_line(
    served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, url = served
    path = tmp_path / "cached" / "none.npz"
    with pytest.raises(FileNotFoundError, match=r"(?i)not found.*put it at .*none.npz") as raised:
        download(f"{url}/none.npz", path)
    assert "\n" not in str(raised.value)
    assert {file.name for file in path.parent.iterdir()} <= {"none.npz.lock"}
    with pytest.raises(FileNotFoundError, match=r"refused.*put it at"):
        download("http://127.0.0.1:9/x", path)
    monkeypatch.setenv("ERW_OFFLINE", "1")
    images = str(save_pngs(tmp_path / "a", stripes(3)))
    capsys.readouterr()
    assert main(["eval", images, "--reference", images, "--metrics", "fid"]) == 2
    line = capsys.readouterr().err
    assert "pt_inception" in line and "--weights FILE" in line and line.count("\n") == 1
