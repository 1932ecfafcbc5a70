"""Released checkpoints of DiT, SiT, REPA, ERW and LightningDiT: in, and out again; and exports."""

from erw.interop.convert import convert as convert
from erw.interop.convert import save_pretrained as save_pretrained
from erw.interop.export import export as export
from erw.interop.folder import from_pretrained as from_pretrained
from erw.interop.heads import with_heads as with_heads
from erw.interop.hub import push_to_hub as push_to_hub
from erw.interop.pretrained import Pretrained as Pretrained
from erw.interop.pretrained import load_pretrained as load_pretrained
from erw.interop.start import adopted as adopted
from erw.interop.start import is_model as is_model
from erw.interop.start import open_model as open_model
from erw.interop.start import open_start as open_start
from erw.interop.start import starting_point as starting_point
