from . import on_the_fly as on_the_fly
from . import prepare as prepare
from .cache import Batch as Batch
from .cache import Cache as Cache
from .loader import Loader as Loader
from .loader import prefetch as prefetch
from .sources import Source as Source
from .sources import open_source as open_source

BUILT_IN: tuple[str, str]
