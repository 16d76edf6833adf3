"""The Triton backend's four ops: allocate, pick a configuration, launch.

``BACKEND`` takes the flat arguments of ``svdk/ops/schema.py``, whose table says which is which; a kernel's
arguments have the names of the table too, and are found by name. Eager calls launch directly; under
``torch.compile`` they become the ops ``svdk_triton::*``, which the compiler can look into (``triton_op``).
The slices of a row count themselves in on counters that every launch leaves at zero: eager calls keep one set
a stream, traced and captured calls get their own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import GenericAlias, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from svdk.ops import arguments, gradients, schema

from . import tuning
from .extract import KEPT, extract_count_kernel, extract_fill_kernel
from .filters import RANK_LIMIT
from .logits import measure_rows_kernel, write_rows_kernel
from .logprob import steered_logprob_kernel
from .sample import steered_sample_kernel
from .steering import COMPACT, DIRECT, FILTERS, INFO, OUTSIDE
from .sweep import COUNTS, FINISHING, SUMS

INTERPRETED = not isinstance(steered_sample_kernel, triton.runtime.JITFunction)
"""TRITON_INTERPRET=1 was set when Triton was imported: kernels run on CPU tensors, slowly."""

_NAMES = {op.name: op.names for op in schema.OPS.values()}
_TYPES = {
    "Tensor": Tensor,
    "Tensor(a!)": Tensor,
    "Tensor?": Tensor | None,
    "float": float,
    "int": int,
    "bool": bool,
}
_counters: dict[tuple[torch.device, int], Tensor] = {}


def _is_eager(x: Tensor) -> bool:
    """Whether x holds data now; false for the stand-ins of tracing."""
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and arguments.has_data(x)


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


class _Call:
    """A call of an op: its arguments by name, and what follows from them for every kernel."""

    def __init__(self, op: schema.Op, flat: tuple[Any, ...]):
        self.operands = schema.Operands(*flat[: len(schema.Operands._fields)])
        self.given = dict(zip(_NAMES[op.name], flat, strict=True))
        warm, base, vector, *_ = self.operands
        self.warm, self.batch, self.vocab = warm, self.operands.batch, self.operands.vocab
        other, other_stride = warm, 0
        if base is not None:
            other, other_stride = base, base.stride(0)
        elif vector is not None:
            other, other_stride = vector, vector.stride(0) if vector.dim() == 2 else 0
        self.everywhere = self.operands.direction == schema.PLAIN or (
            self.given["alpha_rows"] is None and self.given["alpha"] == 0.0
        )
        """Whether C is known to be every token that can be drawn, so that none is outside."""
        bias, bitmask = (self.given.get(name) for name in ("logit_bias", "bitmask"))
        self.adjusts = bias is not None or bitmask is not None
        penalty = self.given.get("penalty", -math.inf)
        self.finite_penalty = math.isfinite(penalty) and not self.everywhere
        self.given |= {
            "other": other,
            "other_stride": other_stride,
            "warm_stride": warm.stride(0),
            "bias_stride": 0 if bias is None or bias.dim() == 1 else bias.stride(0),
            "bitmask_stride": 0 if bitmask is None else bitmask.stride(0),
            "batch": self.batch,
            "penalty": penalty if self.finite_penalty else 0.0,
        }

    def kind(self, compact: bool, direct: bool = False, filters: bool = False, info: bool = False) -> int:
        """``KIND`` of ``kernels/steering.py``."""
        flags = (OUTSIDE, self.finite_penalty), (COMPACT, compact), (DIRECT, direct), (FILTERS, filters)
        return self.operands.direction + sum(bit.value for bit, on in (*flags, (INFO, info)) if on)

    def sweep_arguments(self, config: tuning.Config, kind: int) -> dict[str, Any]:
        """``given``, and how a first sweep cuts rows and where slices publish what they find."""
        block, splits, slice_size = tuning.shape(config, self.warm, self.batch, self.vocab)
        slices = self.batch * splits
        counts = candidates = counters = self.warm.new_empty(slices * COUNTS.value, dtype=torch.int32)
        if kind & COMPACT.value:
            candidates = self.warm.new_empty(slices * config.cap, dtype=torch.int32)
        if splits > 1:
            counters = _arrivals(self.warm, self.batch)
        return self.given | {
            "sums": self.warm.new_empty(slices * SUMS.value, dtype=torch.float32),
            "counts": counts,
            "candidates": candidates,
            "counters": counters,
            "slice_size": slice_size,
            "KIND": kind,
            "SPLITS": splits,
            "CAP": config.cap,
            "BLOCK": block,
            # Loads of a bias or a mask would be staged too, in more shared memory than there is to spare.
            "STAGES": 1 if self.adjusts else config.stages,
        }

    def options(self, config: tuning.Config) -> dict[str, int]:
        """What a launch takes besides a kernel's arguments."""
        return {"num_warps": config.num_warps} if self.warm.device.type == "cuda" else {}

    def configure(self, name: str, launch: Callable[[tuning.Config], None]) -> None:
        """Launch with the remembered configuration or, when asked to and possible, tune first."""
        problem = (f"{name}.{self.operands.direction}", self.warm, self.batch, self.vocab)
        on_gpu = self.warm.device.type == "cuda" and _is_eager(self.warm)
        if on_gpu and tuning.wanted() and not torch.cuda.is_current_stream_capturing():
            tuning.tune(*problem, launch)
        launch(tuning.config_for(*problem))


def _taken(kernel, known: dict[str, Any]) -> list[Any]:
    """The arguments of a kernel in its order, out of all that is known."""
    return [known[name] for name in kernel.arg_names]


def steered_sample(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See ``svdk.ops.schema.STEERED_SAMPLE`` and ``svdk.reference.steered_sample``."""
    call = _Call(schema.STEERED_SAMPLE, flat)
    given, info, mode = call.given, call.given["info"], call.given["strength_mode"]
    token = call.warm.new_empty(call.batch, dtype=torch.int64)
    floats = call.warm.new_empty((5, call.batch) if info else (0,), dtype=torch.float32)
    ints = call.warm.new_empty((2, call.batch) if info else (0,), dtype=torch.int32)
    if call.batch == 0:
        return token, floats, ints
    filters = given["top_k"] > 0 or given["top_p"] < 1.0 or given["min_p"] > 0.0
    filters = filters or any(given[name] is not None for name in ("top_k_rows", "top_p_rows", "min_p_rows"))
    compact = not call.everywhere and not call.finite_penalty
    direct = call.everywhere and call.operands.direction != schema.KL_GRADIENT
    direct = direct and mode == schema.CONSTANT and not filters
    kind = call.kind(compact, direct, filters, info)
    ranking = floats
    if filters and compact:
        ranking = call.warm.new_empty(call.batch * 2 * RANK_LIMIT.value, dtype=torch.float32)
    more = {"token_out": token, "floats_out": floats, "ints_out": ints, "ranking": ranking, "MODE": mode}
    more["top_k"] = min(given["top_k"], call.vocab)

    def launch(config: tuning.Config) -> None:
        known = call.sweep_arguments(config, kind) | more
        wrap_triton(steered_sample_kernel)[(call.batch * known["SPLITS"],)](
            *_taken(steered_sample_kernel, known), **call.options(config)
        )

    call.configure(f"sample.{'direct' if direct else 'compact' if compact else 'wide'}", launch)
    return token, floats, ints


def steered_logprob(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``svdk.ops.schema.STEERED_LOGPROB`` and ``svdk.reference.steered_logprob``."""
    call = _Call(schema.STEERED_LOGPROB, flat)
    warm, batch, strengths = call.warm, call.batch, call.given["strengths"]
    number = 1 if strengths is None else strengths.shape[0]
    curves = warm.new_empty((3, batch, number), dtype=torch.float32)
    greedy = warm.new_empty((batch, number), dtype=torch.int64)
    rows = warm.new_empty((6, batch), dtype=torch.float32)
    status = warm.new_empty(batch, dtype=torch.int32)
    if batch == 0:
        return curves, greedy, rows, status
    kind = call.kind(compact=not call.everywhere)
    more: dict[str, Any] = {"curves_out": curves, "greedy_out": greedy, "rows_out": rows}
    more |= {"status_out": status, "number": number}

    def launch(config: tuning.Config) -> None:
        known = call.sweep_arguments(config, kind) | more
        wrap_triton(steered_logprob_kernel)[(call.batch * known["SPLITS"],)](
            *_taken(steered_logprob_kernel, known), **call.options(config)
        )

    call.configure(f"logprob.{'wide' if call.everywhere else 'compact'}", launch)
    return curves, greedy, rows, status


def extract(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``svdk.ops.schema.EXTRACT`` and ``svdk.reference.extract``; synchronises (the output's size)."""
    call = _Call(schema.EXTRACT, flat)
    warm, batch, kind = call.warm, call.batch, call.kind(compact=False)
    row_ptr = warm.new_zeros(batch + 1, dtype=torch.int64)
    rows = warm.new_empty((3, batch), dtype=torch.float32)
    status = warm.new_empty(batch, dtype=torch.int32)
    config = tuning.config_for(f"extract.{call.operands.direction}", warm, batch, call.vocab)
    known = {}
    if batch:
        sizes = warm.new_empty(batch, dtype=torch.int64)
        kept = warm.new_empty(batch * KEPT.value, dtype=torch.float32)
        known = call.sweep_arguments(config, kind)
        known |= {"sizes_out": sizes, "kept_out": kept, "rows_out": rows, "status_out": status}
        extract_count_kernel[(batch * known["SPLITS"],)](
            *_taken(extract_count_kernel, known), **call.options(config)
        )
        torch.cumsum(sizes, 0, out=row_ptr[1:])
        known |= {"row_ptr": row_ptr, "kept": kept}
    entries = int(row_ptr[-1])
    ids = warm.new_empty(entries, dtype=torch.int64)
    p, delta = (warm.new_empty(entries, dtype=torch.float32) for _ in range(2))
    if entries:
        known |= {"ids_out": ids, "p_out": p, "delta_out": delta}
        extract_fill_kernel[(batch,)](*_taken(extract_fill_kernel, known), **call.options(config))
    return row_ptr, ids, p, delta, rows, status


def steered_logits(*flat: Any) -> Tensor:
    """See ``svdk.ops.schema.STEERED_LOGITS`` and ``svdk.reference.steered_logits``."""
    call = _Call(schema.STEERED_LOGITS, flat)
    warm, batch, out = call.warm, call.batch, call.given["out"]
    status = warm.new_empty(batch, dtype=torch.int32)
    if batch == 0:
        return status
    kind = call.kind(compact=not call.everywhere and not call.finite_penalty)
    # Not tuned here: where out is the warm logits, a second launch would steer them again.
    config = tuning.config_for(f"logits.{call.operands.direction}", warm, batch, call.vocab)
    known = call.sweep_arguments(config, kind) | {"MODE": call.given["strength_mode"], "status_out": status}
    kept, mus, steered = (
        warm.new_empty(n, dtype=torch.float32)
        for n in (batch * KEPT.value, batch, known["candidates"].numel())
    )
    found, width = warm.new_empty(batch, dtype=torch.int32), out.shape[1]
    known |= {"kept_out": kept, "kept": kept, "mu_out": mus, "mus": mus, "found_out": found, "found": found}
    known |= {"steered_out": steered, "steered": steered, "largest": torch.finfo(out.dtype).max}
    known |= {"logits_out": out, "out_stride": out.stride(0), "width": width}
    splits, tile = known["SPLITS"], min(known["BLOCK"], FINISHING.value)
    for kernel, inputs, programs in (
        (measure_rows_kernel, known, splits),
        (write_rows_kernel, known | {"BLOCK": tile}, triton.cdiv(width, tile)),
    ):
        wrap_triton(kernel)[(batch * programs,)](*_taken(kernel, inputs), **call.options(config))
    return status


def _signature(op: schema.Op) -> inspect.Signature:
    """The table's entry as a signature: torch.library makes the schema of a ``triton_op`` from that."""
    declared = [argument.split() for argument in op.schema[1 : op.schema.index(") -> (")].split(", ")]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=_TYPES[of]) for of, name in declared]
    outputs = op.returns.count("Tensor")
    returned = Tensor if outputs == 1 else GenericAlias(tuple, (Tensor,) * outputs)
    return inspect.Signature(parameters, return_annotation=returned)


def _register(function, fake, opaque: bool, mutates: tuple[str, ...] = ()):
    """The op of a function and, as the backend's entry, what picks between the two."""
    name = f"svdk_triton::{function.__name__}"
    function.__signature__ = _signature(schema.OPS[function.__name__])
    if opaque:
        op = torch.library.custom_op(name, function, mutates_args=mutates)
        op.register_fake(fake)
    else:
        op = torch.library.triton_op(name, function, mutates_args=mutates)
    if function.__name__ == "steered_logprob":
        op.register_autograd(gradients.op_backward, setup_context=gradients.setup_context)

    def entry(*flat):
        # Straight to the launch where nothing traces: the dispatcher costs about as much as the kernel.
        return function(*flat) if _is_eager(flat[0]) else op(*flat)

    return entry


# The interpreter's kernels cannot be traced, nor can a size that depends on the data.
BACKEND = SimpleNamespace(
    steered_sample=_register(steered_sample, schema.fake_steered_sample, INTERPRETED),
    steered_logprob=_register(steered_logprob, schema.fake_steered_logprob, INTERPRETED),
    steered_logits=_register(steered_logits, schema.fake_steered_logits, INTERPRETED, ("out",)),
    extract=_register(extract, schema.fake_extract, True),
)
