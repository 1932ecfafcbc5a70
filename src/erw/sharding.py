"""FSDP2 and HSDP: every process keeps its share of each parameter, and of its gradient, moments and
averages; a block is whole only while it runs.

`fully_shard` per block, projector and the rest of the network. The shards are DTensors by the
parameters' names; `erw.dist.local` and `whole` tell a share from all of it.
"""

import os
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from erw.config import Dist
from erw.dist import World
from erw.errors import ConfigError

# An output that is a view must not be changed in place; none of ours is.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def mesh_of(world: World, settings: Dist) -> DeviceMesh:
    """The processes by replica and share of it; one row of shares where there is one replica.

    Raises ConfigError unless the processes divide into replicas of `shard_size`.
    """
    shares = world.size
    if settings.strategy == "hsdp":  # by default over the processes of a machine
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        shares = settings.shard_size or local
    if world.size % shares:
        problem = f"dist.shard_size {shares} does not divide {world.size} processes"
        raise ConfigError(f"{problem}: choose one that does, or dist.strategy fsdp2")
    names = ("replica", "share")
    if shares == world.size:
        return init_device_mesh(world.device.type, (shares,), mesh_dim_names=names[1:])
    shape = (world.size // shares, shares)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def shard(net: Any, mesh: DeviceMesh, *, dtype: torch.dtype, trains: bool) -> None:
    """Shard a `Network` in place. Its parameters are other objects afterwards.

    Args:
        dtype: of autocast. Modules with nothing but layers whose weights it would round to that
            dtype anyway are gathered in it; gradients are reduced in float32.
        trains: False for an average: then `net.model` is called, and without gradients.
    """
    parts = [m for m in (*net.model.blocks, *net.projectors) if any(True for _ in m.parameters())]
    for part in parts:
        own = [m for m in part.modules() if any(True for _ in m.parameters(recurse=False))]
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if dtype != torch.float32 and all(isinstance(m, nn.Linear | nn.Conv2d) for m in own):
            policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy)
        for method in getattr(part, "entries", ()):  # it gathers there too
            register_fsdp_forward_method(part, method)
    fully_shard(net.model, mesh=mesh, reshard_after_forward=not trains)
    if trains:
        fully_shard(net, mesh=mesh)
        # The first forward fixes dtypes by what trains then: this one, of nothing, while all does.
        register_fsdp_forward_method(net, "extra_repr")
        net.extra_repr()
        for part in parts:  # micro-batches need that a part was whole once, even if it never runs
            part.unshard()
            part.reshard()
