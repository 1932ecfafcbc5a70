"""Scores over cost from what studies and runs leave behind: `results.json`, `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erw.errors import DataError
from erw.log import read_metrics
from erw.study.results import Results, read_results
from erw.study.target import Track
from erw.training.run_dir import MAY_CHANGE, json_flat
from erw.training.trained import read_recipe

KEYS = {"flops": "flops_total", "images": "images", "steps": "step", "seconds": "seconds"}


def tracks_of(paths: Sequence[str | Path], *, metric: str, over: str = "flops") -> list[Track]:
    """The tracks of studies (folder or results.json) and runs (folder or metrics.jsonl).

    Runs of the same settings but for their seed are seeds of one method, named by its recipe; where
    two methods would have one name, each is named by its first folder.

    Raises:
        FileNotFoundError, DataError: nothing there, or no score of that name; the known are named.
    """
    found: list[Track] = []
    runs = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} is neither a study nor a run: nothing is there")
        if path.suffix == ".json" or (path / "results.json").is_file():
            found += _of_study(path, read_results(path), metric=metric, over=over)
        else:
            runs.append(path.parent if path.is_file() else path)
    return found + _of_runs(runs, metric=metric, over=over)


def _of_study(path: Path, results: Results, *, metric: str, over: str) -> list[Track]:
    if metric != "fd_lite2":
        raise DataError(f"{path} has the score fd_lite2 and no {metric}")
    rows = results.settings.get("study", {}).get("train_images")
    scale = _epoch(rows, path) if over == "epochs" else 1
    key = KEYS["images" if over == "epochs" else over]
    found = []
    for method in results.methods:
        for seed in results.seeds(method):
            points = results.of(method, seed)
            steps = tuple(row.step for row in points)
            costs = tuple(getattr(row, key) / scale for row in points)
            scores = tuple(row.fd_lite2 for row in points)
            found.append(Track(method, seed, steps, costs, scores))
    return found


def _of_runs(folders: Sequence[Path], *, metric: str, over: str) -> list[Track]:
    recipes = [read_recipe(folder) for folder in folders]
    names, found = _names(folders, recipes), []
    for folder, recipe, name in zip(folders, recipes, names, strict=True):
        lines = [x for x in read_metrics(folder / "metrics.jsonl") if x["kind"] == "eval"]
        scored = [line for line in lines if metric in line["values"]]
        if not scored:
            known = sorted({name for line in lines for name in line["values"]})
            held = f"; it has {', '.join(known)}" if known else ": train with --eval.every STEPS"
            raise DataError(f"{folder / 'metrics.jsonl'} has no score {metric}{held}")
        scale = _epoch(recipe["cache"].get("rows"), folder) if over == "epochs" else 1
        key = KEYS["images" if over == "epochs" else over]
        found.append(
            Track(
                name,
                recipe["resolved"]["seed"],
                tuple(line["step"] for line in scored),
                tuple(line[key] / scale for line in scored),
                tuple(line["values"][metric] for line in scored),
            )
        )
    return found


def _names(folders: Sequence[Path], recipes: Sequence[dict[str, Any]]) -> list[str]:
    """The method of each run: its recipe, or the first folder of its kind, or its own folder."""
    kinds = [_kind(recipe) for recipe in recipes]
    names = []
    for folder, recipe, kind in zip(folders, recipes, kinds, strict=True):
        name = recipe["run"]["name"]
        same = [i for i, other in enumerate(kinds) if other == kind]
        seeds = {recipes[i]["resolved"]["seed"] for i in same}
        others = {k for r, k in zip(recipes, kinds, strict=True) if r["run"]["name"] == name}
        if len(seeds) < len(same):  # the same run twice: nothing to average
            name = folder.resolve().name
        elif len(others) > 1:
            name = folders[same[0]].resolve().name
        names.append(name)
    return names


def _kind(recipe: dict[str, Any]) -> str:
    """Everything that decides a run's numbers but its seed."""
    flat = json_flat(recipe["resolved"])
    kept = {k: v for k, v in flat.items() if not k.startswith((*MAY_CHANGE, "seed", "data.cache"))}
    return json.dumps([kept, recipe["cache"]["identity"]], sort_keys=True)


def _epoch(rows: int | None, where: Path) -> int:
    if not rows:
        raise DataError(f"{where} does not say how many images an epoch has: choose another --over")
    return rows
