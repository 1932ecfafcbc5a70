"""`python -m erw.cli`, the same as `erw`."""

import sys

from erw.cli import main

sys.exit(main())
