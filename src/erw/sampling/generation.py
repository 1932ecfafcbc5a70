"""Generation: seeds and labels in, latents and images out, one batch at a time.

Everything random about a sample is a function of its own seed. Seed 1234 gives the same image at
any batch size, in any order and on any number of machines, up to the rounding of matrix products.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from erw import __version__, ddpm
from erw.config import Sample, to_dict
from erw.dist import precision as precision_of
from erw.encoders.vae import VAE, load_vae
from erw.errors import ConfigError
from erw.flow import PATHS, ends
from erw.io import weight_hash
from erw.rng import generator, seeded
from erw.routing import Route
from erw.sampling.guidance import ModelVelocity, classifier_free, conditional, guided, inside
from erw.sampling.solvers import SOLVERS, Solver, Velocity, solver_for
from erw.training.trained import Trained

Labels = int | Sequence[int] | Tensor | Literal["random"] | None
KIND = attrgetter(
    "latent_shape", "num_classes", "net.class_token", "net.representation", "run.flow.path",
    "run.flow.outputs",
)  # fmt: skip
"""What two models have in common if one guides the other."""


class Samples(NamedTuple):
    """A batch of samples."""

    seeds: tuple[int, ...]
    labels: Tensor | None  # (B,) int64; None: unconditional
    latents: Tensor  # (B, C, h, w) float32, shifted and scaled as the network gives them
    images: Tensor | None  # (B, 3, H, W) uint8; None without a VAE


@dataclass(frozen=True)
class Generation:
    """A lazy run of `generate`: iterate for batches of `Samples`, or `collect()` them all."""

    model: Trained
    seeds: tuple[int, ...]
    labels: tuple[int, ...] | None
    label_rule: str
    sample: Sample
    autoguidance: Trained | None
    bf16: bool
    batch_size: int
    vae: VAE | None

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Samples]:
        size = self.batch_size if self.solver.evaluations else 1
        for lo in range(0, len(self), size):
            yield self._batch(slice(lo, lo + size))

    @property
    def solver(self) -> Solver:
        return SOLVERS[self.sample.solver]

    def collect(self) -> Samples:
        """All samples as one record on the CPU; each batch moves there before the next begins."""
        batches = [[x.cpu() if isinstance(x, Tensor) else x for x in batch] for batch in self]
        columns: Any = [*zip(*batches, strict=True)][1:]
        tensors: Any = (x[0] if x[0] is None else torch.cat(x) for x in columns)
        return Samples(self.seeds, *tensors)

    def rows(self, numbers: Sequence[int]) -> "Generation":
        """The part of these positions, to divide the work or skip what exists."""
        labels = self.labels and tuple(self.labels[i] for i in numbers)
        return replace(self, seeds=tuple(self.seeds[i] for i in numbers), labels=labels)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the images apart from their seeds, as JSON values."""
        model, sample, vae, weak = self.model, self.sample, self.vae, self.autoguidance
        count, rdm = self.solver.evaluations, model.rdm if model.net.representation else None
        settings = {
            "recipe": model.run.name,
            "step": model.step,
            "weights": weight_hash(model.net),
            "ema": model.ema,
            **to_dict(sample),
            "interval": list(sample.interval),
            "path": "linear betas" if self.solver.objective == "ddpm" else model.run.flow.path,
            "labels": self.label_rule,
            "precision": "bf16" if self.bf16 else "fp32",
            "vae": vae and vae.name,
            "vae_weights": vae and vae.weight_hash,
            "scaling": model.scaling,
            "representations": rdm and {"step": rdm.step, "weights": weight_hash(rdm.net)},
            "autoguidance": weak and weak.source,
            "autoguidance_step": weak and weak.step,
            "autoguidance_weights": weak and weight_hash(weak.net),
            "erw": __version__,
            "torch": torch.__version__,
        }
        settings |= {"evaluations": count(sample.steps)} if count else {"steps": "adaptive"}
        without_effect = ["atol", "rtol"] * bool(count) + ["shift"] * (sample.shift == 1)
        without_effect += ["internal", "internal_interval"] * (sample.internal == 1)
        without_effect += ["guide"] * (sample.guide == "class")
        return {k: v for k, v in settings.items() if v is not None and k not in without_effect}

    def _batch(self, rows: slice) -> Samples:
        model, sample, solver, seeds = self.model, self.sample, self.solver, self.seeds[rows]
        device, flow = model.device, model.run.flow
        labels = None if self.labels is None else torch.tensor(self.labels[rows], device=device)
        path, token, options = PATHS[flow.path], model.net.class_token, {}
        if solver.evaluations:
            times = solver.times(sample.steps, shift=sample.shift)
        else:  # it ends where the prediction defines a velocity
            low, high = ends(flow.prediction, path)
            times = [high, low, 0.0] if low else [high, 0.0]
            options = {"atol": sample.atol, "rtol": sample.rtol}
        nets = [each.net for each in (model, self.autoguidance) if each]
        normal = partial(seed_noise, seeds, model.latent_shape, token=token)
        images, velocity = None, self._velocity(seeds, labels)
        with torch.no_grad(), ready(*nets, bf16=self.bf16):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                x, noise = normal("start").to(device), lambda i, x: normal("step", i)
                x = solver(velocity, x, times, path=path, noise=noise, **options)
            latents = (model.net.split(x)[0] if token else x).float()
            if self.vae is not None:  # 16 at a time bound the decoder's memory
                images = torch.cat([self.vae.decode(part) for part in latents.split(16)])
        return Samples(seeds, labels, latents, images)

    def _velocity(self, seeds: Sequence[int], y: Tensor | None) -> Velocity:
        """The model's velocity for these labels or representations, guided as set."""
        model, sample, null = self.model, self.sample, self.model.num_classes
        if model.net.representation:
            y, null = representations(model, seeds, y), 0
        own, channels = predictor(model, sample), sample.guided_channels
        if self.solver.objective == "ddpm":  # a DiT's variance is never guided
            channels = channels or model.latent_shape[0]
        options: Any = dict(scale=sample.guidance, interval=sample.interval, channels=channels)
        if self.autoguidance:
            other = conditional(predictor(self.autoguidance), y)
            return guided(conditional(own, y), other, **options)
        if sample.guide == "path":
            other = partial(own, route=Route(dropped=True))
            nulls = None if y is None else torch.full_like(y, null)
            return guided(conditional(own, y), conditional(other, nulls), **options)
        return conditional(own, None) if y is None else classifier_free(own, y, null, **options)


def generate(
    model: Trained, seeds: Iterable[int], labels: Labels = None, *, solver: str | None = None,
    autoguidance: Trained | None = None, compile: bool = False, batch_size: int = 64,
    vae: VAE | str | None = None, decode: bool = True,
    precision: Literal["fp32", "bf16", "auto"] = "fp32", **sampler: Any,
) -> Generation:  # fmt: skip
    """Sample `model` at the given seeds, lazily: iterate over the result or `collect()` it.

    Args:
        model: from `erw.load` or `erw.load_pretrained`; for a network of your own
            `Trained(net=net, run=erw.Run(), vae="none")`.
        seeds: one integer per image, from which all of its randomness follows.
        labels: one class for all, one per seed, "random" (drawn by each seed), or None for classes
            in turn: seed modulo their number. Unconditional models take None.
        solver: a name in `erw.SOLVERS`: "euler", "heun" (default), "adams" (the most exact for its
            evaluations), "euler_maruyama" (SDE), or "dopri5", which chooses its own steps within
            atol + rtol |x|; for a DiT "ddpm" or "ddim" (default).
        autoguidance: guide away from this smaller or less trained model of the same data.
        compile: the network's blocks first; pays from some hundred images on.
        batch_size: images per forward pass, doubled by guidance.
        vae: decoder of the latents, by name or loaded; None: the model's own.
        decode: False leaves the images out.
        precision: of autocast; the state stays float64. "auto": bf16 where the hardware has it.
        sampler: the other fields of `erw.config.Sample`: steps, guidance, guide, interval,
            guided_channels, shift, internal, internal_interval, atol, rtol.

    Raises ConfigError for settings that do not fit the model or each other.
    """
    solver = solver or ("ddim" if model.run.flow.objective == "ddpm" else "heun")
    sample = Sample(solver=solver, **sampler)
    seeds = tuple(int(seed) for seed in seeds)
    _check(model, sample, autoguidance, decode=decode)
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise ConfigError("seeds are numbers from 0 to 2**63 - 1")
    if not seeds or batch_size < 1:
        raise ConfigError(f"no seeds, or batch_size {batch_size}: give at least 1 of each")
    chosen, rule = labels_of(labels, seeds, model.num_classes, model.usual_classes)
    for net in [each.net for each in (model, autoguidance) if each and compile]:
        for block in getattr(net, "blocks", [net]):
            block.compile()
    bf16 = precision_of(precision, model.device)[0] is torch.bfloat16
    decoder = _decoder(model, vae) if decode else None
    return Generation(model, seeds, chosen, rule, sample, autoguidance, bf16, batch_size, decoder)


def _check(model: Trained, sample: Sample, weak: Trained | None, *, decode: bool) -> None:
    solver = solver_for(sample.solver, model.run.flow.objective)
    solver.times(sample.steps, shift=sample.shift)  # may refuse them
    if solver.evaluations is None and sample.shift != 1:
        raise ConfigError(f"{sample.solver} chooses its own times: leave shift at 1")
    if decode and len(model.latent_shape) == 1:
        raise ConfigError("an rdm makes representations and no images: give decode=False")
    if model.net.representation and not model.rdm:
        raise ConfigError("there is no rdm: train an rdm into the folder rdm of its run")
    guided = sample.guided_channels or 0
    if guided and (model.net.class_token or guided > model.latent_shape[0]):
        raise ConfigError(f"guided_channels {guided}: at most the latent's, and no class token")
    if sample.internal != 1 and not getattr(model.net, "internal", 0):
        raise ConfigError("internal guidance needs a model trained with --model.internal BLOCK")
    if weak and sample.guidance == 1:
        raise ConfigError("autoguidance with guidance 1 is without effect: give a scale above")
    path = sample.guide == "path"
    if path and (weak or not model.run.plan.routing.path_drop):
        raise ConfigError("guide path needs a model of SPRINT with path_drop, and no autoguidance")
    away = weak or model.net.representation or model.num_classes * model.run.data.class_dropout
    if sample.guidance != 1 and not (away or (path and not model.num_classes)):
        kind = "was trained without label dropout" if model.num_classes else "is unconditional"
        raise ConfigError(f"the model {kind}: it has nothing to guide away from, give guidance 1")
    if weak and KIND(weak) != KIND(model):
        raise ConfigError(f"autoguidance by another kind: {KIND(weak)}, not {KIND(model)}")


def predictor(model: Trained, sample: Sample | None = None) -> ModelVelocity:
    """What solvers evaluate at (x, t, y): the velocity, or a DiT's output (B, 2C, h, w); guided
    internally as `sample` says."""
    if model.run.flow.objective == "ddpm":
        return lambda x, t, y, **route: model.net(x, ddpm.step_at(t), y, **route)
    if sample is None or sample.internal == 1:
        return model.velocity

    def mixed(x: Tensor, t: Tensor, y: Tensor | None, **route: Any) -> Tensor:
        scale = torch.where(within(t), sample.internal, 1.0)
        return model.velocity(x, t, y, internal=scale, **route)

    within = partial(inside, interval=sample.internal_interval)
    return mixed


def representations(model: Trained, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
    """RCG (arXiv 2312.03701): each seed's representation (B, R), drawn by the rdm."""
    assert model.rdm is not None, "see _check"
    own, options = [seeded(seed, "representation") for seed in seeds], to_dict(model.rdm.run.sample)
    drawn = generate(model.rdm, own, labels, **options, decode=False).collect()
    return drawn.latents.to(model.device)


def _decoder(model: Trained, vae: VAE | str | None) -> VAE:
    """The VAE, with the scaling that the model's data has measured where it has one."""
    scales = not isinstance(vae, VAE) or vae.scale is None
    if not isinstance(vae, VAE):
        vae = load_vae(vae or model.vae, device=str(model.device))
    return vae.scaled(**model.scaling) if model.scaling and scales else vae


@contextmanager
def ready(*nets: nn.Module, bf16: bool) -> Iterator[None]:
    """With `bf16`, the weights of the networks' products are cast once; autocast would do so at
    every evaluation, with the same bits."""
    modules = [m for net in nets for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weights = {p: p.data for m in modules if bf16 for p in m.parameters(recurse=False)}
    try:
        for parameter, value in weights.items():
            parameter.data = value.bfloat16()
        yield
    finally:
        for parameter, value in weights.items():
            parameter.data = value


def seed_noise(
    seeds: Sequence[int], shape: tuple[int, ...], *tags: int | str, token: int = 0
) -> Tensor:
    """Standard normal (B, *shape) float32, a row per seed, drawn on the CPU for any device; with a
    class token flat rows of latent and token. The tag "start" gives the initial noise."""
    if token:
        parts = seed_noise(seeds, shape, *tags), seed_noise(seeds, (token,), *tags, "class token")
        return torch.cat([part.flatten(1) for part in parts], 1)
    rngs = [generator(seed, "sample", *tags) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def labels_of(
    labels: Labels, seeds: tuple[int, ...], num_classes: int, usual: Sequence[int]
) -> tuple[tuple[int, ...] | None, str]:
    """The label of each seed, of the `usual` classes unless given; and the rule in words."""
    if not num_classes:
        if labels is not None:
            raise ConfigError("labels were given to an unconditional model; leave them out")
        return None, "none"
    rule = "given"
    if not usual and (labels is None or isinstance(labels, str)):
        raise ConfigError("the model has seen images of none of its classes: give labels")
    if labels is None:
        labels, rule = [usual[seed % len(usual)] for seed in seeds], "balanced: seed modulo classes"
    elif isinstance(labels, int):
        labels, rule = [labels] * len(seeds), f"all {labels}"
    elif isinstance(labels, str):
        if labels != "random":
            raise ConfigError(f"labels are {labels!r}; expected classes, 'random' or none")
        rngs = (generator(seed, "sample", "label") for seed in seeds)
        labels = [usual[int(torch.randint(len(usual), (), generator=rng))] for rng in rngs]
        rule = "random: drawn by seed"
    chosen = tuple(int(label) for label in labels)
    if len(chosen) != len(seeds):
        raise ConfigError(f"{len(chosen)} labels for {len(seeds)} seeds; give one label per seed")
    if wrong := [label for label in chosen if not 0 <= label < num_classes]:
        raise ConfigError(f"label {wrong[0]} is none of the classes 0..{num_classes - 1}")
    return chosen, rule
