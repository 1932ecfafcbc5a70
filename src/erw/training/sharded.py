"""Checkpoints of sharded runs, by `torch.distributed.checkpoint`: folders that all processes write,
while training goes on, and any number of processes reads, also one alone.

`step-00001000/` has safetensors files, each with shards and where they belong, and `index.json`:
the header of a checkpoint, and a hash of every file. (Its other formats are pickles, which run
code.) It is written beside and renamed by the first process once all others have written theirs.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from erw.dist import TIMEOUT
from erw.errors import CheckpointError, one_line, raised_as
from erw.io import hash_file, read_json, write_json
from erw.training.checkpoint import INDEX


class Saver:
    """Writes checkpoints in the background, one by one; made and called in all processes."""

    def __init__(self) -> None:
        # Of its own: in the default one its messages would meet those of the backward pass.
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.pending: Future[Any] | None = None
        self.path = Path()

    def begin(
        self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str],
        then: Callable[[Path], None],
    ) -> None:  # fmt: skip
        """Copy the tensors, and begin to write them; `then` is called with the folder."""
        self.wait()
        self.path, writer = path, _Writer(path, header, then)
        self.pending = dcp.async_save(  # type: ignore[assignment]
            dict(tensors), storage_writer=writer, process_group=self.group
        )

    def wait(self) -> None:
        """Until what was begun is there. Raises CheckpointError where it could not be written."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            failures = getattr(error, "failures", {}).values()
            reason = next((one_line(first) for first, _ in failures), one_line(error))
            problem = f"could not write {self.path} ({reason}); earlier files are untouched"
            raise CheckpointError(problem) from error


class _Writer(HuggingFaceStorageWriter):
    """Writes to a hidden folder beside `path`, which becomes `path` when all is written."""

    def __init__(self, path: Path, header: Mapping[str, str], then: Callable[[Path], None]) -> None:
        super().__init__(str(path.with_name(f".{path.name}.part")), save_distributed=True)
        self.final, self.header, self.then = path, header, then

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        part = Path(self.path)
        files = {file.name: hash_file(file) for file in sorted(part.iterdir())}
        write_json(part / INDEX, {**self.header, "files": files})
        if self.final.exists():  # damaged, which the run went back past
            shutil.rmtree(self.final)
        os.replace(part, self.final)
        self.then(self.final)


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of the names, shapes and dtypes in a checkpoint, for `read` to fill, and its header.

    Raises CheckpointError unless all files are there as they were written.
    """
    with raised_as(CheckpointError, f"{path} is damaged"):
        header = read_json(path / INDEX)
        for name, written in dict(header.pop("files")).items():
            if hash_file(path / name) != written:
                raise ValueError(f"{name} is not what was written")
        stored: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in stored.items()}
    return tensors, header


def read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, whole or sharded, from a checkpoint that has each with this shape."""
    with raised_as(CheckpointError, f"{path} is damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it reads without the other processes
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
