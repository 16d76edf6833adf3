"""A baseline: two-stage Gumbel sampling in Triton, as serving engines do it on GPUs.

Noise of its own for every token; the best of each block of tokens first, then the best of the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def best_of_blocks_kernel(logits, seeds, step, vocab, stride, scores_out, ids_out, BLOCK: tl.constexpr):
    """Program ``(row, block)``: the largest of logit + noise in a block of tokens, and its id."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    uniform = tl.maximum(tl.rand(tl.load(seeds + row) + tl.load(step), ids), 1e-20)
    score = x - tl.log(-tl.log(uniform))
    at = row * tl.num_programs(1) + block
    tl.store(scores_out + at, tl.max(score, 0))
    tl.store(ids_out + at, (block * BLOCK + tl.argmax(score, 0)).to(tl.int64))


def two_stage(logits: Tensor, seeds: Tensor, step: Tensor) -> Tensor:
    """Tokens int64 ``(B,)`` drawn from ``logits`` ``(B, V)`` at temperature 1.

    ``seeds`` int64 ``(B,)`` and ``step`` int64 ``(1,)``, on the device, so that a graph can be replayed.
    """
    batch, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    scores = torch.empty(batch, blocks, device=logits.device)
    ids = torch.empty(batch, blocks, dtype=torch.int64, device=logits.device)
    best_of_blocks_kernel[(batch, blocks)](
        logits, seeds, step, vocab, logits.stride(0), scores, ids, BLOCK=BLOCK
    )
    return ids.gather(1, scores.argmax(1, keepdim=True))[:, 0]
