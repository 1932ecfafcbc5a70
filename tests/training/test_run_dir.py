"""A run's folder outlives new settings: what an older recipe does not name has its default."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from erw.config import Run
from erw.errors import CheckpointError
from erw.plan import SIT
from erw.training import Ledger, run_dir
from erw.training.trained import RECIPE


class Named(SimpleNamespace):
    """What `claim` asks of a cache."""

    def __len__(self) -> int:
        return 8

    def empty_classes(self) -> list[int]:
        return []


CACHE = Named(identity="one", class_names=("cat",), vae={"name": "none"})
LEDGER = Ledger(SIT, 4, (), teacher=0, rows=8)


def test_a_run_older_than_a_setting_goes_on(tmp_path: Path) -> None:
    run = Run()
    recipe = json.loads(json.dumps(run_dir.claim(tmp_path, run, run, CACHE, LEDGER, init=None)))
    del recipe["resolved"]["model"]["mlp"]
    (tmp_path / RECIPE).write_text(json.dumps(recipe))
    run_dir.claim(tmp_path, run, run, CACHE, LEDGER, init=None)

    recipe["resolved"]["seed"] = 3
    (tmp_path / RECIPE).write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match=r"differs in seed \(3, now 0\);"):
        run_dir.claim(tmp_path, run, run, CACHE, LEDGER, init=None)
