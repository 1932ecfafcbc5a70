"""`python -m erw`, the same as `erw`, for torchrun."""

import sys

from erw.cli import main

sys.exit(main())
