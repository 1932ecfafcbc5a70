"""Transformers: velocity networks whose hidden tokens are outputs."""

from erw.models.sit import SiT as SiT
from erw.models.sit import Tapped as Tapped
