"""``svdk.reference``: another name of :mod:`svdk.ops.reference`, the specification, in float64."""

import sys

from svdk.ops import reference
from svdk.ops.reference import *  # noqa: F403 - for type checkers; the module itself follows

sys.modules[__name__] = reference
