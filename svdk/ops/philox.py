"""One uniform a row from Philox4x32-10, in plain PyTorch integers; step 11 of ``docs/algorithm.md`` uses it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Every backend draws these
bits: key = the row's 64-bit seed, counter = (0, offset low, offset high, stream), of whose four words the
first two make the uniform. It depends on nothing but the row's own seed and its offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF
SAMPLE_STREAM = 0
CONTRACT = 2
"""Which rule makes tokens of seeds and offsets; those of contract 1 (Gumbel noise a token) come no more."""


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b``; 16-bit halves keep every product inside a signed int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64 tensors) for a 4-word counter and a 2-word key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        hi0, lo0 = _mul_hi_lo(MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def row_uniforms(seed: Tensor, offset: Tensor, stream: int | Tensor = SAMPLE_STREAM) -> Tensor:
    """float64 ``(x + 0.5) / 2**53``, x the upper 53 bits of words 0 (high) and 1, for int64 (B,).

    Or for any shapes that broadcast.
    """
    zero = torch.zeros_like(seed)
    counter = (zero, offset & MASK32, (offset >> 32) & MASK32, zero + stream)
    high, low, _, _ = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    return (((high << 21) | (low >> 11)).double() + 0.5) * 2.0**-53
