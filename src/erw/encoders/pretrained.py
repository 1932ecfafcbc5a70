"""Pretrained weights: from the Hugging Face hub, a local folder or a file; complete or refused."""

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erw.config import flat
from erw.errors import CheckpointError, ConfigError, raised_as
from erw.io import check_download, load_tensors, misfit, read_json


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name in a file of `torch.save`, or in its "state_dict"; no code in it is run."""
    check_download(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text recommends loading the file unsafely
        problem = f"{path} cannot be read as plain tensors; code in files is not run"
        raise CheckpointError(f"{problem} ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights by name. Raises `CheckpointError` unless all names and shapes are equal."""
    if problem := misfit(state, module.state_dict()):
        raise CheckpointError(f"{source}: {problem}")
    module.load_state_dict(state)


def load_complete(
    library: str, model: str, source: str | Path, *, name: str, strict: bool = False, **options: Any
) -> Any:
    """`from_pretrained` of a class of transformers or diffusers, with every weight it needs.

    `source` is a folder or OWNER/NAME[@REVISION] on the hub; `strict`: no other weights. Raises
    `CheckpointError` for weights that cannot be fetched or loaded.
    """
    module = library_for(name, library)
    if isinstance(source, Path):
        check_sizes(source)
    local = isinstance(source, Path) or _offline()
    options |= {"output_loading_info": True, "local_files_only": local}
    place: str | Path = source
    if isinstance(source, str):
        place, _, options["revision"] = source.partition("@")
    with quiet(module), raised_as(CheckpointError, _unavailable(name, place)):
        network, info = getattr(module, model).from_pretrained(place, **options)
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    wrong += info["unexpected_keys"] if strict else []
    if wrong:
        problem = f"{len(wrong)} are missing, extra or of another shape, first {min(wrong)!r}"
        raise CheckpointError(f"weights of {name} ({place}): {problem}")
    return network


def check_sizes(folder: Path) -> None:
    """Raise `CheckpointError` for a number in a folder's config.json that its weights cannot have:
    layers without tensors, which would be built without end, sizes above its bytes, or below 0."""
    size, files = (
        sum(path.stat().st_size for path in folder.iterdir()),
        folder.glob("*.safetensors"),
    )
    count = sum(len(load_tensors(file)[0]) for file in files) or size // 4096
    most = dict.fromkeys(("layers", "blocks", "depths", "stages"), count)
    most |= dict.fromkeys(("channels", "size", "heads", "groups"), size)
    for name, value in flat(read_json(folder / "config.json")).items():
        limit = min((most[word] for word in most if word in name), default=None)
        for number in value if isinstance(value, list) else [value]:
            if limit and isinstance(number, int | float) and not 0 <= number <= limit:
                problem = f"{name} is {value!s:.80}, with {count} tensors of {size:,} bytes"
                raise CheckpointError(
                    f"{folder / 'config.json'} does not fit its weights: {problem}"
                )


def library_for(user: object, library: str) -> Any:
    """The module transformers or diffusers. Raises `ConfigError` naming its user without it."""
    with raised_as(ConfigError, f'{user} needs {library}: pip install "erw[encoders]"'):
        return importlib.import_module(library)


@contextlib.contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Without the warnings of transformers or diffusers: errors of ours replace them."""
    level = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    try:
        yield
    finally:
        library.logging.set_verbosity(level)


def from_hub(name: str, hub: str, files: list[str]) -> Path:
    """The folder of OWNER/NAME[@REVISION] in the hub's local cache, with `files` of it.

    It is named by its commit. Raises `CheckpointError` for what cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = hub.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "local_files_only": _offline()}
    with raised_as(CheckpointError, _unavailable(name, repo)):
        return Path(snapshot_download(repo, allow_patterns=files, **options))


def _offline() -> bool:
    return os.environ.get("ERW_OFFLINE") == "1"


def _unavailable(name: str, place: str | Path) -> str:
    return f"weights of {name} ({place}) cannot be loaded; from a local folder: {name}=FOLDER"
