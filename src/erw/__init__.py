"""Embedded Representation Warmup: SiT, REPA and ERW in one engine.

The names here are the public face; everything else may move. A name is imported when it is first
used, so `import erw` is light.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Large tensors on a CPU lie in huge pages, where Linux gives them: batches are made anew each step,
# and with small pages most of reading them would be page faults. torch looks once, when it begins.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.2.0"

if TYPE_CHECKING:
    from erw.align import Aligned as Aligned
    from erw.align import Projector as Projector
    from erw.align import cosine as cosine
    from erw.align import nt_xent as nt_xent
    from erw.config import Run as Run
    from erw.data.cache import Cache as Cache
    from erw.data.prepare import prepare as prepare
    from erw.data.sources import open_source as open_source
    from erw.ema import Ema as Ema
    from erw.encoders import load_encoder as load_encoder
    from erw.errors import ErwError as ErwError
    from erw.evaluation.evaluate import evaluate as evaluate
    from erw.evaluation.probing import cknna as cknna
    from erw.interop import from_pretrained as from_pretrained
    from erw.interop import load_pretrained as load_pretrained
    from erw.interop import push_to_hub as push_to_hub
    from erw.interop.export import export as export
    from erw.models import SiT as SiT
    from erw.plan import PRESETS as PRESETS
    from erw.plan import Phase as Phase
    from erw.plan import Plan as Plan
    from erw.plan import Schedule as Schedule
    from erw.plan import constant as constant
    from erw.plan import cosine_decay as cosine_decay
    from erw.plan import exponential as exponential
    from erw.plan import half_life as half_life
    from erw.plan import linear_decay as linear_decay
    from erw.plan import stop_at as stop_at
    from erw.recipes import recipe as recipe
    from erw.sampling import generate as generate
    from erw.training import Trained as Trained
    from erw.training import load as load
    from erw.training import train as train

# What the imports above say, once more, for `__getattr__`.
_NAMES = {
    "erw.align": "Aligned Projector cosine nt_xent",
    "erw.config": "Run",
    "erw.data.cache": "Cache",
    "erw.data.prepare": "prepare",
    "erw.data.sources": "open_source",
    "erw.ema": "Ema",
    "erw.encoders": "load_encoder",
    "erw.errors": "ErwError",
    "erw.evaluation.evaluate": "evaluate",
    "erw.evaluation.probing": "cknna",
    "erw.interop.export": "export",
    "erw.interop": "from_pretrained load_pretrained push_to_hub",
    "erw.models": "SiT",
    "erw.plan": "PRESETS Phase Plan Schedule constant cosine_decay exponential half_life "
    "linear_decay stop_at",
    "erw.recipes": "recipe",
    "erw.sampling": "generate",
    "erw.training": "Trained load train",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'erw' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
