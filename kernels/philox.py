"""Philox4x32-10 bits keyed by token id, and the Gumbel noise made of them (for step 11).

The bits are those of ``svdk/ops/philox.py``: key = the row's seed, counter = (token id >> 2, offset low,
offset high, stream 0), word = token id & 3. ``tl.philox`` is the same generator; what is ours is which
word belongs to which token, and a conversion that keeps all 32 bits in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Noise(NamedTuple):
    """What the draw of a row takes besides its steered logits."""

    temperature: Any
    """0 is greedy."""
    seed: Any
    offset: Any


@triton.jit
def _words(blocks, seed, offset):
    """The four words of each counter block: four uint32 tensors shaped like ``blocks``."""
    zero = blocks ^ blocks
    low = zero + (offset & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.philox(seed, blocks, low, high, zero)


@triton.jit
def token_bits(ids, seed, offset):
    """The word of each token id (int32), as uint32: a whole Philox block a token, for scattered ids."""
    w0, w1, w2, w3 = _words(ids >> 2, seed, offset)
    word = ids & 3
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def block_bits(start, seed, offset, BLOCK: tl.constexpr):
    """The words of tokens ``start .. start + BLOCK``, start a multiple of 4: a Philox block serves four."""
    w0, w1, w2, w3 = _words((start >> 2) + tl.arange(0, BLOCK // 4), seed, offset)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel(bits):
    """``-log(-log(u))`` for ``u = (bits + 0.5) / 2**32``, to float32 rounding at both ends.

    Near u = 1 a float32 u would round to 1. There ``v = 1 - u`` is formed from the flipped bits instead,
    and -log1p(-v) is log(w) v / (w - 1) with w = 1 - v rounded: the rounding of w cancels.
    """
    upper = bits >= 0x80000000
    small = tl.where(upper, bits ^ 0xFFFFFFFF, bits).to(tl.int32)  # below 2**31: the cheap conversion
    v = (small.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = tl.where(upper, 1.0 - v, v)
    rounded_away = upper & (w == 1.0)
    ratio = tl.where(upper, v / tl.where(rounded_away, 1.0, 1.0 - w), 1.0)
    exponential = tl.where(rounded_away, v, -tl.log(w) * ratio)
    return -tl.log(exponential)
