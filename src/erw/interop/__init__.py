"""Released checkpoints of DiT, SiT, REPA, ERW and LightningDiT: in, and out again; and exports."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
