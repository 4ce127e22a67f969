"""`python -m timm_msar.cli`, the command where it is not on the path."""

import sys

from . import main

sys.exit(main())
