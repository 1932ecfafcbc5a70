"""Generation: seeds and labels in, latents and images out, one batch at a time.

Everything random about a sample is a function of its own seed. Seed 1234 gives the same image at
any batch size, in any order and on any number of machines, up to the rounding of matrix products.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from erw import __version__, ddpm
from erw.config import Sample, to_dict
from erw.dist import precision as precision_of
from erw.encoders.vae import VAE, load_vae
from erw.errors import ConfigError
from erw.flow import PATHS, ends
from erw.io import hash_tensors
from erw.rng import generator
from erw.sampling import rcg
from erw.sampling.guidance import ModelVelocity, classifier_free, conditional, guided
from erw.sampling.solvers import SOLVERS, Callback, Velocity, check_solver
from erw.training.trained import Trained

Precision = Literal["fp32", "bf16", "auto"]
Labels = int | Sequence[int] | Tensor | Literal["random"] | None


class Samples(NamedTuple):
    """A batch of samples.

    Attributes:
        seeds: one per sample.
        labels: (B,) int64; None for an unconditional model.
        latents: (B, C, h, w) float32, shifted and scaled as the network gives them.
        images: (B, 3, H, W) uint8; None without a VAE.
        evaluations: of the network, per sample; a guided evaluation counts once.
    """

    seeds: tuple[int, ...]
    labels: Tensor | None
    latents: Tensor
    images: Tensor | None
    evaluations: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """A lazy run of `generate`: iterate for batches of `Samples`, or `collect()` them all.

    Nothing is stored: a second iteration samples again.
    """

    model: Trained
    seeds: tuple[int, ...]
    labels: tuple[int, ...] | None
    label_rule: str
    sample: Sample
    autoguidance: Trained | None
    precision: str
    batch_size: int
    vae: VAE | None
    callback: Callback | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Samples]:
        size = 1 if SOLVERS[self.sample.solver].adaptive else self.batch_size
        for lo in range(0, len(self), size):
            yield self._batch(slice(lo, lo + size))

    def collect(self) -> Samples:
        """All samples as one record on the CPU; each batch moves there before the next begins."""
        batches = [[x.cpu() if isinstance(x, Tensor) else x for x in batch] for batch in self]
        seeds, *tensors, evaluations = zip(*batches, strict=True)
        labels, latents, images = (None if x[0] is None else torch.cat(x) for x in tensors)
        assert latents is not None, "every batch has them"
        return Samples(tuple(chain(*seeds)), labels, latents, images, tuple(chain(*evaluations)))

    def rows(self, keep: Callable[[int, int], bool]) -> "Generation":
        """The part whose (position, seed) pass `keep`, to divide the work or skip what exists."""
        chosen = [i for i, seed in enumerate(self.seeds) if keep(i, seed)]
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen)
        return replace(self, seeds=tuple(self.seeds[i] for i in chosen), labels=labels)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the images apart from their seeds, as JSON values."""
        model, sample, vae, weak = self.model, self.sample, self.vae, self.autoguidance
        solver = SOLVERS[sample.solver]
        settings = {
            "recipe": model.run.name,
            "step": model.step,
            "weights": hash_tensors(model.net),
            "ema": model.ema,
            "solver": sample.solver,
            "steps": sample.steps if solver.evaluations else "adaptive",
            "evaluations": solver.evaluations(sample.steps) if solver.evaluations else "adaptive",
            "guidance": sample.guidance,
            "interval": list(sample.interval),
            "path": "linear betas" if solver.objective == "ddpm" else model.run.flow.path,
            "labels": self.label_rule,
            "precision": self.precision,
            "vae": vae and vae.name,
            "vae_weights": vae and vae.weight_hash,
            "erw": __version__,
            "torch": torch.__version__,
        }
        # The rest appears only where it has an effect.
        if model.scaling:
            settings["scaling"] = model.scaling
        if model.net.representation and (rdm := model.rdm):
            origin = {"weights": hash_tensors(rdm.net), "step": rdm.step, **to_dict(rdm.run.sample)}
            settings["representations"] = origin
        if sample.shift != 1:
            settings["shift"] = sample.shift
        if solver.adaptive:
            settings |= {"atol": sample.atol, "rtol": sample.rtol}
        if sample.guided_channels is not None and sample.guidance != 1:
            settings["guided_channels"] = sample.guided_channels
        if weak is not None:
            settings |= {"autoguidance": weak.source, "autoguidance_step": weak.step}
            settings["autoguidance_weights"] = hash_tensors(weak.net)
        return settings

    def _batch(self, rows: slice) -> Samples:
        model, solver, seeds = self.model, SOLVERS[self.sample.solver], self.seeds[rows]
        device = next(model.net.parameters()).device
        labels = None
        if self.labels is not None:
            labels = torch.tensor(self.labels[rows], device=device)
        shape, token = model.latent_shape, model.net.class_token
        y, null = labels, model.num_classes
        if model.net.representation:
            y, null = rcg.representations(model, seeds, labels), 0
        velocity, evaluations = self._velocity(y, null), 0

        def counted(x: Tensor, t: float) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return velocity(x, t)

        bf16 = self.precision == "bf16"
        nets = [model.net] + ([self.autoguidance.net] if self.autoguidance else [])
        options = {"atol": self.sample.atol, "rtol": self.sample.rtol} if solver.adaptive else {}
        with torch.no_grad(), ready(*nets, bf16=bf16):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x = solver(
                    counted,
                    start_noise(seeds, shape, token=token).to(device),
                    self._times(),
                    path=PATHS[model.run.flow.path],
                    noise=lambda i, x: _normal(seeds, shape, "step", i, token=token),
                    callback=self.callback,
                    **options,
                )
            latents = (model.net.split(x)[0] if token else x).float()
            images = None
            if self.vae is not None:  # 16 at a time bound the decoder's memory
                images = torch.cat([self.vae.decode(part) for part in latents.split(16)])
        return Samples(seeds, labels, latents, images, (evaluations,) * len(seeds))

    def _times(self) -> list[float]:
        """The solver's times; an adaptive one ends where the prediction defines a velocity."""
        solver, flow = SOLVERS[self.sample.solver], self.model.run.flow
        times = solver.times(self.sample.steps, shift=self.sample.shift)
        if not solver.adaptive:
            return times
        low, high = ends(flow.prediction, PATHS[flow.path])
        return [high, low, 0.0] if low else [high, 0.0]

    def _velocity(self, y: Tensor | None, null: int) -> Velocity:
        """The model's velocity for these labels or representations, guided as set."""
        sample, own = self.sample, predictor(self.model)
        channels = sample.guided_channels
        if SOLVERS[sample.solver].objective == "ddpm":  # a DiT's variance is never guided
            channels = channels or self.model.latent_shape[0]
        options: dict[str, Any] = {"scale": sample.guidance, "interval": sample.interval}
        options["channels"] = channels
        if self.autoguidance is not None:
            other = conditional(predictor(self.autoguidance), y)
            return guided(conditional(own, y), other, **options)
        return conditional(own, None) if y is None else classifier_free(own, y, null, **options)


def generate(
    model: Trained,
    seeds: Iterable[int],
    labels: Labels = None,
    *,
    steps: int = 50,
    solver: str | None = None,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int | None = None,
    autoguidance: Trained | None = None,
    shift: float = 1.0,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    compile: bool = False,
    batch_size: int = 64,
    vae: VAE | str | None = None,
    decode: bool = True,
    precision: Precision = "fp32",
    callback: Callback | None = None,
) -> Generation:
    """Sample `model` at the given seeds, lazily: iterate over the result or `collect()` it.

    Args:
        model: from `erw.load` or `erw.load_pretrained`; for a network of your own
            `Trained(net=net, run=erw.Run(), vae="none")`.
        seeds: one integer per image, from which all of its randomness follows.
        labels: one class for all, one per seed, "random" (drawn by each seed), or None for classes
            in turn: seed modulo their number. Unconditional models take None.
        steps: solver steps; `heun` evaluates the network 2 steps - 1 times.
        solver: "euler", "heun", "adams" (ODE) or "euler_maruyama" (SDE). "adams" is the most exact
            for its number of evaluations. "dopri5" chooses its own steps, one sample at a time. A
            DiT takes "ddpm" or "ddim", on 2 to 1,000 steps. None: "heun", or "ddim" for a DiT.
        guidance: scale of guidance at times within `interval`; 1 is none. It is classifier-free,
            or away from `autoguidance`: a smaller or less trained model of the same data.
        guided_channels: only the first so many channels are guided (None: all). DiT, SiT and
            LightningDiT are released with 3.
        shift: of the solver's times (`erw.flow.shifted`); 1 is none.
        atol, rtol: of "dopri5", whose estimated error stays within atol + rtol |x|.
        compile: compile the network's blocks first; pays from some hundred images on.
        batch_size: images per forward pass, doubled by guidance. It does not change the images.
        vae: decoder of the latents, by name or loaded; None: the model's own.
        decode: False leaves the images out.
        precision: "bf16" runs the network under autocast, the state stays float64; "auto" does so
            where the hardware multiplies bf16.
        callback: called with a `Step` after every solver step.

    Raises:
        ConfigError: impossible settings, a solver for other models, labels out of range or too few.
    """
    solver = solver or ("ddim" if model.run.flow.objective == "ddpm" else "heun")
    sample = Sample(
        steps=steps,
        solver=solver,  # type: ignore[arg-type]  # SOLVERS may hold a user's own
        guidance=float(guidance),
        interval=(float(interval[0]), float(interval[1])),
        guided_channels=guided_channels,
        shift=float(shift),
        atol=float(atol),
        rtol=float(rtol),
    )
    seeds = tuple(int(seed) for seed in seeds)
    _check(model, sample, seeds, autoguidance, decode=decode)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
    if precision not in ("fp32", "bf16", "auto"):
        raise ConfigError(f"precision is {precision!r}; expected 'fp32', 'bf16' or 'auto'")
    chosen, rule = labels_of(labels, seeds, model.num_classes)
    nets = [model.net] + ([autoguidance.net] if autoguidance else [])
    for block in chain(*(getattr(net, "blocks", [net]) for net in nets)) if compile else ():
        block.compile()
    dtype, _ = precision_of(precision, next(model.net.parameters()).device)
    return Generation(
        model=model,
        seeds=seeds,
        labels=chosen,
        label_rule=rule,
        sample=sample,
        autoguidance=autoguidance,
        precision="bf16" if dtype is torch.bfloat16 else "fp32",
        batch_size=batch_size,
        vae=_decoder(model, vae) if decode else None,
        callback=callback,
    )


def _check(
    model: Trained, sample: Sample, seeds: tuple[int, ...], weak: Trained | None, *, decode: bool
) -> None:
    """Raise ConfigError for settings that do not fit the model or each other."""
    if not seeds:
        raise ConfigError("no seeds: give at least one, such as range(16)")
    check_solver(sample.solver, model.run.flow.objective)
    SOLVERS[sample.solver].times(sample.steps, shift=sample.shift)
    rcg.check(model, decode=decode)
    if (channels := sample.guided_channels) is not None:
        if channels > model.latent_shape[0]:
            most = model.latent_shape[0]
            raise ConfigError(f"guided_channels is {channels}; expected 1 to {most}, or none: all")
        if model.net.class_token:
            raise ConfigError("guided_channels needs latents alone; with a class token use none")
    if weak is not None:
        own, other = _compatible(model), _compatible(weak)
        if differ := [name for name in own if own[name] != other[name]]:
            raise ConfigError(
                f"autoguidance: the weaker model's {differ[0]} {other[differ[0]]} differ from the "
                f"model's {own[differ[0]]}; give one trained on the same data"
            )
        if sample.guidance == 1:
            raise ConfigError("autoguidance with guidance 1 is without effect: give a scale above")
    elif sample.guidance != 1 and not (model.num_classes or model.net.representation):
        raise ConfigError(
            f"guidance {sample.guidance}: an unconditional model has no classes to guide by"
        )


def _compatible(model: Trained) -> dict[str, Any]:
    """What a model and one that guides it have in common."""
    flow, net = model.run.flow, model.net
    return {
        "latents": model.latent_shape,
        "number of classes": model.num_classes,
        "class token or representation": (net.class_token, net.representation),
        "objective and path": (flow.objective, flow.path),
    }


def predictor(model: Trained) -> ModelVelocity:
    """What solvers evaluate at (x, t, y): the velocity, or a DiT's noise and variance
    (B, 2C, h, w) at the step of its chain that belongs to t."""
    if model.run.flow.objective == "flow":
        return model.velocity
    return lambda x, t, y: model.net(x, ddpm.step_at(t), y)


def _decoder(model: Trained, vae: VAE | str | None) -> VAE:
    """The VAE, with the scaling that the model's data has measured where it has one."""
    if isinstance(vae, VAE):
        decoder, scales = vae, vae.scale is None
    else:
        device = next(model.net.parameters()).device
        decoder, scales = load_vae(vae or model.vae, device=str(device)), True
    return decoder.scaled(**model.scaling) if model.scaling and scales else decoder


@contextmanager
def ready(*nets: nn.Module, bf16: bool) -> Iterator[None]:
    """The networks in evaluation mode and, with `bf16`, the weights of their products cast once.

    Autocast would cast the same weights at every evaluation; the results are equal to the bit.
    On leaving, mode and weights are as before.
    """
    training, weights = [net.training for net in nets], []
    try:
        for net in nets:
            net.eval()
            for module in net.modules() if bf16 else ():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    for parameter in module.parameters(recurse=False):
                        weights.append((parameter, parameter.data))
                        parameter.data = parameter.data.bfloat16()
        yield
    finally:
        for parameter, value in reversed(weights):
            parameter.data = value
        for net, mode in zip(nets, training, strict=True):
            net.train(mode)


def start_noise(seeds: Sequence[int], shape: tuple[int, ...], *, token: int = 0) -> Tensor:
    """The initial noise (B, *shape), float32, of these seeds.

    With a class token of `token` channels: flat rows of both, with the same noise for the latents.
    """
    return _normal(seeds, shape, "start", token=token)


def _normal(
    seeds: Sequence[int], shape: tuple[int, ...], *tags: int | str, token: int = 0
) -> Tensor:
    """Standard normal (B, *shape) float32, a row per seed, drawn on the CPU for any device."""
    if token:
        parts = _normal(seeds, shape, *tags), _normal(seeds, (token,), *tags, "class token")
        return torch.cat([part.flatten(1) for part in parts], 1)
    rows = [torch.randn(shape, generator=generator(seed, "sample", *tags)) for seed in seeds]
    return torch.stack(rows)


def labels_of(
    labels: Labels, seeds: tuple[int, ...], num_classes: int
) -> tuple[tuple[int, ...] | None, str]:
    """The label of each seed, and the rule behind them in words."""
    if not num_classes:
        if labels is not None:
            raise ConfigError("labels were given to an unconditional model; leave them out")
        return None, "none"
    if labels is None:
        return tuple(seed % num_classes for seed in seeds), "balanced: seed modulo classes"
    if isinstance(labels, str):
        if labels != "random":
            raise ConfigError(f"labels are {labels!r}; expected classes, 'random' or none")
        rngs = (generator(seed, "sample", "label") for seed in seeds)
        drawn = (int(torch.randint(num_classes, (), generator=rng)) for rng in rngs)
        return tuple(drawn), "random: drawn by seed"
    if isinstance(labels, int):
        chosen, rule = (labels,) * len(seeds), f"all {labels}"
    else:
        chosen, rule = tuple(int(label) for label in labels), "given"
    if len(chosen) != len(seeds):
        raise ConfigError(f"{len(chosen)} labels for {len(seeds)} seeds; give one label per seed")
    if wrong := [label for label in chosen if not 0 <= label < num_classes]:
        raise ConfigError(f"label {wrong[0]} is none of the classes 0..{num_classes - 1}")
    return chosen, rule
