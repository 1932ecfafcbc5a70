"""Measures of features: alignment of two representations, and accuracy of probes.

| symbol | meaning                                  | shape            |
| a, b   | features of the same n images            | (n, D1), (n, D2) |
| K, L   | their inner products, K_ij = <a_i, a_j>  | (n, n)           |

Features are taken as they are: normalise or centre them first if you want that.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from erw.errors import DataError
from erw.rng import generator

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def cknna(a: Tensor, b: Tensor, *, k: int = 10, unbiased: bool = True) -> float:
    """Centred kernel nearest-neighbour alignment of features (n, D1), (n, D2); 1 with itself.

        CKNNA = align(K, L) / sqrt(align(K, K) align(L, L))

    where align(K, L) is the HSIC of both kernels after a mask keeps the pairs (i, j) with j among
    the k nearest of i in *both*. The mask is made anew for each pair of kernels: align(K, K) keeps
    all of K's own neighbours, which is what makes neighbours that are not shared cost something.
    (The ERW release uses the mask of (K, L) in all three, and so prints 0.998 for 0.19.) `unbiased`
    leaves the diagonal out and takes the HSIC of Song et al. (2012), Eq. 5.
    Source: Huh et al. (arXiv 2405.07987) and their released code.

    Raises DataError for unequal counts, or unless 2 <= k < n.
    """
    kernel_a, kernel_b = _kernels(a, b, k=k)
    near_a, near_b = _nearest(kernel_a, k, unbiased), _nearest(kernel_b, k, unbiased)
    hsic = _hsic_unbiased if unbiased else _hsic_biased
    shared = near_a * near_b
    cross = hsic(shared * kernel_a, shared * kernel_b)
    own_a = hsic(near_a * kernel_a, near_a * kernel_a)
    own_b = hsic(near_b * kernel_b, near_b * kernel_b)
    return (cross / (own_a * own_b).sqrt()).item()


def cka(a: Tensor, b: Tensor, *, unbiased: bool = True) -> float:
    """Centred kernel alignment with the linear kernel (Kornblith et al., arXiv 1905.00414)."""
    kernel_a, kernel_b = _kernels(a, b, k=2)
    hsic = _hsic_unbiased if unbiased else _hsic_biased
    own = hsic(kernel_a, kernel_a) * hsic(kernel_b, kernel_b)
    return (hsic(kernel_a, kernel_b) / own.sqrt()).item()


def mutual_knn(a: Tensor, b: Tensor, *, k: int = 10) -> float:
    """Mean share of the k nearest (by inner product, self left out) that both sets have in common.

    Source: Huh et al. (arXiv 2405.07987).
    """
    kernel_a, kernel_b = _kernels(a, b, k=k)
    shared = _nearest(kernel_a, k, True) * _nearest(kernel_b, k, True)
    return (shared.sum(1) / k).mean().item()


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
    target = F.one_hot(labels[train], classes).double()
    gram, cross = x[train].T @ x[train], x[train].T @ target
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


def _kernels(a: Tensor, b: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise DataError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}; "
            "expected (n, D1) and (n, D2) of the same images"
        )
    if not 2 <= k < len(a) or len(a) < 4:
        raise DataError(f"k = {k} neighbours among {len(a)} images: give 2 <= k < n, n >= 4")
    a, b = a.double(), b.double()
    return a @ a.T, b @ b.T


def _nearest(kernel: Tensor, k: int, without_self: bool) -> Tensor:
    """Mask (n, n): 1 where j is among the k largest of row i."""
    if without_self:
        kernel = kernel.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(kernel).scatter_(1, kernel.topk(k, dim=1).indices, 1.0)


def _hsic_biased(kernel_a: Tensor, kernel_b: Tensor) -> Tensor:
    """tr(K H L H) with the centring H = 1 - 1/n, without making H."""
    centred = kernel_b - kernel_b.mean(0) - kernel_b.mean(1, keepdim=True) + kernel_b.mean()
    return (kernel_a * centred.T).sum()


def _hsic_unbiased(kernel_a: Tensor, kernel_b: Tensor) -> Tensor:
    """Song et al. (2012), Eq. 5, for kernels that a mask may have made unsymmetric."""
    n = len(kernel_a)
    k, l = (kernel.clone().fill_diagonal_(0) for kernel in (kernel_a, kernel_b))  # noqa: E741
    both = (k * l.T).sum()
    apart = k.sum() * l.sum() / ((n - 1) * (n - 2))
    chained = 2 * (k.sum(0) @ l.sum(1)) / (n - 2)
    return (both + apart - chained) / (n * (n - 3))


def _split(features: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers: three fifths, a fifth, a fifth. Raises DataError for too few or one class."""
    if len(features) != len(labels) or len(features) < 10:
        raise DataError(f"{len(features)} features, {len(labels)} labels: expected 10 or more")
    if int(labels.max()) == int(labels.min()):
        raise DataError("all images are of one class: accuracy says nothing, choose cknna or cka")
    rows = torch.randperm(len(labels), generator=generator(seed, "probe"))
    fifth = len(rows) // 5
    return rows[2 * fifth :], rows[:fifth], rows[fifth : 2 * fifth]
