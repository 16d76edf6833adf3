"""``python -m svdk.cli``."""

import sys

from svdk.cli import main

sys.exit(main())
