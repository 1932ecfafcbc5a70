"""Hidden states of a transformer on images that it is shown at a chosen noise time.

A run's EMA weights or one of its checkpoints, or any network with SiT's taps, is given the latents
of n images, noised to time t (0: clean, 1: noise alone). Depths count blocks from 1. What is kept
of each block is the mean over its tokens, as REPA compares them, and how spatial its tokens are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw import ddpm, flow
from erw.config import Flow
from erw.errors import CheckpointError, ConfigError, DataError
from erw.evaluation.material import Material, local_over_distant
from erw.sampling.generation import start_noise
from erw.training import checkpoint
from erw.training.trained import Trained, load

Labels = Literal["null", "given"]


class States(NamedTuple):
    """Of each depth: tokens' mean (n, D) and the images' mean spatial score."""

    pooled: dict[int, Tensor]
    spatial: dict[int, float]


@torch.no_grad()
def hidden_states(
    model: Any,
    shown: Material,
    *,
    time: float = 0.0,
    depths: Sequence[int] = (),
    labels: Labels = "null",
    batch_size: int = 64,
) -> States:
    """Hidden states of a model on the images of `shown` at one noise time.

    Args:
        model: a `Trained` run, a `Pretrained` network, or a `SiT`.
        depths: after which blocks; empty: all.
        labels: "null": the null class for every image, so that nothing of the label is in the
            states; "given": each image's own.

    Raises:
        ConfigError: a time outside 0..1, or a depth that the model does not have.
        DataError: latents of another shape than the model's.
    """
    net: nn.Module = model if isinstance(model, nn.Module) else model.net
    blocks: int = getattr(net, "depth", None) or model.net.depth
    depths = tuple(depths) or tuple(range(1, blocks + 1))
    if not 0 <= time <= 1:
        raise ConfigError(f"time {time}: expected 0 (clean) to 1 (noise)")
    if wrong := [depth for depth in depths if not 1 <= depth <= blocks]:
        raise ConfigError(f"depth {wrong[0]}: the model has blocks 1 to {blocks}")
    _check(model, shown, labels)
    clean, given, joint = _inputs(getattr(net, "net", net), shown)
    device = next(net.parameters()).device
    pooled: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    spatial = dict.fromkeys(depths, 0.0)
    for lo in range(0, len(shown.rows), batch_size):
        part = slice(lo, lo + batch_size)
        x, rows = clean[part].to(device), shown.rows[part]
        eps = start_noise(rows, tuple(shown.latents.shape[1:]), token=joint).to(device)
        y = given[part].to(device) if labels == "given" else None
        x_t, told = _noised(model, x, eps, time)
        for depth, h in net(x_t, told, y, tap=depths).hidden.items():
            h = h[:, 1:] if joint else h  # the patches alone
            pooled[depth].append(h.float().mean(1).cpu())
            spatial[depth] += float(local_over_distant(h).sum()) / len(shown.rows)
    return States({depth: torch.cat(parts) for depth, parts in pooled.items()}, spatial)


def checkpoints(
    folder: str | Path, *, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Trained]]:
    """(step, model) with the EMA weights of every checkpoint that a run folder keeps, oldest first.

    Raises CheckpointError where there is none.
    """
    paths = checkpoint.paths(Path(folder) / "checkpoints")
    if not paths:
        raise CheckpointError(f"{folder} keeps no checkpoints: give --log.keep when training")
    for step in map(checkpoint.step_of, paths):
        yield step, load(folder, checkpoint=step, device=device)


def _noised(model: Any, x: Tensor, eps: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Latents at a noise time as the model's objective has them, and what its network is told: the
    time or, of a DiT, the step of its chain (the first for clean latents)."""
    t = torch.full((len(x),), time, device=x.device)
    of = model.run.flow if hasattr(model, "run") else Flow()
    if of.objective == "flow":
        return flow.noise(x, eps, t, path=flow.PATHS[of.path]).x_t, t
    step = ddpm.step_at(t)
    return (ddpm.noised(ddpm.chain(), x, eps, step) if time else x), step


def _inputs(sit: Any, shown: Material) -> tuple[Tensor, Tensor, int]:
    """Clean states and what they are conditioned on, both as the network takes them, and the
    channels of a class token in the states."""
    joint, given = (getattr(sit, name, 0) for name in ("class_token", "representation"))
    token = shown.token
    labels = shown.labels if getattr(sit, "null_class", 1) else torch.zeros_like(shown.labels)
    if not (joint or given):
        return shown.latents, labels, 0
    if token is None or token.shape[1] != (joint or given):
        raise DataError(
            f"the model needs class tokens of {joint or given} channels, which {shown.encoder} has "
            "not left in this cache: give the cache that it was trained on"
        )
    if given:
        return shown.latents, F.layer_norm(token, token.shape[1:]), 0
    return torch.cat([shown.latents.flatten(1), token], 1), labels, joint


def _check(model: Any, shown: Material, labels: Labels) -> None:
    """Refuse latents of another shape than the model's, and labels of other classes."""
    shape = getattr(model, "latent_shape", None)
    if shape is not None and tuple(shape) != tuple(shown.latents.shape[1:]):
        raise DataError(
            f"the latents are {tuple(shown.latents.shape[1:])}, the model's are {tuple(shape)}: "
            "give the cache that it was trained on, or images with its VAE"
        )
    names = getattr(model, "class_names", ())
    if labels == "given" and names and shown.class_names and names != shown.class_names:
        raise ConfigError(
            f"labels given: the images have the classes {', '.join(shown.class_names[:3])}, ..., "
            f"the model {', '.join(names[:3])}, ...; leave the labels out"
        )
