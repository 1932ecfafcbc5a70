"""Nothing reaches for the network unless asked to."""

import socket
from pathlib import Path
from typing import Any

import pytest

from erw.cli import main


def test_the_quickstart_path_opens_no_connection(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepare, train with scores, sample, eval and export with sockets forbidden."""

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.delenv("ERW_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    tiny = ["--vae", "none", "--image-size", "16", "--count", "16", "--images"]
    assert main(["prepare", "openmoji", "--out", "cache", *tiny]) == 0
    run = ["train", "debug", "--data.cache", "cache", "--model.patch", "8", "--steps", "6"]
    scored = ["--eval.every", "6", "--eval.samples", "4", "--eval.reference-count", "8"]
    assert main([*run, *scored, "--out", "run"]) == 0
    assert main(["sample", "run", "--out", "images", "--seeds", "0:4", "--steps", "2"]) == 0
    assert main(["eval", "images", "--reference", "cache"]) == 0
    assert main(["export", "run", "--out", "model"]) == 0
