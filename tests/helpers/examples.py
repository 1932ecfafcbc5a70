"""The examples as tests use them, also in processes of their own."""

import gc
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from erw.align import Aligned

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def setting(name: str, *, batch: int = 3) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """An example's tiny model, keyword inputs for it, and encoder features."""
    torch.manual_seed(0)
    module = example(name)
    model = module.MyTransformer() if name == "own_loop" else module.make_model(tiny=True)
    labels, z = torch.arange(batch), torch.randn(batch, 16, 48)
    if name == "own_loop":
        return model, {"x": torch.randn(batch, 4, 8, 8), "t": torch.rand(batch), "y": labels}, z
    if name == "dit_diffusers":
        inputs = {"hidden_states": torch.randn(batch, 4, 8, 8), "class_labels": labels}
        return model.eval(), inputs | {"timestep": 100 * labels}, z  # eval: labels are not dropped
    text = {
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "pooled_projections": torch.randn(batch, 20),
    }
    if name == "sd3_diffusers":
        inputs = {"hidden_states": torch.randn(batch, 16, 8, 8), "timestep": 100 * labels}
        return model, inputs | text, z
    inputs = {"hidden_states": torch.randn(batch, 16, 64), "timestep": torch.rand(batch)}
    places = {"img_ids": module.positions(4), "txt_ids": torch.zeros(5, 3)}
    return model, inputs | text | places, z


def aligned(name: str, model: nn.Module, **options: Any) -> Aligned:
    if name == "own_loop":
        options |= {"select": lambda h: h[:, 1:]}
    return Aligned(model, at=example(name).AT, width=64, dim=48, hidden=32, **options)


def one_of_two(rank: int, file: str, results: str) -> None:
    """A rank of a DDP run on its half of the batch; rank 0 writes the gradients of both phases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model, inputs, z = setting("own_loop", batch=4)
    net = aligned("own_loop", model)
    ddp = DistributedDataParallel(net, find_unused_parameters=True)  # warm-up leaves some unused
    half = slice(2 * rank, 2 * rank + 2)
    inputs = {name: value[half] for name, value in inputs.items()}
    got = []
    for stop in (True, False):
        net.zero_grad(set_to_none=True)
        out, align = ddp(**inputs, targets=z[half], stop=stop)
        (align if stop else align + out.square().mean()).backward()
        # DDP gives unused parameters the zeros that all ranks agree on
        got.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    if rank == 0:
        torch.save(got, results)
    dist.barrier()
    # Freed after the group it would free the group's threads, which may wait for Python meanwhile.
    del ddp, out, align
    gc.collect()
    dist.destroy_process_group()
