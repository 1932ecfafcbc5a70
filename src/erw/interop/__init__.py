"""Released checkpoints of DiT, SiT, REPA, ERW and LightningDiT: in, and out again."""

from erw.interop.convert import convert as convert
from erw.interop.convert import save_pretrained as save_pretrained
from erw.interop.pretrained import Pretrained as Pretrained
from erw.interop.pretrained import load_pretrained as load_pretrained
from erw.interop.start import adopted as adopted
from erw.interop.start import open_start as open_start
from erw.interop.start import starting_point as starting_point
