"""Released checkpoints of DiT, SiT, REPA, ERW and LightningDiT: in, and out again; and exports."""

from erw.interop.export import push_to_hub as push_to_hub
from erw.interop.init_from import adopt as adopt
from erw.interop.init_from import starting_point as starting_point
from erw.interop.pretrained import from_pretrained as from_pretrained
from erw.interop.pretrained import kind_of as kind_of
from erw.interop.pretrained import load_pretrained as load_pretrained
from erw.interop.pretrained import open_model as open_model
