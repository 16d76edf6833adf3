"""The uniform of a row, from Philox4x32-10 (for step 11).

It is that of ``svdk/ops/philox.py``: key = the row's seed, counter = (0, offset low, offset high, stream 0),
and the upper 53 bits of words 0 (high) and 1. ``tl.philox`` is the same generator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Draw(NamedTuple):
    """What the draw of a row takes besides its steered logits."""

    temperature: Any
    """0 is greedy."""
    seed: Any
    offset: Any


@triton.jit
def row_uniform(draw):
    """``(x + 0.5) / 2**53``, float64, for the 53 bits x of a row."""
    zero = tl.zeros([1], tl.int32)
    low = zero + (draw.offset & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zero + ((draw.offset >> 32) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    w0, w1, _, _ = tl.philox(draw.seed, zero, low, high, zero)
    bits = (w0.to(tl.uint64) << 21) | (w1.to(tl.uint64) >> 11)
    return tl.sum((bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16, 0)
