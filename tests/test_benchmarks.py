"""The benchmarks' own side still runs: peers are clones that a test does not have."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_it_parses_and_its_imports_are_there(name: str) -> None:
    import ast

    for node in ast.walk(ast.parse((BENCHMARKS / name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("erw"):
            module = __import__(node.module or "", fromlist=["*"])
            for alias in node.names:
                if not hasattr(module, alias.name):
                    __import__(f"{node.module}.{alias.name}")
