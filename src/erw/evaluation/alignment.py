"""Measures of features: alignment of two representations, and accuracy of probes.

Features a (n, D1) and b (n, D2) are of the same n images, as they are: neither normalised nor
centred. K and L (n, n) are their inner products.
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
    the k nearest of i in *both*; so align(K, K) keeps all of K's own neighbours. (The ERW release
    uses the mask of (K, L) in all three, and so prints 0.998 for 0.19.) `unbiased` leaves the
    diagonal out and takes the HSIC of Song et al. (2012), Eq. 5. Source: Huh et al. (arXiv
    2405.07987) and their released code. Raises DataError unless 2 <= k < n.
    """
    kernels = _kernels(a, b, k=k)
    masks = []  # (n, n): 1 where j is among the k largest of row i
    for kernel in kernels:
        ranked = kernel.clone().fill_diagonal_(-torch.inf) if unbiased else kernel
        masks.append(torch.zeros_like(kernel).scatter_(1, ranked.topk(k, dim=1).indices, 1.0))
    shared = masks[0] * masks[1]
    own_a, own_b = (mask * kernel for mask, kernel in zip(masks, kernels, strict=True))
    cross = _hsic(shared * kernels[0], shared * kernels[1], unbiased)
    return (cross / (_hsic(own_a, own_a, unbiased) * _hsic(own_b, own_b, unbiased)).sqrt()).item()


def cka(a: Tensor, b: Tensor, *, unbiased: bool = True) -> float:
    """Centred kernel alignment with the linear kernel (Kornblith et al., arXiv 1905.00414)."""
    k, l = _kernels(a, b, k=2)  # noqa: E741
    own = _hsic(k, k, unbiased) * _hsic(l, l, unbiased)
    return (_hsic(k, l, unbiased) / own.sqrt()).item()


def linear_probe(features: Tensor, labels: Tensor) -> float:
    """Accuracy of a linear map from features (n, D) to classes (n,) on a fifth that it never saw.

    Ridge regression to one-hot labels on standardised features. Its strength, relative to the mean
    variance, is the best of `RIDGES` on another fifth. Not comparable with probes by descent.
    """
    train, choose, test = _split(labels)
    x = features.double()
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    x = F.pad(x, (0, 1), value=1.0)
    gram, cross = x[train].T @ x[train], x[train].T @ F.one_hot(labels)[train].double()
    eye = torch.eye(len(gram), dtype=gram.dtype)

    def accuracy(ridge: float, rows: Tensor) -> float:
        weight = torch.linalg.solve(gram + ridge * len(train) * eye, cross)
        return ((x[rows] @ weight).argmax(1) == labels[rows]).double().mean().item()

    return accuracy(max(RIDGES, key=lambda ridge: accuracy(ridge, choose)), test)


def knn_accuracy(features: Tensor, labels: Tensor, origins: Tensor | None = None) -> float:
    """Accuracy of a vote of the 20 nearest by cosine, weighted by exp(cosine / 0.07).

    Four fifths of the images vote on the last one; with `origins` (n,), what each was made from,
    all vote on all others of another origin. Source: Caron et al. (arXiv 2104.14294).
    """
    train, choose, test = _split(labels)
    voters = torch.cat([train, choose])
    unit = F.normalize(features.double(), dim=-1)
    if origins is not None:
        test = voters = torch.arange(len(labels))
    cosines = unit[test] @ unit[voters].T
    if origins is not None:
        cosines[origins[:, None] == origins] = -torch.inf
    near = cosines.topk(min(20, len(voters)), dim=1)
    votes = torch.zeros(len(test), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[voters][near.indices], (near.values / 0.07).exp())
    return (votes.argmax(1) == labels[test]).double().mean().item()


def spatial_structure(tokens: Tensor, grid: tuple[int, int]) -> float:
    """How much more alike near tokens (n, T, D) of an image are than far ones, -2 to 2.

    The mean cosine of tokens one step apart, in a row or column, less that of those 3/8 of a side
    and more apart, by rows plus columns. Source: iREPA's local against distant similarity (arXiv
    2512.10794; 6 steps on 16 x 16). Raises DataError for a grid without such pairs.
    """
    if min(grid) < 2:
        raise DataError(f"{grid[0]} x {grid[1]} tokens an image are too few: give a larger side")
    places = torch.cartesian_prod(*map(torch.arange, grid))
    apart = (places[:, None] - places).abs().sum(-1)  # (T, T)
    unit = F.normalize(tokens.float(), dim=-1)
    cosines = (unit @ unit.transpose(1, 2)).mean(0)
    far = apart >= max(2, round(3 / 8 * max(grid)))
    return (cosines[apart == 1].mean() - cosines[far].mean()).item()


def _kernels(a: Tensor, b: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    if not 2 <= k < len(a) or len(a) < 4:
        raise DataError(f"k = {k} neighbours among {len(a)} images: give 2 <= k < n, n >= 4")
    return a.double() @ a.double().T, b.double() @ b.double().T


def _hsic(k: Tensor, l: Tensor, unbiased: bool) -> Tensor:  # noqa: E741
    """Song et al. (2012), Eq. 5, for kernels that a mask may have made unsymmetric; or tr(KHLH)."""
    if not unbiased:  # with the centring H = 1 - 1/n
        return (k * (l - l.mean(0) - l.mean(1, keepdim=True) + l.mean()).T).sum()
    n = len(k)
    k, l = (kernel.clone().fill_diagonal_(0) for kernel in (k, l))  # noqa: E741
    apart = k.sum() * l.sum() / ((n - 1) * (n - 2))
    chained = 2 * (k.sum(0) @ l.sum(1)) / (n - 2)
    return ((k * l.T).sum() + apart - chained) / (n * (n - 3))


def _split(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers: three fifths, a fifth, a fifth. Raises DataError for too few or one class."""
    if len(labels) < 10 or len(labels.unique()) == 1:
        raise DataError("a probe needs 10 images or more, of more than one class")
    rows = torch.randperm(len(labels), generator=generator(0, "probe"))
    fifth = len(rows) // 5
    return rows[2 * fifth :], rows[:fifth], rows[fifth : 2 * fifth]
