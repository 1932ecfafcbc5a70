from .backbone import BACKBONES as BACKBONES
from .backbone import Backbone as Backbone
from .backbone import build_model as build_model
from .backbone import fitting as fitting
from .sit import SiT as SiT
from .sit import Tapped as Tapped
