"""``svdk.backends``: another name of :mod:`svdk.ops.backends`, which implementations of the ops there are."""

import sys

from svdk.ops import backends
from svdk.ops.backends import *  # noqa: F403 - for type checkers; the module itself follows

sys.modules[__name__] = backends
