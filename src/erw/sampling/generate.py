"""Generation: seeds and labels in, latents and images out, a batch at a time.

Everything random about a sample is a function of its own seed: seed 1234 gives the same image at
any batch size, in any order and on any number of machines (to the rounding of the matrix products).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from erw import __version__
from erw.errors import ConfigError
from erw.flow import Path, ends
from erw.records import above_zero, finite
from erw.sampling.checks import check, check_pair, chosen_solver
from erw.sampling.guidance import classifier_free, conditional, guided
from erw.sampling.model import (
    Decoder,
    Model,
    asked_of,
    chosen_precision,
    decoder_of,
    device_of,
    flow_of,
    latents_in,
    path_of,
    ready,
    weights_hash,
)
from erw.sampling.representations import check_images, given, settings_of, told
from erw.sampling.samples import Samples as Samples
from erw.sampling.samples import joined
from erw.sampling.seeds import Labels, labels_of, start_noise, step_noise
from erw.sampling.solvers import SOLVERS, Callback, Velocity

Precision = Literal["fp32", "bf16", "auto"]
OPTIONS = ("shift", "guided_channels", "autoguidance_weights", "atol", "rtol", "representations")
"""Settings that a generation tells only where they have an effect."""


@dataclass(frozen=True)
class Generation:
    """A lazy run of `generate`: iterate for batches of `Samples`, or `collect()` them all.

    Nothing is kept: a second iteration samples again. `settings` says how the images are made.
    """

    model: Model
    seeds: tuple[int, ...]
    labels: tuple[int, ...] | None
    label_rule: str
    steps: int
    solver: str
    guidance: float
    interval: tuple[float, float]
    guided_channels: int | None
    autoguidance: Model | None
    shift: float
    atol: float
    rtol: float
    precision: str
    batch_size: int
    path: Path
    vae: Decoder | None
    callback: Callback | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Samples]:
        size = 1 if SOLVERS[self.solver].adaptive else self.batch_size
        for lo in range(0, len(self), size):
            yield self._batch(slice(lo, lo + size))

    def collect(self) -> Samples:
        """All samples as one record, on the CPU."""
        return joined(self)

    def rows(self, keep: Callable[[int, int], bool]) -> "Generation":
        """The part whose (position, seed) pass `keep`: to shard, or to leave out what is done."""
        chosen = [i for i, seed in enumerate(self.seeds) if keep(i, seed)]
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen)
        return replace(self, seeds=tuple(self.seeds[i] for i in chosen), labels=labels)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that changes the images apart from their seeds, as JSON values."""
        run = getattr(self.model, "run", None)
        vae_hash = getattr(self.vae, "weight_hash", None)
        scaling = getattr(self.model, "scaling", None)
        evaluations = SOLVERS[self.solver].evaluations
        return {
            "recipe": getattr(run, "name", None),
            "step": getattr(self.model, "step", None),
            "weights": weights_hash(self.model.net),
            "ema": getattr(self.model, "ema", None),
            "solver": self.solver,
            "steps": self.steps if evaluations else "adaptive",
            "evaluations": evaluations(self.steps) if evaluations else "adaptive",
            "guidance": self.guidance,
            "interval": list(self.interval),
            "path": self.path.name if flow_of(self.model).objective == "flow" else "linear betas",
            "labels": self.label_rule,
            "precision": self.precision,
            "vae": getattr(self.vae, "name", None),
            "vae_weights": vae_hash,
            **({"scaling": scaling} if scaling else {}),
            "erw": __version__,
            "torch": torch.__version__,
            **self._options(),
        }

    def _options(self) -> dict[str, Any]:
        """`OPTIONS` and what belongs to them, absent where they are without effect."""
        found = settings_of(self.model)
        if self.shift != 1:
            found["shift"] = self.shift
        if SOLVERS[self.solver].adaptive:
            found |= {"atol": self.atol, "rtol": self.rtol}
        if self.guided_channels is not None and self.guidance != 1:
            found["guided_channels"] = self.guided_channels
        if self.autoguidance is not None:
            weak = self.autoguidance
            found["autoguidance"] = getattr(weak, "source", "")
            found["autoguidance_step"] = getattr(weak, "step", None)
            found["autoguidance_weights"] = weights_hash(weak.net)
        return found

    def _batch(self, rows: slice) -> Samples:
        model, solver = self.model, SOLVERS[self.solver]
        seeds = self.seeds[rows]
        device = device_of(model)
        labels = None
        if self.labels is not None:
            labels = torch.tensor(self.labels[rows], dtype=torch.int64, device=device)
        shape = model.latent_shape
        token = getattr(model.net, "class_token", 0)  # drawn beside the latents
        x = start_noise(seeds, shape, token=token).to(device)
        half, asked = self.precision == "bf16", 0
        velocity = self._velocity(*told(model, seeds, labels))

        def ask(x: Tensor, t: float) -> Tensor:
            nonlocal asked
            asked += 1
            return velocity(x, t)

        tolerances = {"atol": self.atol, "rtol": self.rtol} if solver.adaptive else {}
        with torch.no_grad(), ExitStack() as stack:
            for one in (model, self.autoguidance):
                if one is not None:
                    stack.enter_context(ready(one.net, half=half))
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                x = solver.solve(
                    ask,
                    x,
                    self._times(),
                    path=self.path,
                    noise=step_noise(seeds, shape, token=token),
                    callback=self.callback,
                    **tolerances,
                )
            latents = latents_in(model.net, x).float()
            images = None if self.vae is None else _decode(self.vae, latents)
        return Samples(seeds, labels, latents, images, (asked,) * len(seeds))

    def _times(self) -> list[float]:
        """The solver's times; an adaptive one decides where the prediction says the velocity."""
        solver = SOLVERS[self.solver]
        times = solver.times(self.steps, shift=self.shift)
        if not solver.adaptive:
            return times
        low, high = ends(flow_of(self.model).prediction, self.path)
        return [high, low, 0.0] if low else [high, 0.0]

    def _velocity(self, y: Tensor | None, null: int) -> Velocity:
        """What the solver asks of the model for these labels or representations, guided as
        wanted."""
        channels = self.guided_channels
        if SOLVERS[self.solver].objective == "ddpm":  # a DiT's variance is never guided
            channels = channels or self.model.latent_shape[0]
        how: dict[str, Any] = {"scale": self.guidance, "interval": self.interval}
        how["channels"] = channels
        ask = asked_of(self.model)
        if self.autoguidance is not None:
            pair = (conditional(one, y) for one in (ask, asked_of(self.autoguidance)))
            return guided(*pair, **how)
        if y is None:
            return conditional(ask, None)
        return classifier_free(ask, y, null, **how)


def generate(
    model: Model,
    seeds: Iterable[int],
    labels: Labels = None,
    *,
    steps: int = 50,
    solver: str | None = None,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int | None = None,
    autoguidance: Model | None = None,
    shift: float = 1.0,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    compile: bool = False,
    batch_size: int = 64,
    vae: Decoder | str | None = None,
    decode: bool = True,
    precision: Precision = "fp32",
    callback: Callback | None = None,
) -> Generation:
    """Sample `model` at the given seeds, lazily: iterate over the result or `collect()` it.

    Args:
        seeds: one integer per image; all of an image's randomness follows from it.
        labels: one class for all, one per seed, "random" (of each seed's own randomness), or None:
            the classes in turn, seed modulo their number (balanced over any whole range of seeds).
            Unconditional models take None.
        steps: solver steps; `heun` evaluates the network 2 steps - 1 times.
        solver: "euler", "heun", "adams" (ODE) or "euler_maruyama" (SDE). For equal
            evaluations "adams" is the most exact ODE solver: one a step, second order. "dopri5"
            chooses its own steps, sample by sample. A DiT takes "ddpm" or "ddim", on 2 to 1,000
            steps of its chain. None: "heun", for a DiT "ddim".
        guidance: scale of guidance within the times of `interval`; 1 is none. It is classifier-free
            (away from the null class), or away from `autoguidance`, a weaker model of the same
            data (smaller or less trained; arXiv 2406.02507), told the same class.
        guided_channels: only so many first channels are guided; None: all. DiT, SiT and
            LightningDiT are released with 3.
        shift: of the solver's times, see `erw.flow.shifted`; 1 is none.
        atol, rtol: of "dopri5", whose estimated error stays within atol + rtol |x|.
        compile: compile the network's blocks first; pays from some hundred images on.
        batch_size: images per forward pass, twice that under guidance. Does not change the images.
        vae: decoder of the latents, its name or the object; None: the model's own.
        decode: False leaves the images out.
        precision: "bf16" runs the network under autocast, the state stays float64; "auto" does so
            where the machine multiplies bf16 natively.
        callback: is given every finished solver step.

    Raises:
        ConfigError: an unknown solver or one for other models, impossible settings, labels out of
            range or too few.
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ConfigError("no seeds: give at least one, such as range(16)")
    solver = chosen_solver(model, solver)
    check_images(model, decode=decode)
    check(model, solver, steps, batch_size, precision, interval, shift, guided_channels)
    finite("sample", "guidance", guidance)
    for name, value in (("atol", atol), ("rtol", rtol)):
        above_zero("sample", name, value)
    if autoguidance is not None:
        check_pair(model, autoguidance)
        if guidance == 1:
            raise ConfigError("autoguidance with guidance 1 is without effect: give a scale above")
    elif guidance != 1 and not (model.num_classes or given(model)):
        raise ConfigError(f"guidance {guidance}: an unconditional model has no classes to guide by")
    chosen, rule = labels_of(labels, seeds, model.num_classes)
    for one in filter(None, (model, autoguidance)) if compile else ():
        for block in getattr(one.net, "blocks", ()):
            block.compile()
    return Generation(
        model=model,
        seeds=seeds,
        labels=chosen,
        label_rule=rule,
        steps=steps,
        solver=solver,
        guidance=float(guidance),
        interval=(float(interval[0]), float(interval[1])),
        guided_channels=guided_channels,
        autoguidance=autoguidance,
        shift=float(shift),
        atol=float(atol),
        rtol=float(rtol),
        precision=chosen_precision(model, precision),
        batch_size=batch_size,
        path=path_of(model),
        vae=decoder_of(model, vae) if decode else None,
        callback=callback,
    )


def _decode(vae: Decoder, latents: Tensor) -> Tensor:
    """A few at a time: fits the caches of a CPU and bounds the decoder's memory on a GPU."""
    return torch.cat([vae.decode(part) for part in latents.split(16)])
