"""Weights from files that nobody vouches for, read without running anything in them.

Pickles are read by torch's weights-only unpickler, in which `argparse.Namespace` (the training
arguments that the peers keep beside their weights) and paths are inert records. Before that the
archive is held to what torch writes: entries stored plain, together no larger than the file.
"""

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erw.errors import CheckpointError, one_line
from erw.training.checkpoint import write_beside

Which = Literal["ema", "model"]
WRAPPERS = {"ema": ("ema", "model", "state_dict"), "model": ("model", "state_dict", "ema")}
PREFIXES = ("module.", "_orig_mod.")
FOLDER_FILE = "diffusion_pytorch_model.safetensors"


class Found(NamedTuple):
    """What a file holds: tensors by the name in it, which wrapper they were in ("" for none), and
    plain settings (text, numbers, truths) that lay beside them."""

    tensors: dict[str, Tensor]
    wrapper: str
    settings: dict[str, Any]


class Inert:
    """Stands in for a class named in a pickle: keeps the state it is given and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def read_weights(path: str | Path, *, which: Which = "ema") -> Found:
    """The weights in a `.pt`, `.pth`, `.bin` or `.safetensors` file, or a diffusers folder.

    `which` picks between averaged and plain weights where a file has both. Tensors may share
    memory with the file: copy before changing.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: damaged, hostile, or without weights.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if _is_safetensors(path):
        tensors, header = _read_safetensors(path)
        found = _unwrap(tensors, path, which)._replace(settings=header)
    else:
        found = _unwrap(_read_pickle(path), path, which)
    promised = sum(t.numel() * t.element_size() for t in found.tensors.values())
    if promised > path.stat().st_size:
        raise CheckpointError(
            f"{path} promises {promised:,} bytes of weights but has {path.stat().st_size:,}; it is "
            "damaged or hostile, get it again from its source"
        )
    return found


def write_weights(
    tensors: Mapping[str, Tensor], path: Path, *, settings: Mapping[str, str] | None = None
) -> None:
    """Write a state dict, safetensors or (`.pt`, `.pth`, `.bin`) torch's format, whole or not at
    all.

    It is bare, or has `settings` beside it where the peers' training code leaves its arguments: in
    `args` beside `ema`; in safetensors in the header.
    """
    # Clones: a tensor written under several names must be stored as often.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    if path.suffix == ".safetensors":
        write_beside(tensors, path, header={"format": "pt", **(settings or {})})
        return
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path}: end the name in .pt, .pth, .bin or .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        torch.save({"ema": tensors, "args": dict(settings)} if settings else tensors, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"could not write {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of header length, then the header's brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors, and the texts in the header."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is truncated or not safetensors ({one_line(error)}); get it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    stand_ins = [
        (Inert, name) for name in ("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath")
    ]
    stand_ins += [(Inert, f"pathlib._local.{kind}") for kind in ("PosixPath", "WindowsPath")]
    try:
        with (
            torch.serialization.safe_globals(stand_ins),  # type: ignore[arg-type]
            warnings.catch_warnings(action="ignore"),  # of a protocol newer than torch's own
        ):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle fails in any way there is
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and (
            code := re.search(r"(?:GLOBAL|of type|function|class) ([\w.]+\.[\w.]+)", text)
        ):
            raise CheckpointError(
                f"{path} asks for {code[1]}, which is not weights and could run code; nothing of "
                "it was run: take the bare state dict, or safetensors, from its source"
            ) from error
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises to run it after all
            text = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        reason = " ".join(text.split()).partition(". ")[0][:120] or type(error).__name__
        raise CheckpointError(
            f"{path} is truncated or no file of weights ({reason}); get it again"
        ) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that torch did not write: packed entries, or more bytes than the file."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(error)})") from error
    inside = sum(entry.file_size for entry in entries)
    if inside > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} is a zip archive of {inside:,} bytes packed into {size:,}, which torch does "
            "not write; it was not unpacked"
        )


def _read_folder(folder: Path) -> Found:
    """A diffusers model folder: weights, and the plain values of its config.json."""
    for file in ("config.json", FOLDER_FILE):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder} has no {file}; give a file of weights, a diffusers model folder, or "
                "load a run of erw's own with erw.load"
            )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    return Found(_read_safetensors(folder / FOLDER_FILE)[0], "", plain(config))


def _unwrap(content: Any, path: Path, which: Which) -> Found:
    """The chosen state dict of what was read, without the prefixes that wrappers give its names."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no weights by name")
    settings: dict[str, Any] = {}
    for name in ("args", "config"):
        settings |= plain(getattr(content.get(name), "__dict__", content.get(name)))
    wrapper = next((name for name in WRAPPERS[which] if isinstance(content.get(name), dict)), "")
    weights = content[wrapper] if wrapper else content
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(weights):
        other = [str(name) for name in weights if name not in tensors]
        raise CheckpointError(
            f"{path} holds no state dict: {', '.join(other[:5]) or 'nothing'} "
            f"{'are' if len(other) > 1 else 'is'} no weights"
        )
    for prefix in PREFIXES:
        if all(str(name).startswith(prefix) for name in tensors):
            tensors = {str(name).removeprefix(prefix): t for name, t in tensors.items()}
    return Found({str(name): t.detach() for name, t in tensors.items()}, wrapper, settings)


def plain(values: Any) -> dict[str, Any]:
    """The text, numbers and truths among some settings; nothing else is looked at."""
    if not isinstance(values, dict):
        return {}
    return {str(k): v for k, v in values.items() if isinstance(v, str | int | float | bool)}
