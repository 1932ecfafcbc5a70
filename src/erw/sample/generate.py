"""Generation: seeds and labels in, latents and images out, a batch at a time.

Everything random about a sample is a function of its own seed: seed 1234 gives the same image at
any batch size, in any order and on any number of machines (to the rounding of the matrix products).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erw import __version__
from erw.config import nearest
from erw.errors import ConfigError
from erw.flow import LINEAR, PATHS, Path
from erw.runtime.dist import precision as precision_of
from erw.sample.guidance import conditional, guided
from erw.sample.seeds import Labels, labels_of, start_noise, step_noise
from erw.sample.solvers import SOLVERS, Callback, Velocity

Precision = Literal["fp32", "bf16", "auto"]


class Model(Protocol):
    """What is asked of a trained model; `erw.train.load.Trained` is one."""

    @property
    def net(self) -> nn.Module: ...
    @property
    def vae(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor: ...


class Decoder(Protocol):
    """What is asked of a VAE; `erw.encoders.vae.VAE` is one."""

    @property
    def name(self) -> str: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class Samples(NamedTuple):
    """A batch of samples.

    seeds: their seeds. labels (B,) int64, None when unconditional. latents (B, C, h, w) float32, as
    the network gives them (shifted and scaled). images (B, 3, H, W) uint8, None without a VAE.
    """

    seeds: tuple[int, ...]
    labels: Tensor | None
    latents: Tensor
    images: Tensor | None


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
    precision: str
    batch_size: int
    path: Path
    vae: Decoder | None
    callback: Callback | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Samples]:
        for lo in range(0, len(self), self.batch_size):
            yield self._batch(slice(lo, lo + self.batch_size))

    def collect(self) -> Samples:
        """All samples as one record, on the CPU."""
        parts = [Samples(s.seeds, _cpu(s.labels), s.latents.cpu(), _cpu(s.images)) for s in self]
        images = [part.images for part in parts if part.images is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        return Samples(
            self.seeds,
            torch.cat(labels) if labels else None,
            torch.cat([part.latents for part in parts]),
            torch.cat(images) if images else None,
        )

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
        return {
            "recipe": getattr(run, "name", None),
            "step": getattr(self.model, "step", None),
            "weights": weights_hash(self.model.net),
            "ema": getattr(self.model, "ema", None),
            "solver": self.solver,
            "steps": self.steps,
            "evaluations": SOLVERS[self.solver].evaluations(self.steps),
            "guidance": self.guidance,
            "interval": list(self.interval),
            "path": self.path.name,
            "labels": self.label_rule,
            "precision": self.precision,
            "vae": getattr(self.vae, "name", None),
            "vae_weights": vae_hash,
            **({"scaling": scaling} if scaling else {}),
            "erw": __version__,
            "torch": torch.__version__,
        }

    def _batch(self, rows: slice) -> Samples:
        model, solver = self.model, SOLVERS[self.solver]
        seeds = self.seeds[rows]
        device = next(model.net.parameters()).device
        labels = None
        if self.labels is not None:
            labels = torch.tensor(self.labels[rows], dtype=torch.int64, device=device)
        shape = model.latent_shape
        x = start_noise(seeds, shape).to(device)
        velocity = self._velocity(labels)
        half = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.no_grad(), _evaluating(model.net):
            with half:
                x = solver.solve(
                    velocity,
                    x,
                    solver.times(self.steps),
                    path=self.path,
                    noise=step_noise(seeds, shape),
                    callback=self.callback,
                )
            latents = x.float()
            images = None if self.vae is None else _decode(self.vae, latents)
        return Samples(seeds, labels, latents, images)

    def _velocity(self, labels: Tensor | None) -> Velocity:
        if labels is None:
            return conditional(self.model.velocity, None)
        null, scale = self.model.num_classes, self.guidance
        return guided(self.model.velocity, labels, null, scale=scale, interval=self.interval)


def generate(
    model: Model,
    seeds: Iterable[int],
    labels: Labels = None,
    *,
    steps: int = 50,
    solver: str = "heun",
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 64,
    vae: Decoder | str | None = None,
    decode: bool = True,
    precision: Precision = "fp32",
    callback: Callback | None = None,
) -> Generation:
    """Sample `model` at the given seeds, lazily: iterate over the result or `collect()` it.

    Args:
        seeds: one integer per image; all of an image's randomness follows from it.
        labels: one class for all, one per seed, or None: the classes in turn, seed modulo
            their number (balanced over any whole range of seeds). Unconditional models take None.
        steps: solver steps; `heun` evaluates the network 2 steps - 1 times.
        solver: "euler", "heun", "adams" (ODE) or "euler_maruyama" (SDE). For equal
            evaluations "adams" is the most exact ODE solver: one a step, second order.
        guidance: classifier-free guidance scale within the times of `interval`; 1 is none.
        batch_size: images per forward pass, twice that under guidance. Does not change the images.
        vae: decoder of the latents, its name or the object; None: the model's own.
        decode: False leaves the images out.
        precision: "bf16" runs the network under autocast, the state stays float64; "auto" does so
            where the machine multiplies bf16 natively.
        callback: is given every finished solver step.

    Raises:
        ConfigError: an unknown solver, impossible settings, labels out of range or too few.
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ConfigError("no seeds: give at least one, such as range(16)")
    _check(solver, steps, batch_size, precision, interval)
    if guidance != 1 and not model.num_classes:
        raise ConfigError(f"guidance {guidance}: an unconditional model has no classes to guide by")
    chosen, rule = labels_of(labels, seeds, model.num_classes)
    return Generation(
        model=model,
        seeds=seeds,
        labels=chosen,
        label_rule=rule,
        steps=steps,
        solver=solver,
        guidance=float(guidance),
        interval=(float(interval[0]), float(interval[1])),
        precision=_precision(model, precision),
        batch_size=batch_size,
        path=_path(model),
        vae=_decoder(model, vae) if decode else None,
        callback=callback,
    )


def weights_hash(module: nn.Module) -> str:
    """The first 16 hex digits of the blake3 hash of a module's named parameters and buffers."""
    from blake3 import blake3

    digest = blake3()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def _check(
    solver: str, steps: int, batch_size: int, precision: str, interval: tuple[float, float]
) -> None:
    """Refuse impossible settings now, not at the first batch."""
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}{nearest(solver, SOLVERS)}")
    SOLVERS[solver].times(steps)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
    if precision not in ("fp32", "bf16", "auto"):
        raise ConfigError(f"precision is {precision!r}; expected 'fp32', 'bf16' or 'auto'")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ConfigError(f"guidance interval {interval}; expected 0 <= low <= high <= 1")


def _path(model: Model) -> Path:
    run = getattr(model, "run", None)
    return PATHS[run.flow.path] if run is not None else LINEAR


def _precision(model: Model, wanted: str) -> str:
    dtype, _ = precision_of(wanted, next(model.net.parameters()).device)
    return "bf16" if dtype is torch.bfloat16 else "fp32"


def _decoder(model: Model, vae: Decoder | str | None) -> Decoder:
    """The VAE, with the scaling that the model's latents have: it may be measured on its data."""
    from erw.encoders.vae import VAE, load_vae

    decoder = model.vae if vae is None else vae
    named = isinstance(decoder, str)
    if isinstance(decoder, str):
        decoder = load_vae(decoder, device=str(next(model.net.parameters()).device))
    scaling = getattr(model, "scaling", None)
    if scaling and isinstance(decoder, VAE) and (named or decoder.scale is None):
        decoder = decoder.scaled(**scaling)
    return decoder


def _decode(vae: Decoder, latents: Tensor) -> Tensor:
    """A few at a time: fits the caches of a CPU and bounds the decoder's memory on a GPU."""
    return torch.cat([vae.decode(part) for part in latents.split(16)])


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Sampling in evaluation mode; a model in training gets its mode back."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def _cpu(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.cpu()
