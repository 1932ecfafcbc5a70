"""Weights from files of unknown origin, read without running anything in them.

Pickles go through torch's weights-only reader, in which `argparse.Namespace` (training arguments
that the peers save with their weights) and paths become inert records. Before that, the archive
must be what torch writes: entries stored uncompressed, together no larger than the file.
"""

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from erw.errors import CheckpointError, one_line
from erw.io import load_tensors

Which = Literal["ema", "model"]
WRAPPERS = {"ema": ("ema", "model", "state_dict"), "model": ("model", "state_dict", "ema")}
PREFIXES = ("module.", "_orig_mod.")
FOLDER_FILE = "diffusion_pytorch_model.safetensors"


class Weights(NamedTuple):
    """Tensors by their names in the file, the wrapper they were in ("" for none), and the text,
    numbers and booleans among the settings saved with them."""

    tensors: dict[str, Tensor]
    wrapper: str
    settings: dict[str, Any]


class Inert:
    """Replaces a class named in a pickle: keeps its state and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def read_weights(path: str | Path, *, which: Which = "ema") -> Weights:
    """The weights in a `.pt`, `.pth`, `.bin` or `.safetensors` file, or a diffusers folder; `which`
    picks averaged or plain ones. They may share memory with the file: copy before changing them.

    Raises:
        FileNotFoundError, CheckpointError: missing, damaged, hostile, or without weights.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no diffusers model, its config.json cannot be read ({one_line(error)})"
            ) from error
        return Weights(load_tensors(path / FOLDER_FILE)[0], "", _plain(config))
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with path.open("rb") as file:  # eight bytes of header length, then the header's brace
        safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    if safetensors:
        tensors, header = load_tensors(path)
        weights = _unwrap(tensors, path, which)._replace(settings=header)
    else:
        weights = _unwrap(_read_pickle(path), path, which)
    size = sum(t.numel() * t.element_size() for t in weights.tensors.values())
    if size > path.stat().st_size:  # a stride of 0 makes a small storage look huge
        raise CheckpointError(f"{path} is smaller than the {size:,} bytes of weights it promises")
    return weights


def _read_pickle(path: Path) -> Any:
    names = ["argparse.Namespace"]
    names += [f"{m}.{k}Path" for m in ("pathlib", "pathlib._local") for k in ("Posix", "Windows")]
    inert = [(Inert, name) for name in names]
    try:
        if zipped := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > path.stat().st_size or any(entry.compress_type for entry in entries):
                raise CheckpointError(f"{path} is a compressed zip archive; it was not unpacked")
        with (
            torch.serialization.safe_globals(inert),  # type: ignore[arg-type]
            warnings.catch_warnings(action="ignore"),  # about a protocol newer than torch's own
        ):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything
        code = re.search(r"(?:GLOBAL|of type|function|class) ([\w.]+\.[\w.]+)", str(error))
        if code and isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path} asks for {code[1]}, which is not weights and could run code; nothing of "
                "it was run: take the bare state dict, or safetensors, from its source"
            ) from error
        # torch's own text recommends loading the file unsafely.
        raise CheckpointError(
            f"{path} is truncated or no file of weights ({type(error).__name__}); get it again"
        ) from error


def _unwrap(content: Any, path: Path, which: Which) -> Weights:
    """The requested state dict, without the prefixes that DDP and torch.compile add."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no weights by name")
    settings = dict[str, Any]()
    for name in ("args", "config"):
        settings |= _plain(getattr(content.get(name), "__dict__", content.get(name)))
    wrapper = next((name for name in WRAPPERS[which] if isinstance(content.get(name), dict)), "")
    weights = content[wrapper] if wrapper else content
    other = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if other or not weights:
        raise CheckpointError(f"{path} holds no state dict: {other[:5] or 'nothing'} is no tensor")
    tensors = {str(name): value.detach() for name, value in weights.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return Weights(tensors, wrapper, settings)


def _plain(values: Any) -> dict[str, Any]:
    """The text, numbers and booleans among some settings; nothing else is looked at."""
    if not isinstance(values, dict):
        return {}
    return {str(k): v for k, v in values.items() if isinstance(v, str | int | float | bool)}
