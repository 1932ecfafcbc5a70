"""Settings that change no step of a run: how it is sampled, logged and scored. Part of
`erw.config`, from where they are imported."""

from dataclasses import dataclass
from typing import Literal

from erw.records import above_zero, at_least, between, finite


@dataclass(frozen=True)
class Sample:
    """How images are drawn from the trained model: see `erw.generate`.

    Attributes:
        steps: of the solver.
        solver: euler, heun, adams, dopri5 (ODE) or euler_maruyama (SDE); of a DiT ddpm or ddim.
        guidance: its scale; 1: none.
        interval: times within which there is guidance; 0 is data, 1 is noise.
        guided_channels: so many of the latent's first channels are guided; none: all.
        shift: of the solver's times: above 1 more steps near the noise, below 1 near the data.
        atol, rtol: of dopri5, which chooses its own steps.
    """

    steps: int = 50
    solver: Literal["euler", "heun", "adams", "euler_maruyama", "dopri5", "ddpm", "ddim"] = "heun"
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    guided_channels: int | None = None
    shift: float = 1.0
    atol: float = 1e-6
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        at_least("sample", "steps", self.steps, 1)
        between("sample", "interval", self.interval[0], 0.0, 1.0)
        between("sample", "interval", self.interval[1], self.interval[0], 1.0)
        finite("sample", "guidance", self.guidance)
        for name in ("shift", "atol", "rtol"):
            above_zero("sample", name, getattr(self, name))
        if self.guided_channels is not None:
            at_least("sample", "guided_channels", self.guided_channels, 1)


@dataclass(frozen=True)
class Log:
    """What is written, how often, in steps.

    Attributes:
        every: lines of metrics.
        checkpoint: checkpoints, of which the newest `keep` are kept.
        keep: number of checkpoints.
        snapshot: averages of `optim.ema_profiles`; all are kept.
        preview: a picture of 16 samples, the same seeds each time, in previews; 0: none.
    """

    every: int = 50
    checkpoint: int = 1000
    keep: int = 2
    snapshot: int = 1000
    preview: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "checkpoint", "keep", "snapshot"):
            at_least("log", name, getattr(self, name), 1)
        at_least("log", "preview", self.preview, 0)


@dataclass(frozen=True)
class Eval:
    """Scores and a validation loss while training; they change none of its numbers.

    Attributes:
        every: steps between two scores, in full training; the last step has one too. 0: none.
        samples: images, with the seeds 0 to samples - 1 and as `sample` says, classes in turn.
        metric: as for `erw eval`; the first score that it gives decides which weights are best.
        reference: images to compare with, as for `erw eval`; none: the built-in test set, for runs
            on the built-in images.
        reference_count: how many images of a built-in reference to compose.
        weights: file of the Inception network's weights, for metrics that need them.
        vae: decoder of the samples; none: the one that the run trains with.
        keep_best: keep the EMA weights with the best score so far as best.safetensors.
        loss: steps between two validation losses, in full training: the flow loss of held-out
            images at fixed noise and twelve fixed times. It needs no sampling. 0: none.
        loss_images: held-out images of the validation loss.
        heldout: cache of held-out images; none: built-in ones, for runs on the built-in images.
    """

    every: int = 0
    samples: int = 500
    metric: tuple[str, ...] = ("fd-lite2",)
    reference: str | None = None
    reference_count: int = 2000
    weights: str | None = None
    vae: str | None = None
    keep_best: bool = True
    loss: int = 0
    loss_images: int = 256
    heldout: str | None = None

    def __post_init__(self) -> None:
        at_least("eval", "every", self.every, 0)
        at_least("eval", "loss", self.loss, 0)
        at_least("eval", "samples", self.samples, 2)
        at_least("eval", "loss_images", self.loss_images, 2)
        at_least("eval", "reference_count", self.reference_count, 2)
