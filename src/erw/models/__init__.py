"""Networks: the protocol that the engine trains, SiT and its line, RCG's small one."""

from erw.models.backbone import BACKBONES as BACKBONES
from erw.models.backbone import Backbone as Backbone
from erw.models.backbone import build_model as build_model
from erw.models.sit import SiT as SiT
from erw.models.sit import Tapped as Tapped
