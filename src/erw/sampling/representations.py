"""RCG's first half (arXiv 2312.03701): representations are drawn first, images from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from erw.config import to_dict
from erw.errors import ConfigError
from erw.rng import seeded
from erw.sampling.model import Model, device_of, weights_hash


def given(model: Model) -> bool:
    """Whether the network is told a representation in place of a class."""
    return bool(getattr(model.net, "representation", 0))


def check_images(model: Model, *, decode: bool) -> None:
    """Raise ConfigError where images are asked for that cannot come about."""
    if decode and len(model.latent_shape) == 1:
        raise ConfigError(
            "an rdm makes representations and no images: sample the run that it was trained for, "
            "or give decode=False"
        )
    if given(model) and getattr(model, "rdm", None) is None:
        raise ConfigError(
            "the model is given representations, and there is nothing to draw them from: train an "
            "rdm into the folder rdm of its run, or name one"
        )


def told(model: Model, seeds: Sequence[int], labels: Tensor | None) -> tuple[Tensor | None, int]:
    """What the network is told for each seed, and what tells it nothing.

    Labels and the null class; or representations (B, R), which follow from the seeds and labels
    through other random numbers than those of the images, and zeros.
    """
    if not given(model):
        return labels, model.num_classes
    from erw.sampling.generate import generate

    rdm: Any = model.rdm  # type: ignore[attr-defined]
    own = [seeded(seed, "representation") for seed in seeds]
    drawn = generate(rdm, own, labels, **to_dict(rdm.run.sample), decode=False).collect().latents
    return drawn.to(device_of(model)), 0


def settings_of(model: Model) -> dict[str, Any]:
    """How the representations are drawn, for the record; nothing where there are none."""
    if not given(model):
        return {}
    rdm: Any = model.rdm  # type: ignore[attr-defined]
    how = {"weights": weights_hash(rdm.net), "step": rdm.step, **to_dict(rdm.run.sample)}
    how["interval"] = list(how["interval"])
    return {"representations": how}
