"""Weights from files of unknown origin, read without running anything in them.

Pickles go through torch's weights-only reader, in which `argparse.Namespace` (training arguments
that the peers save with their weights) and paths become inert records. Before that, the archive
must be what torch writes: entries stored uncompressed, together no larger than the file.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erw.errors import CheckpointError
from erw.io import check_download, load_tensors, read_json

Which = Literal["ema", "model"]
PLAIN = ("model", "state_dict")
WRAPPERS = {"ema": ("ema", "model_ema", *PLAIN), "model": (*PLAIN, "ema", "model_ema")}
PREFIXES = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module)\.")  # of DDP and others
FOLDER_FILE = "diffusion_pytorch_model.safetensors"


class Inert:
    """Replaces a class named in a pickle: keeps its state and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def read_weights(
    path: str | Path, *, which: Which = "ema"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a `.pt`, `.pth`, `.bin` or `.safetensors` file, or a diffusers folder, and the
    text, numbers and booleans among the settings saved with them.

    `which` picks averaged or plain ones; the setting "weights" names what they were wrapped in.
    They may share memory with the file: copy before changing them.

    Raises FileNotFoundError, CheckpointError: missing, damaged, hostile, or without weights.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        weights, settings = load_tensors(path / FOLDER_FILE)[0], read_json(path / "config.json")
        return _numbers(weights, path), _plain(settings)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    check_download(path)
    with path.open("rb") as file:  # eight bytes of header length, then the header's brace
        safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    content, settings = load_tensors(path) if safetensors else (_read_pickle(path), {})
    weights = _unwrap(content, path, which, settings)
    size = sum(t.numel() * t.element_size() for t in weights.values())
    if size > path.stat().st_size:  # a stride of 0 makes a small storage look huge
        raise CheckpointError(f"{path} is smaller than the {size:,} bytes of weights it promises")
    return _numbers(weights, path), settings


def _numbers(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same. Raises CheckpointError for one that is sparse, or not of real numbers."""
    for name, value in weights.items():
        if value.layout is not torch.strided or not value.is_floating_point():
            kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise CheckpointError(f"{path}: {name} is {kind}; expected dense floating point")
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
            danger = f"{code[1]}, which is not weights and could run code; nothing of it was run"
            raise CheckpointError(f"{path} asks for {danger}: take safetensors") from error
        # torch's own text recommends loading the file unsafely.
        raise CheckpointError(
            f"{path} is truncated or no file of weights ({type(error).__name__}); get it again"
        ) from error


def _unwrap(content: Any, path: Path, which: Which, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The requested state dict, without the `PREFIXES` of wrappers; what is saved with it goes into
    `settings`."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no weights by name")
    for name in ("args", "config"):
        settings |= _plain(getattr(content.get(name), "__dict__", content.get(name)))
    for name in WRAPPERS[which]:
        if isinstance(content.get(name), dict):
            content, settings["weights"] = content[name], name
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict: {str(list(content))[:80]}")
    return {PREFIXES.sub("", str(name)): value.detach() for name, value in content.items()}


def _plain(values: Any) -> dict[str, Any]:
    values = values.items() if isinstance(values, dict) else ()
    return {str(k): v for k, v in values if isinstance(v, str | int | float | bool)}
