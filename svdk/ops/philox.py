"""Philox4x32-10 noise keyed by token id, in plain PyTorch integers; step 11 of ``docs/algorithm.md`` uses it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Every backend draws
these bits: key = the row's 64-bit seed, counter = (token id >> 2, offset low, offset high, stream),
word = token id & 3, so one block serves four neighbouring tokens and a row's noise depends on
nothing but its own seed, its offset and the token id.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF
SAMPLE_STREAM = 0


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


def random_bits(seed: Tensor, offset: Tensor, vocab: int, stream: int = SAMPLE_STREAM) -> Tensor:
    """Raw 32-bit words, int64 ``(B, vocab)``, for int64 seeds and offsets ``(B,)``."""
    blocks = torch.arange((vocab + 3) // 4, device=seed.device)
    seed, offset = seed[:, None], offset[:, None]
    counter = (
        blocks.expand(seed.shape[0], -1),
        (offset & MASK32).expand(-1, blocks.numel()),
        ((offset >> 32) & MASK32).expand(-1, blocks.numel()),
        torch.full_like(blocks, stream).expand(seed.shape[0], -1),
    )
    words = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    return torch.stack(words, dim=-1).flatten(1)[:, :vocab]


def uniforms(bits: Tensor) -> Tensor:
    """float64 uniforms ``(x + 0.5) / 2**32``, strictly inside (0, 1)."""
    return (bits.double() + 0.5) * 2.0**-32


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise ``-log(-log(u))``, float64."""
    return -torch.log(-torch.log(uniforms(bits)))
