"""Networks: the protocol that the engine trains, SiT and its line, RCG's small one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
