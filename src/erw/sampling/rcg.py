"""RCG (arXiv 2312.03701): draw a representation first, then an image from it."""

from collections.abc import Sequence

from torch import Tensor

from erw.config import to_dict
from erw.errors import ConfigError
from erw.rng import seeded
from erw.training.trained import Trained


def check(model: Trained, *, decode: bool) -> None:
    """Raise ConfigError for an rdm that is to give images, and for a model that lacks its rdm."""
    if decode and len(model.latent_shape) == 1:
        raise ConfigError(
            "an rdm makes representations and no images: sample the run that it was trained for, "
            "or give decode=False"
        )
    if model.net.representation and model.rdm is None:
        raise ConfigError(
            "the model is given representations, and there is nothing to draw them from: train an "
            "rdm into the folder rdm of its run, or name one"
        )


def representations(model: Trained, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
    """The representation (B, R) of each seed, drawn with noise of its own; zeros stand for none."""
    from erw.sampling.generation import generate

    assert model.rdm is not None, "see `check`"
    own, options = [seeded(seed, "representation") for seed in seeds], to_dict(model.rdm.run.sample)
    drawn = generate(model.rdm, own, labels, **options, decode=False).collect().latents
    return drawn.to(next(model.net.parameters()).device)
