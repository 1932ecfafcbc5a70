"""One process or many: this process's rank, device and precision.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the process is alone.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from erw.errors import ConfigError

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the others. NCCL's ten minutes would end a run whose first rank scores
samples or writes a large checkpoint for longer."""


@dataclass(frozen=True)
class World:
    """This process among `size`, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> tuple[int, int]:
        """The rows lo:hi of a global batch of `total` that this process holds.

        Raises:
            ConfigError: the batch does not divide by the number of processes.
        """
        if total % self.size:
            raise ConfigError(
                f"a batch of {total} images does not divide over {self.size} processes; "
                "choose a multiple for data.batch_size (and plan.warmup_batch)"
            )
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flags: Tensor) -> Tensor:
        """Elementwise: whether a flag (0 or 1) is up in any process."""
        if self.size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return flags

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is up in any process."""
        if self.size == 1:
            return flag
        return bool(self.any(torch.tensor(float(flag), device=self.device)))

    def broadcast(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process; or its error, raised in every process."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, device=self.device)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def gather(self, value: T) -> list[T]:
        """`value` of every process, in the order of ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, net: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over processes; itself if alone."""
        if self.size == 1:
            return net
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)


def current() -> World:
    """The processes that have joined already (see `world`); alone if none have."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that `torchrun` started (nccl on GPUs, gloo on CPUs), or be alone.

    Inside another `world` it is that one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    joins = size > 1 and not dist.is_initialized()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if joins:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield current()
        if joins:
            dist.barrier()  # nobody leaves while another process still talks to it
    finally:
        if joins:
            gc.collect()  # what is left of DistributedDataParallel holds on to the group
            dist.destroy_process_group()


def unsynced(net: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Within it, gradients stay local: for all micro-batches of a step but the last."""
    if isinstance(net, DistributedDataParallel) and not last:
        return net.no_sync()
    return nullcontext()


def precision(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of autocast and the reason for it; float32 means no autocast."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted], "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"auto: {torch.cuda.get_device_name(device)} multiplies bf16"
        return torch.float32, "auto: this GPU has no native bf16"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "auto: this CPU multiplies bf16 (avx512_bf16 or amx)"
    return torch.float32, "auto: this CPU has no native bf16"
