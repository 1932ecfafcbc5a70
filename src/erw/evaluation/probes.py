"""What can be read off features: classes by a linear map, and by the nearest neighbours."""

import torch
from torch import Tensor
from torch.nn import functional as F

from erw.errors import DataError
from erw.rng import generator

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def linear_probe(features: Tensor, labels: Tensor, *, seed: int = 0) -> float:
    """Accuracy of a linear map from features (n, D) to classes (n,) on a fifth that it never saw.

    Ridge regression to one-hot labels on standardised features: a closed form, without steps or a
    learning rate to tune. Its strength, relative to the mean variance, is the best of `RIDGES` on
    another fifth. Numbers are comparable with each other, not with probes trained by descent.
    """
    train, choose, test = _split(features, labels, seed=seed)
    x = features.double()
    mean, std = x[train].mean(0), x[train].std(0) + 1e-6
    x = F.pad((x - mean) / std, (0, 1), value=1.0)
    classes = int(labels.max()) + 1
    wanted = F.one_hot(labels[train], classes).double()
    gram, cross = x[train].T @ x[train], x[train].T @ wanted
    eye = torch.eye(len(gram), dtype=gram.dtype)

    def accuracy(ridge: float, rows: Tensor) -> float:
        weight = torch.linalg.solve(gram + ridge * len(train) * eye, cross)
        return ((x[rows] @ weight).argmax(1) == labels[rows]).double().mean().item()

    best = max(RIDGES, key=lambda ridge: accuracy(ridge, choose))
    return accuracy(best, test)


def knn_accuracy(
    features: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07, seed: int = 0
) -> float:
    """Accuracy of a vote of the k nearest by cosine, weighted by exp(cosine / temperature).

    Four fifths of the images vote on the last one. Source: Caron et al. (arXiv 2104.14294).
    """
    train, choose, test = _split(features, labels, seed=seed)
    known = torch.cat([train, choose])
    unit = F.normalize(features.double(), dim=-1)
    near = (unit[test] @ unit[known].T).topk(min(k, len(known)), dim=1)
    votes = torch.zeros(len(test), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[known][near.indices], (near.values / temperature).exp())
    return (votes.argmax(1) == labels[test]).double().mean().item()


def _split(features: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers: three fifths, a fifth, a fifth. Raises DataError for too few or one class."""
    if len(features) != len(labels) or len(features) < 10:
        raise DataError(f"{len(features)} features, {len(labels)} labels: expected 10 or more")
    if int(labels.max()) == int(labels.min()):
        raise DataError("all images are of one class: accuracy says nothing, choose cknna or cka")
    rows = torch.randperm(len(labels), generator=generator(seed, "probe"))
    fifth = len(rows) // 5
    return rows[2 * fifth :], rows[:fifth], rows[fifth : 2 * fifth]
