"""``extract``: a kernel that counts each row's C, and one that fills the ragged batch.

Between the two the row pointers are a cumulative sum in torch and the number of entries is read back (the
output's size). Bytes moved, for B rows of V tokens of s bytes: 4 B V s, and 16 a listed entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import load_tile
from .steering import (
    DIRECTION,
    INF,
    VECTOR,
    Row,
    delta_of,
    in_nats,
    in_unit,
    inside_of,
    row_index,
    safe_log,
    value_of,
)
from .sweep import BASE_MASKED, COUNTS, INVALID, SUMS, divergence, merge, sweep_slice

KEPT = tl.constexpr(4)  # float32 numbers a row that the second kernel takes over


@triton.jit
def extract_count_kernel(
    warm, other, warm_rows, other_rows, sums, counts, counters, sizes_out, kept_out, rows_out, status_out,
    warm_stride, other_stride, batch, vocab, slice_size, alpha, alpha_rows,
    KIND: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program ``row * SPLITS + slice``: the size of C, K, max, log-sum-exp and status of each row."""
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    program = tl.program_id(0)
    index, part = program // SPLITS, program % SPLITS
    warm += row_index(warm_rows, index) * warm_stride
    other += row_index(other_rows, index) * other_stride
    sums += index.to(tl.int64) * (SPLITS * SUMS)
    counts += index.to(tl.int64) * (SPLITS * COUNTS)
    alpha = value_of(alpha_rows, alpha, index)
    log_alpha = safe_log(alpha)
    last = sweep_slice(
        warm, other, part, slice_size, vocab, log_alpha, sums, counts, counts, counters + index,
        1.0, 0.0, 1.0, True, 0, 0, KIND, False, True, SPLITS, 0, BLOCK, STAGES,
    )  # fmt: skip
    if last:
        max_w, max_b, zw, zb, usable, cross, flags, _, _, _ = merge(
            sums, counts, counts, warm, log_alpha, SPLITS, KIND, 0
        )
        valid = in_unit(alpha) & (max_w > -INF) & ((flags & INVALID) == 0)
        nan = tl.full([], float("nan"), tl.float32)
        if valid:
            log_zw, _log_zb, kl, gap = divergence(
                warm, other, vocab, max_w, max_b, zw, zb, usable, cross, valid, HAS_BASE
            )
            size = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                w = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float32)
                size += inside_of(w, max_w, log_alpha).to(tl.int32)
            tl.store(sizes_out + index, tl.sum(size, 0).to(tl.int64))
            tl.store(rows_out + index, kl.to(tl.float32) if HAS_BASE else nan)
            tl.store(rows_out + batch + index, max_w)
            tl.store(rows_out + 2 * batch + index, max_w + log_zw)
            tl.store(status_out + index, flags & BASE_MASKED)
            tl.store(kept_out + index * KEPT, max_w)
            tl.store(kept_out + index * KEPT + 1, log_zw)
            tl.store(kept_out + index * KEPT + 2, max_b)
            tl.store(kept_out + index * KEPT + 3, gap)
        else:
            tl.store(sizes_out + index, 0)
            for column in range(3):
                tl.store(rows_out + column * batch + index, nan)
            tl.store(status_out + index, INVALID)


@triton.jit
def extract_fill_kernel(
    warm, other, warm_rows, other_rows, row_ptr, kept, ids_out, p_out, delta_out,
    warm_stride, other_stride, vocab, alpha, alpha_rows,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program ``row``: token ids (ascending), p and delta of its C, from ``row_ptr[row]`` on."""
    index = tl.program_id(0)
    at, end = tl.load(row_ptr + index), tl.load(row_ptr + index + 1)
    if end > at:
        kept += index * KEPT
        row = Row(
            warm + row_index(warm_rows, index) * warm_stride,
            other + row_index(other_rows, index) * other_stride,
            warm, False, vocab, tl.load(kept), tl.load(kept + 1), tl.load(kept + 2), tl.load(kept + 3),
            safe_log(value_of(alpha_rows, alpha, index)), 1.0, 0.0, 0.0,
        )  # fmt: skip
        for start in range(0, vocab, BLOCK):
            ids, w, other_tile = load_tile(row, start, KIND, BLOCK)
            inside = inside_of(w, row.max_w, row.log_alpha)
            place = at + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(ids_out + place, ids.to(tl.int64), mask=inside)
            tl.store(p_out + place, tl.exp(w - row.max_w - row.log_zw), mask=inside)
            delta = in_nats(delta_of(row, w, other_tile, KIND), KIND)
            tl.store(delta_out + place, delta.to(tl.float32), mask=inside)
            at += tl.sum(inside.to(tl.int32), 0)
