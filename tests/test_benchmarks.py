"""The benchmarks' own side still runs: peers are clones that a test does not have."""

import json
from pathlib import Path

import pytest

from helpers.forked import Python

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("phase", ["warmup", "full"])
def test_our_step_takes_part(phase: str) -> None:
    spec = {"name": "erw", "model": "S/8", "batch": 2, "threads": 1, "compile": False}
    spec |= {"warmup_depth": 1, "align_depth": 4}
    order = {"precision": "fp32", "phase": phase, "steps": 1}
    done = Python(BENCHMARKS / "contenders.py", json.dumps(spec), stdin=json.dumps(order))
    assert done.wait() == 0, done.err
    answer = json.loads(done.out)
    assert len(answer["wall"]) == len(answer["cpu"]) == 1


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_it_parses_and_its_imports_are_there(name: str) -> None:
    import ast

    for node in ast.walk(ast.parse((BENCHMARKS / name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("erw"):
            module = __import__(node.module or "", fromlist=["*"])
            for alias in node.names:
                if not hasattr(module, alias.name):
                    __import__(f"{node.module}.{alias.name}")
