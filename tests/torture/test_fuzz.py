"""Readers of strangers' files under a fuzzer: ten minutes in all, by `make torture`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.torture import LONG

FUZZING = Path(__file__).parents[1] / "helpers" / "fuzzing.py"
KINDS = (
    "png", "jpeg", "webp", "metadata.csv", "dataset.json", "zip", "tar", "parquet", "npy", "npz",
    "reference", "manifest", "shard", "weights", "recipe", "export", "released", "vae", "metrics",
    "study",
)  # fmt: skip
SECONDS = float(os.environ.get("ERW_FUZZ", "600")) / len(KINDS)


@LONG
@pytest.mark.parametrize("kind", KINDS)
def test_a_strangers_file_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the fuzzer: pip install atheris (Linux, Python 3.11)")
    flags = [f"-max_total_time={SECONDS:.0f}", f"-artifact_prefix={tmp_path}/", "-seed=1"]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (FUZZING.parents[1], *sys.path)))}
    command = [sys.executable, str(FUZZING), kind, *flags]
    found = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    print(kind, found.stderr.strip().splitlines()[-1])
