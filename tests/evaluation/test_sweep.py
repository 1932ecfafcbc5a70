"""A sweep: what it tries, the seeds of its rounds, who goes on, and that it resumes."""

from pathlib import Path

import pytest
import torch

from erw.config import Grid, Model, Run, Sample
from erw.errors import ConfigError
from erw.evaluation.evaluate import evaluate
from erw.evaluation.sweep import candidates, sweep
from erw.sampling import generate
from helpers.pixels import MODEL, trained

SAMPLE = Sample(steps=2, solver="euler")
GRID = Grid(scales=(1.0, 1.5, 3.0), until=(1.0, 0.5), images=6, rounds=2, keep=0.4)


@pytest.fixture
def reference() -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (12, 3, 8, 8), generator=rng, dtype=torch.uint8)


def test_settings_that_differ_without_effect_are_tried_once() -> None:
    """1 + 2 scales x 2 intervals; twice as many with internal guidance on top, less where alone."""
    assert len(candidates({"": MODEL}, GRID, SAMPLE, weak=False)) == 5
    inner = trained(run=Run(model=Model(internal=1)))
    grid = Grid(scales=(1.0, 2.0), internals=(1.0, 1.4), until=(1.0, 0.5))
    found = candidates({"": inner}, grid, SAMPLE, weak=False)
    assert len(found) == 1 + 2 + 2 + 2 and len(set(found)) == 7
    both = candidates({"": MODEL, "0.1": MODEL}, GRID, SAMPLE, weak=True)
    assert len(both) == 2 * (1 + 4 + 4)
    with pytest.raises(ConfigError, match="nothing to sweep"):
        candidates({"": trained(0)}, GRID, SAMPLE, weak=False)


def test_the_best_of_few_images_are_drawn_again_on_fresh_seeds(
    reference: torch.Tensor, tmp_path: Path
) -> None:
    seen: list[dict] = []
    options = {"path": tmp_path / "sweep.json", "reference": reference}
    rows = sweep({"": MODEL}, GRID, SAMPLE, progress=seen.append, **options)
    assert [row["round"] for row in rows] == [1] * 5 + [2] * 2
    for number, seeds in ((1, range(6)), (2, range(6, 18))):
        group = [row for row in rows if row["round"] == number]
        assert [row["score"] for row in group] == sorted((r["score"] for r in group), reverse=True)
        for row in group:
            drawn = generate(MODEL, seeds, **row["sample"])
            score = evaluate(drawn, reference=reference)["fd_lite2"]
            assert row["score"] == pytest.approx(score, rel=1e-6)
    best_two = [row["sample"] for row in rows[:5]][-2:]
    assert all(row["sample"] in best_two for row in rows[5:])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erw.evaluation.sweep.generate", never)
        assert sweep({"": MODEL}, GRID, SAMPLE, **options) == rows
