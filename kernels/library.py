"""The Triton backend's three ops: allocate, pick a configuration, launch once.

``BACKEND`` takes the flat arguments of ``svdk/ops/schema.py``. Eager calls launch directly; under
``torch.compile`` they become the ops ``svdk_triton::*``, which the compiler can look into
(``triton_op``). The slices of a row count themselves in on counters that every launch leaves at zero:
eager calls keep one set a stream, traced and captured calls get their own.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from svdk.ops import schema

from . import tuning
from .extract import KEPT, extract_count_kernel, extract_fill_kernel
from .filters import RANK_LIMIT
from .logprob import steered_logprob_kernel
from .sample import steered_sample_kernel
from .steering import COMPACT, DIRECT, FILTERS, INFO, OUTSIDE
from .sweep import COUNTS, SUMS

INTERPRETED = not isinstance(steered_sample_kernel, triton.runtime.JITFunction)
"""TRITON_INTERPRET=1 was set when Triton was imported: kernels run on CPU tensors, slowly."""

_counters: dict[tuple[torch.device, int], Tensor] = {}


def _is_eager(x: Tensor) -> bool:
    """Whether x holds data now; false for the stand-ins of tracing."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _arrivals(like: Tensor, batch: int) -> Tensor:
    """At least ``batch`` int32 zeros that no launch running at the same time uses."""
    on_gpu = like.device.type == "cuda"
    if not _is_eager(like) or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(batch, dtype=torch.int32, device=like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream if on_gpu else 0
    found = _counters.get((like.device, stream))
    if found is None or found.shape[0] < batch:
        found = torch.zeros(tuning.bucket(max(batch, 256)), dtype=torch.int32, device=like.device)
        _counters[like.device, stream] = found
    return found


def _batch(warm: Tensor, warm_rows: Tensor | None) -> int:
    return warm.shape[0] if warm_rows is None else warm_rows.shape[0]


def _operand(warm: Tensor, base: Tensor | None, vector: Tensor | None) -> tuple[Tensor, int]:
    """What the kernels call ``other``, and the distance between its rows."""
    if base is not None:
        return base, base.stride(0)
    if vector is not None:
        return vector, vector.stride(0) if vector.dim() == 2 else 0
    return warm, 0


def _kind(direction: int, **flags: bool) -> int:
    """``KIND`` of ``kernels/steering.py``."""
    values = {"outside": OUTSIDE, "compact": COMPACT, "direct": DIRECT, "filters": FILTERS, "info": INFO}
    return direction | sum(values[name].value for name, given in flags.items() if given)


def _everywhere(direction: int, alpha: float, alpha_rows: Tensor | None) -> bool:
    """Whether C is known to be every token that can be drawn, so that none is outside."""
    return direction == schema.PLAIN or (alpha_rows is None and alpha == 0.0)


class _Launch:
    """The arguments that all first sweeps share, for one configuration."""

    def __init__(self, config: tuning.Config, warm: Tensor, batch: int, vocab: int, compact: bool):
        self.block, self.splits, self.slice_size = tuning.shape(config, warm, batch, vocab)
        self.grid = (batch * self.splits,)
        self.options = {"num_warps": config.num_warps} if warm.device.type == "cuda" else {}
        self.cap, self.stages = config.cap, config.stages
        slices = batch * self.splits
        self.sums = warm.new_empty(slices * SUMS.value, dtype=torch.float32)
        self.counts = warm.new_empty(slices * COUNTS.value, dtype=torch.int32)
        self.candidates = warm.new_empty(slices * self.cap, dtype=torch.int32) if compact else self.counts
        self.counters = _arrivals(warm, batch) if self.splits > 1 else self.counts


def _configure(name: str, warm: Tensor, batch: int, vocab: int, launch) -> None:
    """Launch with the remembered configuration or, when asked to and possible, tune first."""
    on_gpu = warm.device.type == "cuda" and _is_eager(warm)
    if on_gpu and tuning.wanted() and not torch.cuda.is_current_stream_capturing():
        tuning.tune(name, warm, batch, vocab, launch)
    launch(tuning.config_for(name, warm, batch, vocab))


def steered_sample(
    warm: Tensor, base: Tensor | None, vector: Tensor | None, warm_rows: Tensor | None,
    base_rows: Tensor | None, vocab: int, direction: int, labels: Tensor | None, mode: int,
    strength: float, strength_rows: Tensor | None, alpha: float, alpha_rows: Tensor | None, penalty: float,
    temperature: float, temperature_rows: Tensor | None, top_k: int, top_k_rows: Tensor | None,
    top_p: float, top_p_rows: Tensor | None, min_p: float, min_p_rows: Tensor | None,
    seed: int, seed_rows: Tensor | None, offset: int, offset_rows: Tensor | None, info: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``svdk.ops.schema.STEERED_SAMPLE`` and ``svdk.reference.steered_sample``."""
    batch = _batch(warm, warm_rows)
    token, floats, ints = _sample_outputs(warm, batch, info)
    if batch == 0:
        return token, floats, ints
    other, other_stride = _operand(warm, base, vector)
    everywhere = _everywhere(direction, alpha, alpha_rows)
    finite_penalty = math.isfinite(penalty) and not everywhere
    filters = top_k > 0 or top_p < 1.0 or min_p > 0.0
    filters = filters or any(x is not None for x in (top_k_rows, top_p_rows, min_p_rows))
    compact = not everywhere and not finite_penalty
    direct = everywhere and direction != schema.KL_GRADIENT and mode == schema.CONSTANT and not filters
    ranking = floats
    if filters and compact:
        ranking = warm.new_empty(batch * 2 * RANK_LIMIT.value, dtype=torch.float32)

    def launch(config: tuning.Config) -> None:
        at = _Launch(config, warm, batch, vocab, compact)
        wrap_triton(steered_sample_kernel)[at.grid](
            warm, other, warm_rows, base_rows, vocab, labels, strength, strength_rows, alpha, alpha_rows,
            penalty if finite_penalty else 0.0, temperature, temperature_rows, min(top_k, vocab), top_k_rows,
            top_p, top_p_rows, min_p, min_p_rows, seed, seed_rows, offset, offset_rows,
            at.sums, at.counts, at.candidates, ranking, at.counters,
            token, floats, ints, warm.stride(0), other_stride, batch, at.slice_size,
            KIND=_kind(
                direction, outside=finite_penalty, compact=compact, direct=direct, filters=filters, info=info
            ),
            MODE=mode, SPLITS=at.splits, CAP=at.cap, BLOCK=at.block, STAGES=at.stages, **at.options,
        )  # fmt: skip

    variant = "direct" if direct else "compact" if compact else "wide"
    _configure(f"sample.{variant}.{direction}", warm, batch, vocab, launch)
    return token, floats, ints


def _sample_outputs(warm: Tensor, batch: int, info: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        warm.new_empty(batch, dtype=torch.int64),
        warm.new_empty((5, batch) if info else (0,), dtype=torch.float32),
        warm.new_empty((2, batch) if info else (0,), dtype=torch.int32),
    )


def steered_logprob(
    warm: Tensor, base: Tensor | None, vector: Tensor | None, warm_rows: Tensor | None,
    base_rows: Tensor | None, vocab: int, direction: int, labels: Tensor,
    strength: float, strength_rows: Tensor | None, alpha: float, alpha_rows: Tensor | None, penalty: float,
    strengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``svdk.ops.schema.STEERED_LOGPROB`` and ``svdk.reference.steered_logprob``."""
    batch, number = labels.shape[0], 1 if strengths is None else strengths.shape[0]
    curves = warm.new_empty((3, batch, number), dtype=torch.float32)
    greedy = warm.new_empty((batch, number), dtype=torch.int64)
    rows = warm.new_empty((6, batch), dtype=torch.float32)
    status = warm.new_empty(batch, dtype=torch.int32)
    if batch == 0:
        return curves, greedy, rows, status
    other, other_stride = _operand(warm, base, vector)
    compact = not _everywhere(direction, alpha, alpha_rows)
    finite_penalty = math.isfinite(penalty) and compact

    def launch(config: tuning.Config) -> None:
        at = _Launch(config, warm, batch, vocab, compact)
        wrap_triton(steered_logprob_kernel)[at.grid](
            warm, other, warm_rows, base_rows, vocab, labels, strength, strength_rows, alpha, alpha_rows,
            penalty if finite_penalty else 0.0, strengths, number,
            at.sums, at.counts, at.candidates, at.counters,
            curves, greedy, rows, status, warm.stride(0), other_stride, batch, at.slice_size,
            KIND=_kind(direction, outside=finite_penalty, compact=compact),
            SPLITS=at.splits, CAP=at.cap, BLOCK=at.block, STAGES=at.stages, **at.options,
        )  # fmt: skip

    _configure(f"logprob.{'compact' if compact else 'wide'}.{direction}", warm, batch, vocab, launch)
    return curves, greedy, rows, status


def extract(
    warm: Tensor, base: Tensor | None, vector: Tensor | None, warm_rows: Tensor | None,
    base_rows: Tensor | None, vocab: int, direction: int, alpha: float, alpha_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``svdk.ops.schema.EXTRACT`` and ``svdk.reference.extract``; synchronises (the output's size)."""
    batch = _batch(warm, warm_rows)
    row_ptr = warm.new_zeros(batch + 1, dtype=torch.int64)
    rows = warm.new_empty((3, batch), dtype=torch.float32)
    status = warm.new_empty(batch, dtype=torch.int32)
    other, other_stride = _operand(warm, base, vector)
    if batch:
        sizes = warm.new_empty(batch, dtype=torch.int64)
        kept = warm.new_empty(batch * KEPT.value, dtype=torch.float32)
        at = _Launch(tuning.config_for(f"extract.{direction}", warm, batch, vocab), warm, batch, vocab, False)
        extract_count_kernel[at.grid](
            warm, other, warm_rows, base_rows, vocab, alpha, alpha_rows, at.sums, at.counts, at.counters,
            sizes, kept, rows, status, warm.stride(0), other_stride, batch, at.slice_size,
            KIND=direction, SPLITS=at.splits, BLOCK=at.block, STAGES=at.stages, **at.options,
        )  # fmt: skip
        torch.cumsum(sizes, 0, out=row_ptr[1:])
    entries = int(row_ptr[-1])
    ids = warm.new_empty(entries, dtype=torch.int64)
    p, delta = (warm.new_empty(entries, dtype=torch.float32) for _ in range(2))
    if entries:
        extract_fill_kernel[(batch,)](
            warm, other, warm_rows, base_rows, vocab, alpha, alpha_rows, row_ptr, kept, ids, p, delta,
            warm.stride(0), other_stride, KIND=direction, BLOCK=at.block, **at.options,
        )  # fmt: skip
    return row_ptr, ids, p, delta, rows, status


def _register(function, fake, opaque: bool):
    """The op of a function and, as the backend's entry, what picks between the two."""
    name = f"svdk_triton::{function.__name__}"
    if opaque:
        op = torch.library.custom_op(name, function, mutates_args=())
        op.register_fake(fake)
    else:
        op = torch.library.triton_op(name, function, mutates_args=())

    def entry(warm, *args):
        # Straight to the launch where nothing traces: the dispatcher costs about as much as the kernel.
        return function(warm, *args) if _is_eager(warm) else op(warm, *args)

    return entry


# The interpreter's kernels cannot be traced, nor can a size that depends on the data.
BACKEND = SimpleNamespace(
    steered_sample=_register(steered_sample, schema.fake_steered_sample, INTERPRETED),
    steered_logprob=_register(steered_logprob, schema.fake_steered_logprob, INTERPRETED),
    extract=_register(extract, schema.fake_extract, True),
)
