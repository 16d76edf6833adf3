"""``svdk.sampling``: another name of :mod:`svdk.ops.flashinfer`, FlashInfer's sampling functions."""

import sys

from svdk.ops import flashinfer
from svdk.ops.flashinfer import *  # noqa: F403 - for type checkers; the module itself follows

sys.modules[__name__] = flashinfer
