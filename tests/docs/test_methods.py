"""docs/methods.md and its pictures are what the recipes say today."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_of_methods_is_as_the_recipes_are() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "methods.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
