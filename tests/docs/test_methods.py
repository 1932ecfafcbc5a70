"""docs/methods.md and its pictures are what the recipes say today; what was measured is told."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from erw.recipes import names, recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_of_methods_is_as_the_recipes_are() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "methods.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def script(path: str) -> Any:
    """A file of scripts/ or benchmarks/, imported."""
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def test_what_was_measured_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest comparison by its date: machine, steps, seeds, means and ranges."""

    def row(*scores: float, teachers: Sequence[str] = ()) -> dict[str, Any]:
        runs = [{"seed": i, "fd_lite2": x, "held_out_flow": 0.8} for i, x in enumerate(scores)]
        return {"steps": 1100, "teachers": list(teachers), "runs": runs}

    rows = {"quickstart_sit": row(500, 510), "quickstart_repa": row(480)}
    rows["quickstart_self"] = row(470, 490, teachers=["quickstart_vae_repa"])
    record = {"date": "2026-01-02T03:04", "machine": {"cpu": "A CPU"}, "rows": rows}
    record |= {"flops": 3.8e13, "steps": 1200, "samples": 500, "precision": "bfloat16"}
    (tmp_path / "methods-a.json").write_text(json.dumps(record))
    (tmp_path / "methods-b.json").write_text(json.dumps(record | {"date": "2025-12-31T00:00"}))
    methods = script("scripts/methods.py")
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    setting = tomllib.loads((ROOT / "docs" / "methods.toml").read_text())["measured"]
    found, said = methods.newest(setting)
    for words in ("3.8e+13", "1,200 steps", "seeds 0, 1", "A CPU", "2026-01-02", "methods-a.json"):
        assert words in said
    assert found == rows and "{" not in said
    assert methods.measured_text(["quickstart_self"], rows) == (
        "`quickstart_self`, 1,100 steps: FD-Lite2 480 (470 to 490), held-out loss 0.800 (0.800 to "
        "0.800), the training of quickstart_vae_repa not counted; SiT 505 (500 to 510), 0.800 "
        "(0.800 to 0.800); REPA 480 (one seed), 0.800 (one seed)."
    )
    assert methods.measured_text(["quickstart_ig"], rows) == "not compared."


def test_a_compared_recipe_keeps_its_shares_in_longer_and_shorter_runs() -> None:
    compare = script("benchmarks/methods.py")
    small = {name for name in names() if re.match("quickstart(_|$)", name)}
    left_out = {"quickstart_repa_stopped", "quickstart_reg", "quickstart_rcg", "quickstart_rdm"}
    assert {*compare.NAMES} == small - left_out
    for name in compare.NAMES:
        run = recipe(name)
        assert compare.lasting(run, run.steps) == run
        for steps in (run.steps // 2, 3 * run.steps):
            before, after = run.plan, compare.lasting(run, steps).plan
            counts = [(before.warmup, after.warmup), (before.routing.until, after.routing.until)]
            pairs = zip(before.align, after.align, strict=True)
            counts += [(a.weight.over, b.weight.over) for a, b in pairs]
            for old, new in counts:
                assert (old or 0) * steps == (new or 0) * run.steps
