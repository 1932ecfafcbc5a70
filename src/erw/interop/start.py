"""Fine-tuning: a run of ours or a released checkpoint as what another run begins with."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erw.config import Flow, Model, Run
from erw.errors import ConfigError
from erw.interop.folder import from_pretrained
from erw.interop.layouts import TIMES
from erw.interop.pretrained import Pretrained, load_pretrained
from erw.interop.record import RECORD
from erw.io import hash_tensors
from erw.models import SiT
from erw.training.init import Init
from erw.training.trained import Trained, is_run, load

ARCHITECTURE = (
    *("depth", "width", "heads", "patch", "rope", "qk_norm", "norm", "mlp", "adaln_shift"),
    *("net", "class_token", "class_dim"),
)
FILES = (".pt", ".pth", ".bin", ".safetensors")
TABLE = "y_embedder.embedding_table.weight"


class Start(NamedTuple):
    """An opened starting point: its network in its own convention, and what is known of it."""

    source: str
    net: SiT
    model: Model
    flow: Flow
    class_names: tuple[str, ...]
    loaded: frozenset[str]
    flipped: bool
    seen: str


def open_start(
    path: str | Path,
    *,
    layout: str = "auto",
    num_heads: int | None = None,
    depth: int | None = None,
) -> Start:
    """Open a run (whatever `erw.load` takes), an exported folder or a released checkpoint.

    `num_heads` and `depth` as in `load_pretrained`.

    Raises:
        CheckpointError, FileNotFoundError: as `load_pretrained`.
    """
    path = Path(path).expanduser()
    if is_run(path) or (path / RECORD).is_file():
        trained = load(path) if is_run(path) else from_pretrained(path)
        names = frozenset(name for name, _ in trained.net.named_parameters())
        run = trained.run
        said = f"run {run.name} after {trained.step} steps"
        flow, classes = run.flow, trained.class_names
        return Start(str(path), trained.net, run.model, flow, classes, names, False, said)
    found = load_pretrained(path, layout, num_heads=num_heads, depth=depth)
    origin, run = found.origin, found.run
    flipped = TIMES[origin.layout] == "flipped"
    return Start(str(path), found.net, run.model, run.flow, (), origin.loaded, flipped, origin.seen)


def open_model(
    path: str | Path,
    *,
    checkpoint: str | int = "last",
    layout: str = "auto",
    device: torch.device | str = "cpu",
) -> Trained | Pretrained:
    """A model to be sampled: whatever `erw.load` takes, an exported folder or a released file.

    Raises as `erw.load`, `from_pretrained` and `load_pretrained` do.
    """
    path = Path(path).expanduser()
    if is_run(path) or not is_model(path):  # which says what is missing
        return load(path, checkpoint=checkpoint, device=device)
    if path.is_dir():
        return from_pretrained(path, device=device)
    return load_pretrained(path, layout, device=device)


def is_model(path: str | Path) -> bool:
    """Whether the path is what `open_model` takes, by its name and by what lies there."""
    path = Path(path).expanduser()
    exported = (path / RECORD).is_file()
    return is_run(path) or exported or (path.is_file() and path.suffix in FILES)


def adopted(run: Run, start: Start) -> Run:
    """The run with the architecture, path and prediction of what it starts from."""
    taken = {name: getattr(start.model, name) for name in ARCHITECTURE}
    run = run.replace(model=dataclasses.replace(run.model, **taken))
    if run.flow.objective != start.flow.objective:  # `starting_point` says so, after all settings
        return run
    flow = dataclasses.replace(run.flow, path=start.flow.path, prediction=start.flow.prediction)
    return run.replace(flow=flow)


def starting_point(start: Start, run: Run, class_names: Sequence[str], *, num_classes: int) -> Init:
    """The weights that `run` begins with, on data of `num_classes` classes called `class_names`.

    Positions are the run's own, for its resolution. Labels go by name where both sides have names;
    without them, rows stay where they are if there are as many. A class that the start does not
    know begins as its null class: the model draws it as it drew anything.

    Raises:
        ConfigError: the run has another objective, or asks for another prediction than the start
            makes.
    """
    if run.flow.objective != start.flow.objective:
        kinds = {"flow": "a flow model", "ddpm": "a DiT, which predicts noise on its chain"}
        raise ConfigError(
            f"{start.source} is {kinds[start.flow.objective]}, but flow.objective is "
            f"{run.flow.objective}; choose a recipe of {start.flow.objective}"
        )
    if run.flow.prediction != start.flow.prediction:
        raise ConfigError(
            f"flow.prediction is {run.flow.prediction}, but {start.source} predicts "
            f"{start.flow.prediction}; leave it out"
        )
    tensors = {k: p.detach() for k, p in start.net.named_parameters() if k in start.loaded}
    if start.flipped:
        tensors = in_our_time(tensors, negated=start.flow.prediction == "velocity")
    said = "given representations"
    if TABLE in tensors:
        old = tensors[TABLE]
        rows, said = label_rows(start.class_names, len(old) - 1, class_names, num_classes)
        tensors[TABLE] = old[torch.tensor([*rows, len(old) - 1])]
    names = {name for name, _ in start.net.named_parameters()}
    return Init(
        source=start.source,
        identity=hash_tensors(start.net),
        said=f"{start.seen}; {said}",
        tensors=tensors,
        whole=names == start.loaded,
    )


def label_rows(
    old: Sequence[str], old_count: int, new: Sequence[str], new_count: int
) -> tuple[list[int], str]:
    """For each new class the row of the old table that it begins as, and what was done in words.

    `old` and `new` are names, empty where not known. Row `old_count` is the null class.
    """
    null = old_count
    if old and new:
        by_name = {name: row for row, name in enumerate(old)}
        rows = [by_name.get(name, null) for name in new]
        known = sum(row != null for row in rows)
        return rows, f"{known} of {new_count} classes by name, the others from no class"
    if old_count == new_count:
        return list(range(new_count)), f"{new_count} classes as they are"
    return [null] * new_count, f"{new_count} classes, all from no class"


def in_our_time(tensors: Mapping[str, Tensor], *, negated: bool) -> dict[str, Tensor]:
    """The weights of net(x, 1 - t), or of its negative, from those of net(x, t), up to rounding.

    The sinusoids of 1 - t are a fixed rotation and reflection of those of t, which the first layer
    of the time embedding takes in. Of a velocity the last layer changes the sign; noise, score and
    clean latent are the same in either direction.
    """
    turned = dict(tensors)
    first = tensors["t_embedder.mlp.0.weight"].double()
    cos, sin = first.chunk(2, dim=1)
    half = cos.shape[1]
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=first.device) / half)
    c, s = omega.cos(), omega.sin()
    turned["t_embedder.mlp.0.weight"] = torch.cat([cos * c + sin * s, cos * s - sin * c], 1).float()
    for kind in ("weight", "bias"):
        if negated and (name := f"final_layer.linear.{kind}") in turned:
            turned[name] = -turned[name]
    return turned
