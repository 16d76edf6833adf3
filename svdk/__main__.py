"""``python -m svdk``."""

import sys

from svdk.cli import main

sys.exit(main())
