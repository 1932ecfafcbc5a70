"""What `make torture` asks for, and the tiny run that it stops in every way."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.forked import Python, ranks

KILLS = int(os.environ.get("ERW_TORTURE", "0"))
SEED = int(os.environ.get("ERW_TORTURE_SEED", "0"))
LONG = pytest.mark.skipif(not KILLS, reason="long: make torture runs it")
TINY = Path(__file__).parent / "tiny.py"

Begin = Callable[[Path], list[Python]]
"""Starts the processes of a command that writes into a folder."""


def alone(cache: Path, *words: object) -> Begin:
    return lambda out: [Python(TINY, cache, out, *words)]


def two(cache: Path, *words: object) -> Begin:
    return lambda out: [Python(TINY, cache, out, *words, env=env) for env in ranks(2)]
