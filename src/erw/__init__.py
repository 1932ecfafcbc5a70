"""Embedded Representation Warmup: SiT, REPA and ERW in one engine.

The public names are listed in `__init__.pyi`; everything else may move. A name is imported when it
is first used, so `import erw` is light.
"""

import os

import lazy_loader

# Batches and activations on a CPU are allocated anew each step: huge pages spare their page faults.
# torch reads this once, when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
