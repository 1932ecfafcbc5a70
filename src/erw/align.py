"""Alignment: bring a network's hidden tokens close to the features of a frozen vision encoder.

| symbol | meaning                                            | shape     |
| h      | hidden tokens after some block                     | (B, T, D) |
| T(h)   | projected tokens, `Projector`                      | (B, T, F) |
| z      | the encoder's patch features of the clean image    | (B, T, F) |

Source: REPA (arXiv 2410.06940) Eq. 8; ERW (arXiv 2504.10188) Eq. 13 and Eq. 40.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from erw.errors import ConfigError

AlignLoss = Callable[..., Tensor]
Negatives = Literal["image", "batch", "pooled"]


def cosine(projected: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity of every token with its target, averaged: a scalar in [-1, 1].

    Shapes (B, T, F). Computed in float32 also under autocast, where normalising in 16 bit loses
    digits.
    """
    with _without_autocast(projected):
        a = F.normalize(projected.float(), dim=-1)
        b = F.normalize(target.float(), dim=-1)
        return -(a * b).sum(-1).mean()


def nt_xent(
    projected: Tensor, target: Tensor, *, temperature: float = 0.1, negatives: Negatives = "image"
) -> Tensor:
    """Normalised temperature-scaled cross entropy (InfoNCE) from projected tokens to their targets.

    The ERW paper names NT-Xent and defines neither its temperature nor its negatives. Here, with
    unit vectors a = T(h) / |T(h)| and b = z / |z| and temperature tau,

        loss = - mean_i log( exp(<a_i, b_i> / tau) / sum_j exp(<a_i, b_j> / tau) )

    where i runs over all tokens, the positive is the same patch of the same image, and j runs over

    - `image`:  the T patches of the same image (says *where* things are; T logits a token);
    - `batch`:  all patches of all images of the batch, across ranks (B T logits a token: mind the
      memory);
    - `pooled`: tokens are averaged over each image first, and the sum runs over the images of the
      batch, across ranks (says *which image*; B logits an image).

    With gradient accumulation, "the batch" is the micro-batch. Shapes (B, T, F); returns a scalar
    >= 0.
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
        keys, first = _gathered(b)
        logits = a @ keys.T / temperature
        own = torch.arange(first, first + len(a), device=a.device)
        return F.cross_entropy(logits, own)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `x`; the meta device has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _gathered(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of every rank, without gradient, and the index of this rank's first row."""
    joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not joined or rows.is_meta:
        return rows, 0
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts), dist.get_rank() * len(rows)


class Projector(nn.Sequential):
    """The three-layer SiLU MLP of REPA, token by token: width -> hidden -> hidden -> dim."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


ALIGN_LOSSES: dict[str, AlignLoss] = {
    "cosine": cosine,
    "nt_xent": nt_xent,
    "nt_xent_batch": partial(nt_xent, negatives="batch"),
    "nt_xent_pooled": partial(nt_xent, negatives="pooled"),
}
"""Name -> loss (projected (B, T, F), target (B, T, F)) -> scalar; add your own here. One with a
keyword `temperature` can be given one."""

PROJECTORS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mlp": Projector,
    "linear": lambda width, hidden, dim: nn.Linear(width, dim),
    "none": lambda width, hidden, dim: nn.Identity(),
}
"""Name -> (width, hidden, dim) -> module from tokens (B, T, width) to (B, T, dim)."""


def standardized(target: Tensor) -> Tensor:
    """Each channel of (B, T, F) with mean 0 and deviation 1 over the tokens of its image."""
    target = target.float()
    deviation, mean = torch.std_mean(target, dim=1, keepdim=True)
    return (target - mean) / (deviation + 1e-6)


TARGET_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda target: target,
    "tokens": standardized,
}
"""Name -> what is done to a target (B, T, F) before it is compared."""


def compare(loss: AlignLoss, projected: Tensor, target: Tensor) -> Tensor:
    """`loss` of two (B, T, F) tensors. Raises ConfigError where their shapes differ."""
    if projected.shape != target.shape:
        raise ConfigError(
            f"projected tokens {tuple(projected.shape)} do not match the encoder's features "
            f"{tuple(target.shape)} (batch, tokens, dim); choose another patch size, input size, "
            "encoder grid or dim="
        )
    return loss(projected, target)


class AlignedOutput(NamedTuple):
    """What the wrapped model returned (None where it was stopped early) and the alignment loss
    (None where no targets were given)."""

    out: Any
    align: Tensor | None


class _Stop(Exception):
    """Leaves a foreign model's forward at the tapped block."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


class Aligned(nn.Module):
    """Any transformer, untouched, with an alignment loss on the output of one of its blocks.

    Args:
        model: the network. A model whose `forward` takes `tap=` and `stop_at=` (erw's own) is
            asked for its hidden tokens; any other is tapped by a forward hook.
        at: which block: its depth, counted from 1 (erw's models), or the module path of a block
            ("transformer_blocks.7").
        width: channels of the tapped tokens.
        dim: channels of the encoder's features; a sequence for several encoders at once.
        hidden: width of the projector's two hidden layers.
        loss: `cosine`, `nt_xent` (with `functools.partial` for its options) or any function of two
            (B, T, F) tensors. Several encoders' losses are averaged.
        skip: so many first tokens are no patches and are left out of the alignment.
        select: picks the image tokens (B, T, width) from what the block returns. Default: a tensor
            is taken as it is; of a tuple (joint text-image blocks of SD3 and Flux) the last
            element.

    Calling it passes everything on to the model, with three keywords taken out:

        targets: features (B, T, dim), or one tensor per encoder; None: the plain model, loss None.
        at: another block for this call (warm-up and full training may tap different depths).
        stop: True: blocks after `at` do not run, `out` is None, and they get no gradient.

    Under FSDP2 an early stop by hook would skip that module's own post-forward hook; use a model
    that takes `stop_at=` there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        at: int | str,
        width: int,
        dim: int | Sequence[int],
        hidden: int = 2048,
        loss: AlignLoss = cosine,
        skip: int = 0,
        select: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.at = at
        self.loss, self.skip = loss, skip
        self.select = select or image_tokens
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        self.projectors = nn.ModuleList(Projector(width, hidden, d) for d in dims)

    def forward(
        self,
        *args: Any,
        targets: Tensor | Sequence[Tensor] | None = None,
        at: int | str | None = None,
        stop: bool = False,
        **kwargs: Any,
    ) -> AlignedOutput:
        if targets is None:
            if stop:
                raise ConfigError(
                    "Aligned(stop=True) needs targets=: without them nothing is trained"
                )
            return AlignedOutput(self.model(*args, **kwargs), None)
        where = self.at if at is None else at
        if isinstance(where, int):
            tapped = self.model(*args, **kwargs, tap=(where,), stop_at=where if stop else None)
            out, tokens = tapped.velocity, tapped.hidden[where]
        else:
            out, tokens = self._tapped_by_hook(where, stop, args, kwargs)
        return AlignedOutput(out, self.alignment(tokens, targets))

    def alignment(self, tokens: Tensor, targets: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss of hidden tokens (B, T, width) against each encoder's features, averaged."""
        given = (targets,) if isinstance(targets, Tensor) else tuple(targets)
        if len(given) != len(self.projectors):
            raise ConfigError(
                f"{len(given)} target tensors for {len(self.projectors)} projectors; "
                "give one per encoder, in the order of dim="
            )
        losses = []
        for projector, z in zip(self.projectors, given, strict=True):
            losses.append(compare(self.loss, projector(tokens[:, self.skip :]), z))
        return torch.stack(losses).mean()

    def _tapped_by_hook(
        self, path: str, stop: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        try:
            block = self.model.get_submodule(path)
        except AttributeError as error:
            names = [name for name, _ in self.model.named_children()]
            raise ConfigError(
                f"no module {path!r} in the model; its children are {names}"
            ) from error
        seen: list[Tensor] = []
        learning = torch.is_grad_enabled()

        def tap(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if learning and not torch.is_grad_enabled():
                raise ConfigError(
                    f"the block {path!r} runs without gradients, so alignment cannot teach it; "
                    "with gradient checkpointing, use the kind with use_reentrant=False"
                )
            seen.append(self.select(output))
            if stop:
                raise _Stop(seen[-1])

        handle = block.register_forward_hook(tap)
        try:
            out = self.model(*args, **kwargs)
        except _Stop as stopped:
            return None, stopped.tokens
        finally:
            handle.remove()
        if not seen:
            raise ConfigError(
                f"the block {path!r} did not run in this forward pass; tap another one"
            )
        return out, seen[-1]


def image_tokens(output: Any) -> Tensor:
    """The image tokens in what a block returns: the tensor itself, or a tuple's last tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[-1], Tensor):
        return output[-1]
    raise ConfigError(
        f"the tapped block returned {type(output).__name__}; give select= to pick its image tokens"
    )
