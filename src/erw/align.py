"""Alignment: bring a network's hidden tokens close to the features of a frozen vision encoder.

    h (B, T, D) hidden tokens after some block     T(h) (B, T, F) projected by a `Projector`
    z (B, T, F) the encoder's patch features of the clean image

Source: REPA (arXiv 2410.06940) Eq. 8; ERW (arXiv 2504.10188) Eq. 13 and Eq. 40; iREPA (arXiv
2512.10794); HASTE (arXiv 2505.16792); Dispersive Loss (arXiv 2506.09027).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from erw.errors import ConfigError

AlignLoss = Callable[..., Tensor]


def cosine(projected: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity of every token with its target (B, T, F), averaged.

    Computed in float32 also under autocast, where normalising in 16 bit loses digits.
    """
    with _without_autocast(projected):
        a = F.normalize(projected.float(), dim=-1)
        b = F.normalize(target.float(), dim=-1)
        return -(a * b).sum(-1).mean()


def nt_xent(
    projected: Tensor, target: Tensor, *, temperature: float = 0.1, negatives: str = "image"
) -> Tensor:
    """Normalised temperature-scaled cross entropy (InfoNCE) of tokens (B, T, F) and their targets.

    The ERW paper names NT-Xent and defines neither its temperature nor its negatives. Here, with
    unit vectors a = T(h) / |T(h)| and b = z / |z| and temperature tau,

        loss = - mean_i log( exp(<a_i, b_i> / tau) / sum_j exp(<a_i, b_j> / tau) )

    where i runs over all tokens, the positive is the same patch of the same image, and j runs over

    - `image`:  the T patches of the same image (says *where* things are);
    - `batch`:  all patches of the (micro-)batch, across ranks: B T logits a token, mind the memory;
    - `pooled`: the images of the batch, across ranks, each the mean of its tokens (*which image*).
    """
    with _without_autocast(projected):
        a, b = projected.float(), target.float()
        if negatives == "pooled":
            a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        if negatives == "image":
            logits = a @ b.transpose(1, 2) / temperature  # (B, T, T)
            positive = logits.diagonal(dim1=1, dim2=2)
            return (logits.logsumexp(-1) - positive).mean()
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        keys, first = gathered(b)
        logits = a @ keys.T / temperature
        positive = torch.arange(first, first + len(a), device=a.device)
        return F.cross_entropy(logits, positive)


def dispersive(projected: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Images pushed apart, without positives; `target` is not looked at (arXiv 2506.09027).

    With z_i all T F numbers of image i and i, j over the (micro-)batch, across ranks, i = j too,

        loss = log mean_{i, j} exp(- |z_i - z_j|^2 / (T F tau))

    The distance is per number, as in the authors' code, so tau does not depend on the width.
    """
    with _without_autocast(projected):
        own = projected.float().flatten(1)
        z, first = gathered(own.detach())
        ranks = len(z) // len(own)
        z = torch.cat([z[:first], own, z[first + len(own) :]])
        z = z - z.detach().mean(0)  # distances stay, and lose fewer digits below
        square = z.square().sum(1)
        distance = (square[:, None] + square - 2 * z @ z.T).clamp(min=0).fill_diagonal_(0.0)
        logits = -distance / (z.shape[1] * temperature)
        loss = logits.flatten().logsumexp(0) - math.log(logits.numel())
        # Each rank has the gradient of its own rows; their sum is wanted, not their mean.
        return ranks * loss - (ranks - 1) * loss.detach()


def attention(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of attention with a teacher's, from logits (B, heads, T, T), averaged over
    images, heads and queries (HASTE, arXiv 2505.16792)."""
    with _without_autocast(logits):
        return -(target.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1).mean()


def attention_logits(queries_keys: Tensor, heads: int) -> Tensor:
    """Logits (B, heads, T, T) = q k^T / sqrt(F / heads) of tokens' queries and keys (B, T, 2 F).

    Raises ConfigError where F does not divide into so many heads.
    """
    width = queries_keys.shape[-1] // 2
    if width % heads:
        raise ConfigError(f"plan.align heads {heads}: the teacher's attention has {width} channels")
    with _without_autocast(queries_keys):
        q, k = queries_keys.float().unflatten(2, (2, heads, width // heads)).permute(2, 0, 3, 1, 4)
        return q * (width / heads) ** -0.5 @ k.transpose(-1, -2)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def gathered(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of every rank, without gradient, and the index of this rank's first row."""
    if rows.is_meta or not (dist.is_available() and dist.is_initialized()):
        return rows, 0
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts), dist.get_rank() * len(rows)


class Projector(nn.Sequential):
    """The three-layer SiLU MLP of REPA, token by token: width -> hidden -> hidden -> dim."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        a, b, c = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)
        super().__init__(a, nn.SiLU(), b, nn.SiLU(), c)
        for layer in (a, b, c):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class ConvProjector(nn.Module):
    """One 3 x 3 convolution on the square grid of tokens (iREPA, arXiv 2512.10794)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, dim, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ConfigError(f"projector conv needs a square grid, not {tokens.shape[1]} tokens")
        return self.conv(tokens.mT.unflatten(2, (side, side))).flatten(2).mT


ALIGN_LOSSES: dict[str, AlignLoss] = {
    "cosine": cosine,
    "nt_xent": nt_xent,
    "nt_xent_batch": partial(nt_xent, negatives="batch"),
    "nt_xent_pooled": partial(nt_xent, negatives="pooled"),
    "dispersive": dispersive,
    "attention": attention,
}
"""Name -> loss (projected (B, T, F), target (B, T, F), temperature= where it has one) -> scalar."""

PROJECTORS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mlp": Projector,
    "linear": lambda width, hidden, dim: nn.Linear(width, dim),
    "conv": lambda width, hidden, dim: ConvProjector(width, dim),
    "none": lambda width, hidden, dim: nn.Identity(),
}
"""Name -> (width, hidden, dim) -> module from tokens (B, T, width) to (B, T, dim)."""


def _standardized(target: Tensor, *, share: float = 1.0) -> Tensor:
    deviation, mean = torch.std_mean(target.float(), dim=1, keepdim=True)
    return (target.float() - share * mean) / (deviation + 1e-6)


TARGET_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda target: target,
    "tokens": _standardized,  # each channel with mean 0 and deviation 1 over an image's tokens
    "irepa": partial(_standardized, share=0.6),  # less only so much of the mean (arXiv 2512.10794)
    "images": lambda target: target,  # over the cache's images: the objective has done it already
}
"""Name -> what is done to a target (B, T, F) before it is compared."""


def compare(loss: AlignLoss, projected: Tensor, target: Tensor) -> Tensor:
    """`loss` of two tensors; ConfigError where their shapes differ."""
    if projected.shape != target.shape:
        shapes = f"projected tokens {tuple(projected.shape)}, targets {tuple(target.shape)}"
        raise ConfigError(f"{shapes}: expected the same shape")
    return loss(projected, target)


class AlignedOutput(NamedTuple):
    """What the model returned (None: stopped early) and the alignment loss (None: no targets)."""

    out: Any
    align: Tensor | None


class _Stop(Exception):
    """Leaves a foreign model's forward at the tapped block."""


class Aligned(nn.Module):
    """Any transformer, untouched, with an alignment loss on the output of one of its blocks.

    Args:
        at: module path of the block, such as "transformer_blocks.7"; a forward hook taps it.
        width: channels of the tapped tokens.
        dim: channels of the targets; a sequence for several encoders at once.
        projector: of `PROJECTORS`; iREPA has `conv`.
        hidden: width of its hidden layers.
        normalize: what is done to targets first, of `TARGET_NORMS`; iREPA has `irepa`.
        loss: `cosine`, `nt_xent` (with `functools.partial` for its options) or any function of two
            (B, T, F) tensors. Several encoders' losses are averaged.
        select: picks the image tokens (B, T, width) from what the block returns. Default: a tensor
            itself, of a tuple (joint text-image blocks of SD3 and Flux) the last element.

    Calling it passes everything on to the model but `targets`, features (B, T, dim) or one tensor
    per encoder (None: the plain model), `at`, another block for this call, and `stop`: blocks after
    it do not run, and `out` is None (not for FSDP2, whose post-forward hooks would be skipped).
    `targets` may also be the path of another block, whose output is the target, without gradient
    (LayerSync, arXiv 2510.12581).
    """

    def __init__(
        self, model: nn.Module, *, at: str, width: int, dim: int | Sequence[int],
        projector: str = "mlp", hidden: int = 2048, normalize: str = "none",
        loss: AlignLoss = cosine, select: Callable[[Any], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.at, self.loss, self.normalize = model, at, loss, TARGET_NORMS[normalize]
        self.select = select or _image_tokens
        dims = (dim,) if isinstance(dim, int) else dim
        self.projectors = nn.ModuleList(PROJECTORS[projector](width, hidden, d) for d in dims)

    def forward(
        self, *args: Any, targets: Tensor | Sequence[Tensor] | str | None = None,
        at: str | None = None, stop: bool = False, **kwargs: Any,
    ) -> AlignedOutput:  # fmt: skip
        if targets is None:
            return AlignedOutput(self.model(*args, **kwargs), None)
        path, tapped, learning = at or self.at, dict[str, Tensor](), torch.is_grad_enabled()
        if isinstance(targets, str) and stop:
            raise ConfigError(f"targets of {targets!r} need the whole model: leave stop out")

        def tap(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            if learning and not torch.is_grad_enabled():
                raise ConfigError(f"{name!r} has no gradients: checkpoint use_reentrant=False")
            tapped[name] = self.select(output)
            if stop:
                raise _Stop

        out, handles = None, []
        try:
            for name in {path, targets} if isinstance(targets, str) else {path}:
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(partial(tap, name)))
            out = self.model(*args, **kwargs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if isinstance(targets, str):
            targets = tapped[targets].detach()
        targets = (targets,) if isinstance(targets, Tensor) else targets
        pairs = zip(self.projectors, map(self.normalize, targets), strict=True)
        losses = [compare(self.loss, project(tapped[path]), z) for project, z in pairs]
        return AlignedOutput(out, torch.stack(losses).mean())


def _image_tokens(output: Any) -> Tensor:
    tokens = output[-1] if isinstance(output, tuple) and output else output
    if not isinstance(tokens, Tensor):
        raise ConfigError(f"the block returned {type(output).__name__}: give select= for tokens")
    return tokens
