"""Pretrained weights: from the Hugging Face hub, a local folder or a file; complete or refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erw.errors import CheckpointError, DataError, one_line
from erw.io import misfit


class Hub(NamedTuple):
    """A repository on the Hugging Face hub. `revision`: a commit, or None for the newest."""

    repo: str
    revision: str | None
    subfolder: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` for a file that is missing or anything else."""
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}: expected a folder as transformers or diffusers "
            "saves it"
        )
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


def read_checkpoint(path: Path) -> Any:
    """A file of `torch.save`; no code in it is run. Raises `CheckpointError` if unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors come as many types
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of plain tensors: {one_line(error)}; download "
            "it again (files with code in them are not run)"
        ) from error


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights by name. Raises `CheckpointError` unless all names and shapes are equal."""
    if problem := misfit(state, module.state_dict()):
        raise CheckpointError(f"{source}: {problem}")
    module.load_state_dict(state)


def from_hub(name: str, hub: Hub, files: tuple[str, ...]) -> Path:
    """The folder with `files` in the hub's local cache, downloaded if they are not there yet.

    Raises `CheckpointError` if they are not there and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"{hub.subfolder}/{file}" if hub.subfolder else file for file in files]
    try:
        root = snapshot_download(hub.repo, revision=hub.revision, allow_patterns=patterns)
    except Exception as error:  # network, gate and disk come as many types
        raise _unavailable(name, hub, error) from error
    return Path(root) / hub.subfolder


def from_transformers(
    model: str, types: tuple[str, ...], source: Hub | Path, *, name: str, **options: Any
) -> Any:
    """The transformers model of class `model` in float32, with every weight it needs.

    Raises `DataError` without transformers, `CheckpointError` where the weights cannot be fetched,
    are damaged, of another family (`types`) or incomplete.
    """
    try:
        import transformers
    except ImportError as error:
        raise DataError(
            f"encoder {name} needs transformers, which cannot be imported ({error}): "
            'pip install "erw[encoders]"'
        ) from error
    if isinstance(source, Hub):
        options |= {"revision": source.revision}
        options |= {"local_files_only": os.environ.get("ERW_OFFLINE") == "1"}
    elif (kind := read_json(source / "config.json").get("model_type")) not in types:
        raise CheckpointError(
            f"{source} holds a model of type {kind!r}; {name} expects {' or '.join(types)}"
        )
    return load_complete(
        getattr(transformers, model), source, name=name, logging=transformers.logging,
        dtype="float32", **options,
    )  # fmt: skip


def load_complete(
    model: Any, source: Hub | Path, *, name: str, logging: Any, strict: bool = False, **options: Any
) -> Any:
    """`model.from_pretrained`; missing weights, with `strict` also extra ones, are an error.

    `logging` is the library's: its warnings are silenced, since the errors here replace them.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    place = source.repo if isinstance(source, Hub) else source
    if isinstance(source, Path):
        options["local_files_only"] = True
    try:
        network, info = model.from_pretrained(place, **options, output_loading_info=True)
    except Exception as error:  # network, gate, disk and damage come as many types
        if isinstance(source, Hub):
            raise _unavailable(name, source, error) from error
        raise CheckpointError(
            f"weights of {name} in {source} cannot be loaded: {one_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
    wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if wrong := [*wrong, *(info["unexpected_keys"] if strict else ())]:
        raise CheckpointError(
            f"weights of {name} in {place} are incomplete: {len(wrong)} are missing, extra or of "
            f"another shape, first {wrong[0]!r}"
        )
    return network


def _unavailable(name: str, hub: Hub, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"weights of {name} ({hub.repo} on the Hugging Face hub) cannot be fetched: "
        f"{one_line(error)}; connect and log in if it requires that, or name a local folder: "
        f"{name}=FOLDER"
    )
