"""A trained model from its run folder, one of its checkpoints, or a file of `erw ema`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erw import flow
from erw.config import Run, checked, from_dict
from erw.errors import CheckpointError, ConfigError, raised_as
from erw.io import read_json, tensor_header
from erw.models import build_model, fitting
from erw.training.checkpoint import INDEX, fill, paths, read, step_of

RECIPE, WEIGHTS, BEST = "recipe.json", "ema.safetensors", "best.safetensors"
CACHE: dict[str, Any] = {"vae": str, "class_names": tuple[str, ...]}  # in recipe.json, for samples
CACHE |= {"scaling": dict[str, list[float]] | None, "empty_classes": tuple[int, ...] | None}
RDM = "rdm"
"""Folder, in a run's folder, of the run that makes its representations."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with what is needed to draw images from it."""

    net: Any  # the `Backbone`, in eval mode, without gradients
    run: Run  # its settings, resolved
    vae: str  # name or path of the VAE whose latents it makes
    class_names: tuple[str, ...] = ()  # of its classes; empty: unconditional, or not known
    step: int = 0  # optimiser steps behind the weights
    # shift and scale per latent channel that its cache measured; None: the VAE's
    scaling: dict[str, list[float]] | None = None
    source: str = ""  # path that it was loaded from
    average: str = ""  # the average that its weights are, where it is not `run.optim.ema`
    rdm: "Trained | None" = None  # the model that makes the representations that it is given (RCG)
    # alignment heads in its file, one per encoder; empty: none were read
    projectors: nn.ModuleList = dataclasses.field(default_factory=nn.ModuleList)
    # parameters that its file lacks (the last blocks of a warm-up's file)
    missing: frozenset[str] = frozenset()
    origin: str = ""  # what was read of a released checkpoint, in words
    empty_classes: tuple[int, ...] = ()  # of which it has seen no image

    def __post_init__(self) -> None:
        half = self.net.representation and self.rdm is None  # the classes are those of its rdm
        if (names := len(self.class_names)) and names != self.num_classes and not half:
            raise CheckpointError(f"{self.source} names {names} classes, of {self.num_classes}")
        sizes = {key: len(values) for key, values in (self.scaling or {}).items()}
        if sizes and sizes != (due := dict.fromkeys(("scale", "shift"), self.latent_shape[0])):
            raise CheckpointError(f"{self.source} has a scaling of {sizes}, expected {due}")

    @property
    def num_classes(self) -> int:
        """Classes that it can be asked for, through `rdm` where there is one."""
        return self.rdm.num_classes if self.rdm else self.net.null_class

    @property
    def usual_classes(self) -> list[int]:
        """Those that are drawn where none are named: all of which it has seen images."""
        return [label for label in range(self.num_classes) if label not in self.empty_classes]

    @property
    def ema(self) -> float | str:
        """The average that the weights are: its decay, or a description."""
        return self.average or self.run.optim.ema

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.net.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return self.net.latent_shape

    def velocity(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, internal: Tensor | None = None,
        **route: Any,
    ) -> Tensor:  # fmt: skip
        """The velocity at latents x (B, C, h, w), times t (B,), labels y (B,); `Backbone`'s route.

        `internal`: scales (B,) of guidance away from the internal output, v_d + w (v - v_d)
        (Internal Guidance, arXiv 2512.24176). Raises ConfigError for a DiT, which has no velocity.
        """
        if self.run.flow.objective == "ddpm":
            raise ConfigError("a DiT predicts noise and has no velocity; draw it with ddpm or ddim")
        path = flow.PATHS[self.run.flow.path]
        if internal is None:
            output = self.net(x, t, y, **route)
        else:  # the velocity is affine in the output, so outputs mix as velocities do
            tapped = self.net(x, t, y, internal=True, **route)
            output, weak = tapped.velocity, tapped.internal
            output = weak + flow.over(internal, x) * (output - weak)
        return flow.velocity_from(self.run.flow.prediction, output, x, t, path=path)


def load(
    path: str | Path, *, checkpoint: str | int = "last", device: torch.device | str = "cpu"
) -> Trained:
    """The EMA model of a run folder, of one of its files of weights, or of a file of `erw ema`.

    Args:
        checkpoint: "last"; "best", by the scores taken while training; or a step that the run
            keeps a checkpoint of.

    Raises CheckpointError: no run or no such weights there, or truncated or another model's.
    """
    path = Path(path)
    files = {"last": path}
    saved = path.parent.name == "checkpoints"
    if path.is_file() or saved:
        folder = path.parent.parent if saved else path.parent
    else:
        folder = path
        read_recipe(folder)  # says so where there is no run at all
        files = {name: folder / file for name, file in (("last", WEIGHTS), ("best", BEST))}
        files = {name: file for name, file in files.items() if file.exists()}
        files |= {str(step_of(file)): file for file in paths(folder / "checkpoints")}
    if (file := files.get(str(checkpoint))) is None:
        choices = ", ".join(files) or "none at all"
        raise CheckpointError(f"{path} has no checkpoint {str(checkpoint)!r}, but {choices}")
    recipe, tensors, step, average = _read(file)
    with raised_as(CheckpointError, f"the recipe of {file} is damaged"):
        run, cache = checked(Run, recipe["resolved"], "resolved"), recipe["cache"]
        for key, kind in CACHE.items():
            checked(kind, cache.get(key), f"cache.{key}")
    fitting(run.model, tensors, outputs=run.flow.outputs, source=file)
    net = build_model(run.model, outputs=run.flow.outputs)
    net.load_state_dict(tensors, strict=False)  # without its tables
    return assembled(net.to(device), recipe, folder, step=step, source=str(path), average=average)


def assembled(
    net: Any, recipe: dict[str, Any], folder: Path, *, step: int, source: str, average: str = ""
) -> Trained:
    """The record of a network in the run `folder`, of which `recipe` is the recipe.json."""
    run, cache = from_dict(Run, recipe["resolved"]), recipe["cache"]
    rdm = None
    if net.representation and (folder / RDM / WEIGHTS).is_file():
        rdm = fitting_rdm(load(folder / RDM, device=next(net.parameters()).device), run)
    classes = rdm.class_names if rdm else cache["class_names"] if net.null_class else ()
    net = net.eval().requires_grad_(False)
    empty = rdm.empty_classes if rdm else tuple(cache.get("empty_classes") or ())
    return Trained(
        net, run, cache["vae"], tuple(classes), step, cache.get("scaling"), source, average, rdm,
        empty_classes=empty,
    )  # fmt: skip


def fitting_rdm(rdm: Trained, run: Run) -> Trained:
    """`rdm`, if it makes the representations that `run` is given.

    Raises CheckpointError if it makes others, or images.
    """
    makes = rdm.run.data.class_token if rdm.run.model.net == "rdm" else "no representations"
    if makes != run.data.class_token:
        needs = run.data.class_token
        raise CheckpointError(f"{rdm.source} makes {makes}, but {run.name} is given {needs}")
    return rdm


def is_run(path: str | Path) -> bool:
    """Whether `load` takes the path: a run folder, a file of weights in it, one of `erw ema`."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return (path / RECIPE).is_file() or (path / INDEX).is_file()
    try:
        header = tensor_header(path)
    except CheckpointError:
        return False
    return path.name in (WEIGHTS, BEST) or bool({"run", "progress"} & header.keys())


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], int, str]:
    """(recipe, weights, step, which average) of a file that `load` takes."""
    tensors, header = read(file)
    with raised_as(CheckpointError, f"the header of {file} is damaged"):
        recipe, progress = (dict(json.loads(header.get(k, "{}"))) for k in ("run", "progress"))
        if not (recipe or progress or file.name in (WEIGHTS, BEST)):
            raise ValueError("neither a run's checkpoint nor a file of erw ema")
        step, average = int((progress or header)["step"]), header.get("average", "")
    if progress:
        prefix = "ema.model."
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    folder = file.parent.parent if progress else file.parent
    return recipe or read_recipe(folder), tensors, step, average


def read_recipe(folder: Path) -> dict[str, Any]:
    """`recipe.json` of a run folder: `erw`, `torch`, `run`, `resolved`, `cache`, `cost`, `init`.

    Raises CheckpointError: missing or damaged.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no {RECIPE}")
    recipe = read_json(path)
    with raised_as(CheckpointError, f"{path} is damaged, it lacks a part"):
        recipe["run"], recipe["resolved"], recipe["cache"]["vae"]
    return recipe


def begin_with(net: nn.Module, model: Trained, *, projectors: nn.Module | None = None) -> None:
    """Copy the model's parameters into the transformer `net`, except those that its file did not
    have, and its alignment heads, if it has any, into `projectors`.

    Raises CheckpointError if they do not fit; the first few differences are named.
    """
    problem = f"{model.source} cannot start this run"
    hint = "leave out the --model settings, or use a cache with its channels"
    tensors = {k: p for k, p in model.net.named_parameters() if k not in model.missing}
    expected = dict(net.named_parameters())
    fill(expected, tensors, what=problem, hint=hint, optional=model.missing)
    if len(model.projectors) and projectors is not None:
        heads = dict(model.projectors.named_parameters())
        problem += " with its alignment heads"
        hint = "leave out --init-projectors"
        fill(dict(projectors.named_parameters()), heads, what=problem, hint=hint)
