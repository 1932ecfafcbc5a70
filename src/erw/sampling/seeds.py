"""What follows from a sample's seed: its noise, and its label where none is given."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from erw.errors import ConfigError
from erw.rng import generator
from erw.sampling.solvers import Noise

Labels = int | Sequence[int] | Tensor | Literal["random"] | None


def start_noise(seeds: Sequence[int], shape: tuple[int, ...], *, token: int = 0) -> Tensor:
    """The noise (B, *shape), float32, that samples of these seeds start from.

    With a class token of `token` channels: rows of both, the latents' noise being the same.
    """
    return _normal(seeds, shape, "start", token=token)


def step_noise(seeds: Sequence[int], shape: tuple[int, ...], *, token: int = 0) -> Noise:
    """Noise of SDE steps, (step, x) -> (B, *shape): a function of each seed and the step.

    `token` as in `start_noise`.
    """

    def noise(step: int, x: Tensor) -> Tensor:
        return _normal(seeds, shape, "step", step, token=token).to(x)

    return noise


def labels_of(
    labels: Labels, seeds: tuple[int, ...], num_classes: int
) -> tuple[tuple[int, ...] | None, str]:
    """The label of each seed and, for the record, the rule that they follow."""
    if not num_classes:
        if labels is not None:
            raise ConfigError("labels were given to an unconditional model; leave them out")
        return None, "none"
    if labels is None:
        return tuple(seed % num_classes for seed in seeds), "balanced: seed modulo classes"
    if isinstance(labels, str):
        if labels != "random":
            raise ConfigError(f"labels are {labels!r}; expected classes, 'random' or none")
        return tuple(_label(seed, num_classes) for seed in seeds), "random: drawn by seed"
    if isinstance(labels, int):
        chosen, rule = (labels,) * len(seeds), f"all {labels}"
    else:
        chosen, rule = tuple(int(label) for label in labels), "given"
    if len(chosen) != len(seeds):
        raise ConfigError(f"{len(chosen)} labels for {len(seeds)} seeds; give one label per seed")
    wrong = [label for label in chosen if not 0 <= label < num_classes]
    if wrong:
        raise ConfigError(f"label {wrong[0]} is none of the classes 0..{num_classes - 1}")
    return chosen, rule


def _label(seed: int, num_classes: int) -> int:
    """A class of equal chances, drawn by the seed."""
    rng = generator(seed, "sample", "label")
    return int(torch.randint(num_classes, (), generator=rng))


def _normal(
    seeds: Sequence[int], shape: tuple[int, ...], *tags: int | str, token: int = 0
) -> Tensor:
    """Standard normal (B, *shape) float32, a row per seed; from the CPU on any device."""
    if token:
        parts = _normal(seeds, shape, *tags), _normal(seeds, (token,), *tags, "class token")
        return torch.cat([part.flatten(1) for part in parts], 1)
    draw = [torch.randn(shape, generator=generator(seed, "sample", *tags)) for seed in seeds]
    return torch.stack(draw)
