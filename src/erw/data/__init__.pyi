from .cache import Batch as Batch
from .cache import Cache as Cache
from .loader import Loader as Loader
from .loader import prefetch as prefetch
from .sources import Source as Source
from .sources import open_source as open_source
