"""Files: whole or absent, locked, hashed, downloaded; safetensors in and out."""

import contextlib
import json
import os
import sys
import zipfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from erw.errors import CheckpointError, DataError, one_line, raised_as

Tensors = Mapping[str, Any]  # of torch.Tensor; torch is imported where it is used


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A hidden path beside `path` that is synced and renamed to it once the block has filled it.

    `sync=False` spares the disk where a lost file is simply made again. Raises OSError naming
    `path`; the partial file is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield tmp
        if sync:
            with open(tmp, "rb") as file:
                os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        tmp.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes, whole or not at all."""
    with replacing(path) as tmp:
        tmp.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file with anything else."""
    content = path.read_bytes()
    with raised_as(CheckpointError, f"{path} is no JSON object"):
        return dict(json.loads(content).items())


@contextlib.contextmanager
def opened_npz(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of an `.npz` by name, read when they are asked for. Raises DataError for another
    file; numpy would advise to unpickle it."""
    import numpy as np

    if not zipfile.is_zipfile(path) and path.is_file():
        problem = f"{path} is no .npz, or was cut short"
        raise DataError(f"{problem}: get it again, or give another name")
    problem = f"{path} cannot be read as NumPy arrays, get it again"
    with raised_as(DataError, problem), path.open("rb") as file, np.load(file) as arrays:
        for name in arrays.zip.namelist():
            if arrays.zip.open(name).read(6) != np.lib.format.MAGIC_PREFIX:
                raise ValueError(f"{name} in it is no array")
        try:
            yield arrays
        except ValueError as error:
            if "pickle" in str(error):
                raise ValueError("it holds Python objects") from error
            raise


def remove_partial(folder: Path, names: Container[str]) -> None:
    """Remove partial files that killed writers of these names left; nobody may be writing now."""
    for part in folder.glob(".*.part"):
        if part.name[1:].rsplit(".", 2)[0] in names:
            part.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Tensors, header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with text metadata `header`, whole or not at all.

    Raises CheckpointError when it cannot be written (the disk is full).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as tmp:
            values = {k: v.detach().contiguous() for k, v in tensors.items()}
            tmp.touch()
            mode = tmp.stat().st_mode
            save_file(values, tmp, metadata=dict(header or {}))
            tmp.chmod(mode)  # safetensors makes a file that nobody else may read
    except (OSError, SafetensorError) as error:
        problem = f"could not write {path} ({one_line(error)}); earlier files are untouched"
        raise CheckpointError(problem) from error


def load_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and header of a safetensors file. Raises CheckpointError when missing or damaged."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def tensor_header(path: Path) -> dict[str, str]:
    """Header of a safetensors file. Raises as `load_tensors`."""
    with _opened(path) as file:
        return file.metadata() or {}


def check_download(path: Path) -> None:
    """Raise CheckpointError for what is left in place of weights where a download went wrong."""
    with path.open("rb") as file:
        head = file.read(64)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    # A header's length in eight bytes may begin so too; its brace follows.
    if text.startswith((b"<", b"version https://git-lfs")) and head[8:9] != b"{":
        problem = f"{path} is a web page or a git-lfs pointer, not weights"
        raise CheckpointError(f"{problem}: download the file itself (git lfs pull)")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    check_download(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        problem = f"{path} is truncated or not safetensors ({one_line(error)}); get it again"
        raise CheckpointError(problem) from error


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`; the system releases it however the process ends.

    Where another process holds it, the block runs with False, or with `wait` once it is free.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        acquired = FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    with acquired:
        yield True


def cache_home() -> Path:
    """The user's cache folder of erw: $XDG_CACHE_HOME/erw, or ~/.cache/erw."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "erw"


def download(url: str, path: Path, *, sha256: str | None = None) -> Path:
    """`path`, downloaded from `url` unless it is there; `sha256`: the first digits of its hash.

    Raises FileNotFoundError without a network, DataError when the server sent another file.
    """
    if path.exists():
        return path
    hint = f"fetch {url} elsewhere and put it at {path}"
    if os.environ.get("ERW_OFFLINE") == "1":
        raise FileNotFoundError(f"{path.name} is not here and ERW_OFFLINE=1: {hint}")
    import torch

    print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
    try:
        with lock(path.with_name(f"{path.name}.lock"), wait=True):
            if not path.exists():  # another process may have fetched it meanwhile
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, ValueError) as error:  # URLError, timeouts and refusals are OSErrors
        raise FileNotFoundError(f"cannot download ({one_line(error)}): {hint}") from error
    except RuntimeError as error:  # torch's word for another hash
        raise DataError(f"{url} sent another file ({one_line(error)}): {hint}") from error
    return path


def misfit(tensors: Tensors, expected: Tensors, *, optional: Container[str] = ()) -> str:
    """Why `tensors` do not fill `expected`, which has the same names and shapes, in one line; ""
    if they do. Names in `optional` may be missing."""
    both = [
        (k, tuple(tensors[k].shape), tuple(expected[k].shape)) for k in tensors if k in expected
    ]
    problems = {
        "missing": [k for k in expected if k not in tensors and k not in optional],
        "unexpected": [k for k in tensors if k not in expected],
        "of another shape": [f"{k} {one} not {other}" for k, one, other in both if one != other],
    }
    parts = {
        f"{len(v)} {k}": sorted(v)[:6] + ["..."] * (len(v) > 6) for k, v in problems.items() if v
    }
    return "; ".join(f"{problem}: {', '.join(names)}" for problem, names in parts.items())


def hash_file(path: Path) -> str:
    """blake3 of a file, hexadecimal."""
    from blake3 import blake3

    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def weight_hash(module: Any) -> str:
    """A module's own `weight_hash`, or that of its parameters and buffers."""
    return getattr(module, "weight_hash", None) or hash_tensors(module.state_dict())


def hash_tensors(tensors: Tensors) -> str:
    """32 hex digits of blake3 over names, types, shapes and bytes."""
    import torch
    from blake3 import blake3

    digest = blake3(max_threads=blake3.AUTO)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()[:32]
