"""``extract``: a kernel that counts each row's C, and one that fills the ragged batch.

Steps 1 to 5 and 12 in the first, 5 and 6 in the second. Between the two the row pointers are a cumulative
sum in torch and the number of entries is read back (the output's size). Bytes moved, for B rows of V tokens
of s bytes: 4 B V s, and 16 an entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import Tokens, load_tile
from .steering import (
    DIRECTION,
    INF,
    VECTOR,
    Constants,
    Operands,
    PerRow,
    adjusted,
    delta_of,
    in_confidence_set,
    in_nats,
    in_unit,
    log_p_of,
    row_index,
    safe_log,
    value_of,
)
from .sweep import FINISHING, make_constants, merge, slices_of_row, sweep_slice
from .token_sweep import BASE_MASKED, INVALID, Slices

KEPT = tl.constexpr(4)  # float32 numbers a row that the second kernel takes over


@triton.jit
def size_of_confidence_set(operands, constants, BLOCK: tl.constexpr):
    """How many tokens of a row are in C."""
    size = tl.zeros([BLOCK], tl.int32)
    for start in range(0, operands.vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(operands.warm + ids, mask=ids < operands.vocab, other=-INF).to(tl.float32)
        w = adjusted(w, operands.bias, operands.bitmask, ids, ids < operands.vocab)
        size += in_confidence_set(w, constants.max_w, constants.log_alpha).to(tl.int32)
    return tl.sum(size, 0)


@triton.jit
def keep_constants(kept, constants):
    """Leave what :func:`kept_constants` takes up."""
    tl.store(kept, constants.max_w)
    tl.store(kept + 1, constants.log_zw)
    tl.store(kept + 2, constants.max_b)
    tl.store(kept + 3, constants.gap)


@triton.jit
def kept_constants(kept, log_alpha):
    """A row's constants as far as directions need them."""
    max_w, log_zw, max_b, gap = tl.load(kept), tl.load(kept + 1), tl.load(kept + 2), tl.load(kept + 3)
    return Constants(max_w, log_zw, max_b, 0.0, 0.0, gap, log_alpha)


@triton.jit(do_not_specialize=["batch"])
def extract_count_kernel(
    warm, other, warm_rows, base_rows, vocab, alpha, alpha_rows, sums, counts, counters,
    sizes_out, kept_out, rows_out, status_out, warm_stride, other_stride, batch, slice_size,
    KIND: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program ``row * SPLITS + slice``: the size of C, K, max, log-sum-exp and status of each row."""
    TILE: tl.constexpr = min(BLOCK, FINISHING)
    program = tl.program_id(0)
    index, part = program // SPLITS, program % SPLITS
    warm += row_index(warm_rows, index) * warm_stride
    other += row_index(base_rows, index) * other_stride
    operands = Operands(warm, other, vocab, None, None)
    slices = slices_of_row(Slices(part, slice_size, sums, counts, counts, counters), index, SPLITS, 0)
    alpha = value_of(PerRow(alpha, alpha_rows), index)
    log_alpha = safe_log(alpha)
    if sweep_slice(operands, slices, log_alpha, None, None, KIND, SPLITS, 0, BLOCK, STAGES):
        swept = merge(operands, slices, log_alpha, KIND, SPLITS, 0)
        valid = in_unit(alpha) & (swept.sums.max_w > -INF) & ((swept.flags & INVALID) == 0)
        nan = tl.full([], float("nan"), tl.float32)
        if valid:
            constants = make_constants(operands, swept.sums, log_alpha, valid, KIND)
            tl.store(sizes_out + index, size_of_confidence_set(operands, constants, TILE).to(tl.int64))
            tl.store(rows_out + index, constants.kl.to(tl.float32) if DIRECTION & KIND < VECTOR else nan)
            tl.store(rows_out + batch + index, constants.max_w)
            tl.store(rows_out + 2 * batch + index, constants.max_w + constants.log_zw)
            tl.store(status_out + index, swept.flags & BASE_MASKED)
            keep_constants(kept_out + index * KEPT, constants)
        else:
            tl.store(sizes_out + index, 0)
            for column in range(3):
                tl.store(rows_out + column * batch + index, nan)
            tl.store(status_out + index, INVALID)


@triton.jit
def extract_fill_kernel(
    warm, other, warm_rows, base_rows, vocab, alpha, alpha_rows, row_ptr, kept, ids_out, p_out, delta_out,
    warm_stride, other_stride, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program ``row``: token ids (ascending), p and delta of its C, from ``row_ptr[row]`` on."""
    TILE: tl.constexpr = min(BLOCK, FINISHING)
    index = tl.program_id(0)
    at, end = tl.load(row_ptr + index), tl.load(row_ptr + index + 1)
    if end > at:
        warm += row_index(warm_rows, index) * warm_stride
        other += row_index(base_rows, index) * other_stride
        tokens = Tokens(Operands(warm, other, vocab, None, None), warm, False, vocab)
        log_alpha = safe_log(value_of(PerRow(alpha, alpha_rows), index))
        constants = kept_constants(kept + index * KEPT, log_alpha)
        for start in range(0, vocab, TILE):
            ids, w, o = load_tile(tokens, start, KIND, TILE)
            inside = in_confidence_set(w, constants.max_w, log_alpha)
            place = at + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(ids_out + place, ids.to(tl.int64), mask=inside)
            tl.store(p_out + place, tl.exp(log_p_of(constants, w)), mask=inside)
            delta = in_nats(delta_of(constants, w, o, KIND), KIND)
            tl.store(delta_out + place, delta.to(tl.float32), mask=inside)
            at += tl.sum(inside.to(tl.int32), 0)
