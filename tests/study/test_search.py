"""A search by halving steps: it finds the least of any unimodal function, in few trials, and goes
on where it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erw.config import Eval
from erw.errors import ConfigError
from erw.study import search as module
from erw.study.search import Point, search, wanted
from erw.study.studies import values_of
from helpers.tiny import tiny_run


def tried(sizes: list[int], score: Any) -> dict[Point, float]:
    scores: dict[Point, float] = {}
    while points := wanted(sizes, scores):
        assert not any(p in scores for p in points), "no point twice"
        scores |= {p: score(p) for p in points}
    return scores


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19)), min_size=1, max_size=3))
def test_it_finds_the_least_of_what_falls_and_rises(axes: list[tuple[int, int]]) -> None:
    sizes = [size for size, _ in axes]
    least = tuple(min(place, size - 1) for size, place in axes)
    scores = tried(sizes, lambda p: sum(abs(a - b) for a, b in zip(p, least, strict=True)))
    assert min(scores, key=scores.__getitem__) == least
    assert len(scores) <= 1 + sum(2 + 2 * size.bit_length() + 2 for size in sizes)


def test_trials_are_runs_and_a_stopped_search_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    scored = Eval(every=12, samples=4, reference_count=8, keep_best=False)
    run, axes = tiny_run(cache, eval=scored), dict([values_of("plan.align.0.weight.value=0,1,2")])
    real, trials = module._score, []

    def stops(run: Any, folder: Path) -> float:
        if len(trials) == 1:
            raise KeyboardInterrupt
        trials.append(run)
        return real(run, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_score", stops)
        search(run, axes, tmp_path / "out", trials=9)
    best = search(run, axes, tmp_path / "out", trials=9)
    folders = sorted((tmp_path / "out" / "trials").glob("[0-9]*"))
    assert [folder.name for folder in folders] == ["0", "1", "2"]
    found = {}
    for folder, value in zip(folders, (0, 1, 2), strict=True):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        (found[value],) = (line["values"]["fd_lite2"] for line in lines if line["kind"] == "eval")
    assert best == {"plan.align.0.weight.value": min(found, key=found.__getitem__)}
    assert (tmp_path / "out" / "search.svg").stat().st_size
    with pytest.raises(ConfigError, match="another search"):
        search(run.replace(seed=1), axes, tmp_path / "out", trials=9)
