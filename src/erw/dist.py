"""One process or many: this process's rank, device and precision.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the process is alone.
"""

import gc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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

TIMEOUT = timedelta(hours=2)  # the first rank may score samples for longer than NCCL's ten minutes


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
        """This process's rows lo:hi of a global batch. Raises ConfigError unless it divides."""
        if total % self.size:
            raise ConfigError(f"a batch of {total} does not divide over {self.size} processes")
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each

    def mean(self, values: Tensor) -> Tensor:
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def together(self, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute` of the same rows in all processes, each row computed by one of them."""
        if self.size == 1 or rows.is_meta:
            return compute(rows)
        share = compute(rows[self.rank :: self.size])
        values = share.new_zeros(len(rows), *share.shape[1:])
        values[self.rank :: self.size] = share
        dist.all_reduce(values)
        return values

    def any(self, flags: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return flags

    def agree(self, flag: bool) -> bool:
        if self.size == 1:  # a device would wait
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
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that may be sharded, whole in the first process; none in the others."""
        every = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        kept = ((k, v.cpu() if hasattr(tensors[k], "full_tensor") else v) for k, v in every)
        return {name: tensor for name, tensor in kept if self.first}

    def barrier(self) -> None:
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
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else "cpu"
    joined = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    return World(rank, size, torch.device(device))


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that `torchrun` started, or be alone; inside another `world`, that one."""
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if torch.cuda.is_available():
        torch.cuda.set_device(current().device)
    if joins:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = _of_the_living(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield current()
        if joins:
            dist.barrier()  # nobody leaves while another process still talks to it
    finally:
        if joins:
            gc.collect()  # what is left of DistributedDataParallel holds on to the group
            dist.destroy_process_group()


def _of_the_living(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of a store in which only processes that run now have written.

    `torchrun` keeps its store over restarts (PyTorch 2.13), so a process that starts again would
    take the address that a dead one left there for the new one's: it fails, or waits for ever.
    The first process names the part, and answers each of the others by the name that it gives.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("part", mine)
        for other in range(1, size):
            store.set(f"{mine}/{store.get(f'{mine}/{other}').decode()}", "")
        return dist.PrefixStore(mine, store)
    while True:
        part = store.get("part").decode()
        store.set(f"{part}/{rank}", mine)
        try:
            store.wait([f"{part}/{mine}"], timedelta(seconds=1))
        except dist.DistStoreError:
            continue  # nobody answers: the part is a dead process's, or others are late
        return dist.PrefixStore(part, store)


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Operations of this thread, and of those that begin within, share so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch has, each of which, like the caller, computes alone: what
    an operation gives on a CPU may depend on how many threads share it."""
    threads = torch.get_num_threads()
    with computing_with(1), ThreadPoolExecutor(threads, thread_name_prefix="alone") as pool:
        yield pool


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor that may be sharded (`erw.sharding`); it shares memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may be sharded; every process calls it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_sharded(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every process has whole, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    where = like.device_mesh, like.placements
    return distribute_tensor(tensor.to(like.device), *where, src_data_rank=None)


def unsynced(net: Any, *, last: bool) -> AbstractContextManager[None]:
    """Within it, gradients stay local: for all micro-batches of a step but the last."""
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    if isinstance(net, DistributedDataParallel) and not last:
        return net.no_sync()
    return nullcontext()


def precision(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of autocast and the reason for it; float32 means no autocast."""
    if setting != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[setting], "as set"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if native else torch.float32
    return dtype, f"auto: this {device.type.upper()} {'multiplies' if native else 'has no'} bf16"
