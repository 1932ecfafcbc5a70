"""What all tests share: markers that skip with a reason, golden values, one thread per worker."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
# Here, where $ERW_GOLDEN says, or beside the checkout.
GOLDEN = [
    Path(__file__).parent / "golden",
    Path(os.environ.get("ERW_GOLDEN", "golden")),
    ROOT.parent / "shared" / "golden",
]

# What the package keeps for later runs (drawn glyphs, statistics) is kept here, not in your home.
os.environ["XDG_CACHE_HOME"] = str(ROOT / ".pytest_cache" / "home")
# Nothing is downloaded behind a test's back.
os.environ["ERW_OFFLINE"] = "1"

# Files that take longest are begun first, so that no worker is left with one at the end.
LONGEST = [
    "training/test_train.py", "training/test_resume.py", "study/test_run.py", "test_examples.py",
    "cli/test_cli.py", "evaluation/test_adm.py", "interop/test_export.py",
    "evaluation/test_features.py", "training/test_rcg.py", "training/test_optimizer.py",
    "study/test_report.py", "evaluation/test_callback.py", "data/test_prepare.py",
    "training/test_methods.py", "training/test_routing.py", "interop/test_init_from.py",
]  # fmt: skip

# Workers share the cores, and sums of floats must not depend on how many there are.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {
        "slow": (os.environ.get("ERW_SLOW") == "1", "slow: set ERW_SLOW=1 to run it"),
        "network": (os.environ.get("ERW_NETWORK") == "1", "network: set ERW_NETWORK=1 to run it"),
        "gpu": (torch.cuda.is_available(), "gpu: no accelerator here"),
    }
    for item in items:
        for marker, (wanted, reason) in skips.items():
            if item.get_closest_marker(marker) and not wanted:
                item.add_marker(pytest.mark.skip(reason=reason))
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """golden("sit_forward") -> the arrays of that file; fails where the file is missing."""

    def read(name: str) -> dict[str, np.ndarray]:
        for folder in GOLDEN:
            if (path := folder / f"{name}.npz").exists():
                with np.load(path) as arrays:
                    return dict(arrays)
        pytest.fail(f"golden file {name}.npz is in none of {', '.join(map(str, GOLDEN))}")

    return read


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real cache that nothing writes to; a module may have its own instead."""
    from helpers.tiny import tiny_cache

    return tiny_cache(tmp_path_factory.mktemp("shared") / "cache").path


@pytest.fixture(scope="session")
def straight(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on it without a stop, that nothing writes to."""
    from helpers.tiny import tiny_run
    from helpers.training import go

    out = tmp_path_factory.mktemp("straight") / "run"
    go(tiny_run(cache), out)
    return out


@pytest.fixture(scope="session")
def attended(cache: Path, straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cache with the attention of that run's second block too."""
    from erw.data.prepare import add_encoders
    from helpers.tiny import tiny_images

    out = shutil.copytree(cache, tmp_path_factory.mktemp("attended") / "cache")
    return add_encoders(tiny_images(), out, encoders=[f"run:{straight}#attention2"]).path


@pytest.fixture(scope="session")
def straight_dit(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with DiT's objective."""
    from helpers.tiny import as_dit, tiny_run
    from helpers.training import go

    out = tmp_path_factory.mktemp("straight") / "dit"
    go(as_dit(tiny_run(cache)), out)
    return out
