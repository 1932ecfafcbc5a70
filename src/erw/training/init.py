"""Weights to begin with other than fresh ones: another model's, adapted to the run's classes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from erw.errors import CheckpointError
from erw.io import hash_tensors, misfit
from erw.training.trained import Trained


def init_record(model: Trained) -> dict[str, str]:
    """What `recipe.json` says of the model that a run begins with."""
    identity = hash_tensors(model.net) + "-heads" * bool(len(model.projectors))
    return {"source": model.source, "identity": identity, "message": model.origin}


def begin_with(net: nn.Module, model: Trained, *, projectors: nn.Module | None = None) -> None:
    """Copy the model's parameters into the transformer `net`, except those that its file did not
    have, and its alignment heads, if it has any, into `projectors`.

    Raises:
        CheckpointError: they do not fit; the first few differences are named.
    """
    loaded = {k: p for k, p in model.net.named_parameters() if k not in model.missing}
    hint = "leave out the --model settings, or use a cache with its latent channels"
    _copy(loaded, net, model.missing, f"{model.source} cannot start this run", hint)
    if len(model.projectors) and projectors is not None:
        heads = dict(model.projectors.named_parameters())
        problem = f"the alignment heads of {model.source} are not those of this run"
        _copy(heads, projectors, frozenset(), problem, "leave out --init-projectors")


@torch.no_grad()
def _copy(
    tensors: Mapping[str, Tensor],
    into: nn.Module,
    optional: frozenset[str],
    problem: str,
    hint: str,
) -> None:
    parameters = dict(into.named_parameters())
    if problems := misfit(tensors, parameters, optional=optional):
        raise CheckpointError(f"{problem}: {problems}; {hint}")
    for name, value in tensors.items():
        parameters[name].copy_(value)
