"""The Inception network of 2015 with random weights in a file."""

from pathlib import Path

import pytest
import torch

from erw.evaluation.inception import Inception, load_inception
from helpers.inception import random_state


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_state(), path)
    return path


@pytest.fixture(scope="session")
def net(weights: Path) -> Inception:
    return load_inception(weights)
