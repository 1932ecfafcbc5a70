"""The frozen networks, run so that neither cores nor processes show in the bytes that they give.

On a CPU, what one operation gives may depend on how many threads share it, so none does: a batch
is cut into pieces of fixed size, each encoded by one thread, and the threads have their own.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erw.data.pca import Pca
from erw.errors import ConfigError

PIECE = 4  # images: enough for a network's products, and what it holds of them stays in caches


class Networks(NamedTuple):
    """The frozen parts that encode, and the precision of their maths.

    `vae` is None where only features are added; `pca`: what reduces the features of an encoder;
    `pool`: who shares the work on a CPU.
    """

    vae: Any
    encoders: tuple[Any, ...]
    precision: str
    device: str
    pca: Mapping[str, Pca] = MappingProxyType({})
    pool: ThreadPoolExecutor | None = None

    def encoder(self, name: str) -> Any:
        """An encoder by name. Raises `ConfigError` if it was not given."""
        found = next((encoder for encoder in self.encoders if encoder.name == name), None)
        if found is None:
            raise ConfigError(f"features of {name} are to be made too: add it to --encoders")
        return found

    def run(self, network: Any, images: Tensor) -> Any:
        """float32 (B, ...), or a tuple of such, of uint8 images (B, 3, H, W) on the device."""
        if self.pool is not None and images.device.type == "cpu":
            return _in_pieces(partial(self._run, network), images, pool=self.pool)
        return self._run(network, images)

    @torch.inference_mode()
    def _run(self, network: Any, images: Tensor) -> Any:
        low = self.precision == "bfloat16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=low):
            out = network(images)
        return tuple(x.float() for x in out) if isinstance(out, tuple) else out.float()


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch has, each of which, like the caller, computes alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that begin from now on, and this one
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _in_pieces(run: Callable[[Tensor], Any], images: Tensor, *, pool: ThreadPoolExecutor) -> Any:
    """What `run` gives of images (B, ...), a tensor or a tuple of them, made piece by piece."""
    found = list(pool.map(run, images.split(PIECE)))
    if isinstance(found[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    return torch.cat(found)
