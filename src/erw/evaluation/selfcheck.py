"""Known numbers through the whole path of evaluation: run it when a score looks wrong.

Each check has an answer that is known without running our code: a closed form, or a value recorded
when this was written. It finds a broken linear algebra library (SciPy's square root of matrices
once gave FID 20.65 for 8.22), a broken image reader, or another encoder.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erw.evaluation.distances import Moments, frechet, frechet_features, inception_score, kid
from erw.evaluation.evaluate import evaluate
from erw.evaluation.inception import resize_tf1
from erw.evaluation.manifold import precision_recall

FD_LITE2 = 57.3239
"""Of `pictures(24)` against `pictures(24, first=24)`, recorded on a CPU with torch 2.13."""


class Check(NamedTuple):
    """One check: what was found, what is right, and how far they may be apart."""

    name: str
    found: float
    right: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return abs(self.found - self.right) <= self.tolerance


def self_check(*, weights: str | Path | None = None, device: str = "cpu") -> Iterator[Check]:
    """All checks, one by one as they are done; with `weights`, Inception's path too.

    Raises FileNotFoundError or CheckpointError for weights that cannot be used.
    """
    for what, formula, expected, tolerance in FORMULAS:
        yield Check(what, formula(), expected, tolerance)
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "one.npz", Path(folder) / "other.npz"
        for path, first in ((one, 0), (other, 24)):
            np.savez(path, arr_0=pictures(24, first=first).permute(0, 2, 3, 1).numpy())

        def score(images: Path, reference: Path, metric: str) -> dict[str, float]:
            return evaluate(
                images,
                reference=reference,
                metric=metric,
                weights=weights if metric == "adm" else None,
                device=device,
                cache=folder,
            ).values

        found = score(one, other, "fd-lite2")["fd_lite2"]
        yield Check("npz -> FD-Lite2, as recorded", found, FD_LITE2, 2e-3 * FD_LITE2)
        if weights is None:
            return
        same = score(one, one, "adm")
        for name, right in (("fid", 0.0), ("sfid", 0.0), ("precision", 1.0), ("recall", 1.0)):
            yield Check(f"npz -> {name} of a set against itself", same[name], right, 1e-3)
        there, back = score(one, other, "adm"), score(other, one, "adm")
        yield Check("npz -> fid is symmetric", there["fid"] / back["fid"], 1.0, 1e-6)
        yield Check("npz -> precision is the other's recall", there["precision"], back["recall"], 0)


def pictures(count: int, *, first: int = 0, side: int = 64) -> Tensor:
    """uint8 (count, 3, side, side): coloured stripes that need no random numbers."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    images = []
    for i in range(first, first + count):
        planes = [rows * (i % 5 + k) + columns * (i % 7 + 2 * k) + 37 * i for k in range(3)]
        images.append(torch.stack(planes).remainder(256))
    return torch.stack(images).to(torch.uint8)


def _gaussians() -> float:
    a = torch.linspace(0.5, 3, 64, dtype=torch.float64)
    zero = torch.zeros(64, dtype=torch.float64)
    return frechet(zero, torch.diag(a.square()), zero + 0.5, torch.diag((a + 1).square()))


def _few() -> float:
    """Fewer images than dimensions, shifted: both covariances are the same, and singular."""
    x = pictures(20, side=16).flatten(1).double() / 255
    return frechet_features(Moments.of(x), x + 0.1)


def _score() -> float:
    return inception_score(torch.eye(10, dtype=torch.float64).repeat(30, 1) * 1e3, split_size=100)


def _kid() -> float:
    return kid(torch.ones(5, 4), 2 * torch.ones(6, 4)).mean


def _precision() -> float:
    real = torch.arange(20, dtype=torch.float64)[:, None]
    fake = torch.cat([real[:10], real[:10] + 1000])
    return precision_recall(real, fake).precision


def _resize() -> float:
    """Pixel 74 of 299 lies at 74 * 2 / 299 between 0 and 200, and keeps that in both directions."""
    x = torch.tensor([[0.0, 200.0], [0.0, 200.0]])[None, None]
    return resize_tf1(x, 299)[0, 0, 298, 74].item()


FORMULAS: tuple[tuple[str, Callable[[], float], float, float], ...] = (
    ("Fréchet distance of two Gaussians", _gaussians, 64 * (0.25 + 1), 1e-8),
    ("the same with fewer images than dimensions", _few, 0.01 * 768, 1e-6),
    ("Inception Score of 10 certain classes", _score, 10.0, 1e-9),
    ("kernel distance of two points", _kid, 2.0**3 + 5.0**3 - 2 * 3.0**3, 1e-9),
    ("precision, half of the images far away", _precision, 0.5, 0.0),
    ("TensorFlow 1's resize", _resize, 200 * math.fsum([74 * 2 / 299]), 1e-3),
)
