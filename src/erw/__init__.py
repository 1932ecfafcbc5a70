"""Embedded Representation Warmup: SiT, REPA and ERW in one engine.

The names here are the public face; everything else may move. `import erw` loads torch and nothing
heavier: diffusers, transformers and matplotlib come in where they are used.
"""

__version__ = "0.1.0"

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
from erw.interop import export as export
from erw.interop import from_pretrained as from_pretrained
from erw.interop import load_pretrained as load_pretrained
from erw.interop import push_to_hub as push_to_hub
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
