"""A run's folder outlives new settings: what an older recipe does not name has its default."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from erw.config import Optim, Run
from erw.errors import CheckpointError
from erw.plan import SIT
from erw.training import Ledger, run_dir
from erw.training.trained import RECIPE


class Named(SimpleNamespace):
    """What `claim` asks of a cache."""

    def __len__(self) -> int:
        return 8

    def class_counts(self) -> tuple[int, ...]:
        return (8,)


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


@pytest.mark.parametrize(
    ("schedule", "made", "steps", "fits"),
    [
        ("constant", 100, 200, True),
        ("constant", 60, 80, True),
        ("cosine", 0, 200, True),
        ("cosine", 10, 200, False),
        ("wsd", 76, 200, True),  # steps 0 to 75, the first of the decay at the whole rate
        ("wsd", 77, 200, False),
        ("wsd", 61, 80, True),
        ("wsd", 62, 80, False),
        ("wsd", 100, 100, True),
    ],
)
def test_steps_may_change_while_those_made_have_the_same_rates(
    tmp_path: Path, schedule: str, made: int, steps: int, fits: bool
) -> None:
    """A run of 100 steps, the last quarter of them the decay of wsd."""
    run = Run(steps=100, optim=Optim(schedule=schedule, decay=0.25))
    recipe = run_dir.claim(tmp_path, run, run, CACHE, LEDGER, init=None)
    (tmp_path / RECIPE).write_text(json.dumps(recipe))
    (tmp_path / "checkpoints").mkdir()
    for step in {made // 2, made} - {0}:
        (tmp_path / "checkpoints" / f"step-{step:08d}.safetensors").touch()
    other = run.replace(steps=steps)
    if fits:
        run_dir.claim(tmp_path, other, other, CACHE, LEDGER, init=None)
        return
    words = (
        rf"differs in steps \(100, now {steps}; optim.schedule wsd .* until step {made - 1}, not"
    )
    with pytest.raises(
        CheckpointError, match=words if schedule == "wsd" else "until step 1, not at 10"
    ):
        run_dir.claim(tmp_path, other, other, CACHE, LEDGER, init=None)
