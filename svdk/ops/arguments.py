"""Argument checks: every error names the argument, what it was and what is allowed.

Values inside device tensors are not looked at (that would synchronise); a row whose parameter is
out of range comes back with status INVALID. CPU tensors are checked here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from svdk.errors import InputError
from svdk.ops.schema import (
    DIRECTIONS,
    PARAMETER,
    PLAIN,
    STEERED_LOGITS,
    VECTOR,
    Op,
    Operands,
    Parameter,
    PerRow,
    batch_of,
)
from svdk.utils.checks import fail

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TWO64 = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio, odd: its multiples are far apart, so rows of one seed get far-apart seeds."""
MAX_VOCAB = 1 << 30
"""Token ids are 32-bit integers in the kernels, with room to step past the end."""
LARGEST = torch.finfo(torch.float32).max
"""Scalars are held to the range of the float32 tensors that carry one value a row."""
COLDEST = 1e-30
"""Below this, logits over the temperature could leave the range of a double; 0 says greedy."""
_TEMPERATURES = f"0 (greedy) or a number >= {COLDEST:g}"


def choice(name: str, value: str, allowed: dict[str, int] | tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise fail(name, repr(value), " | ".join(repr(a) for a in allowed))
    return value


_TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, key) for key in ("FAKE", "PROXY", "FUNCTIONAL"))


def has_data(x: Tensor) -> bool:
    """Whether x holds numbers now: no stand-in of tracing, none of ``torch.func``'s batches."""
    intercepted = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if intercepted or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return False
    return all(torch._C._get_dispatch_mode(tracer) is None for tracer in _TRACERS)


def host_values(rows: Tensor) -> bool:
    """Whether the numbers in ``rows`` may be read here without a device sync or a graph break."""
    return rows.device.type == "cpu" and not torch.compiler.is_compiling() and has_data(rows)


def batches(values: Iterable[Any]) -> list[Tensor]:
    """Those of ``torch.func.vmap``."""
    if torch._C._functorch.peek_interpreter_stack() is None:  # mostly
        return []
    return [x for x in values if isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x)]


def refuse_batches(flat: list[Any]) -> None:
    """``InputError`` for ``torch.func.vmap`` of a backend that has no rule for it."""
    if batches(flat):
        raise fail("backend", "one without torch.func.vmap", "'cuda' or 'cpu'; or one call with all the rows")


def shape(x: Any) -> str:
    """What something is, for an error message: a tensor's shape."""
    if not isinstance(x, Tensor):
        return repr(x)
    layout = "" if x.layout == torch.strided else f" ({x.layout})"
    return f"a tensor of shape {tuple(x.shape)}{layout}"


def dense(x: Any) -> bool:
    """Whether this is an ordinary tensor, neither sparse nor nested."""
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested


def integer_value(name: str, value: Any, allowed: str) -> int:
    """``value`` as a Python integer."""
    if type(value) is int:  # a symbol of torch.compile too, which the rest would make a constant
        return value
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise fail(name, shape(value), allowed) from None


def float_value(name: str, value: Any, allowed: str) -> float:
    """``value`` as a Python float; strings that spell one are taken."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise fail(name, shape(value), allowed) from None


def index_rows(name: str, rows: Tensor, limit: int, like: Tensor) -> Tensor:
    """int64 (B,) row indices into a tensor of ``limit`` rows."""
    if not dense(rows) or rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        was = f"{shape(rows)}, {rows.dtype}" if isinstance(rows, Tensor) else repr(rows)
        raise fail(name, was, "an int64 or int32 tensor of shape (B,)")
    if rows.device != like.device:
        raise fail(name, f"on {rows.device}", f"the device of the logits, {like.device}")
    if host_values(rows) and rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= limit):
        raise fail(name, f"{int(rows.min())}..{int(rows.max())}", f"row indices in [0, {limit})")
    return rows.long()


def logits(name: str, x: Any) -> Tensor:
    """A (rows, V) floating tensor with a contiguous last dimension."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} was {type(x).__name__}; allowed: a tensor of shape (B, V)")
    if not dense(x) or x.dim() != 2 or x.shape[1] == 0:
        raise fail(name, shape(x), "(B, V) with V >= 1")
    if not x.dtype.is_floating_point:
        raise fail(name, str(x.dtype), "float32, bfloat16 or float16 (float64 with backend='reference')")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise fail(name, f"strided {tuple(x.stride())}", "a contiguous last dimension; call .contiguous()")
    return x


def operands(
    warm: Tensor,
    base: Tensor | None = None,
    vector: Tensor | None = None,
    direction: str = "kl_gradient",
    warm_rows: Tensor | None = None,
    base_rows: Tensor | None = None,
    vocab_size: int | None = None,
) -> Operands:
    """The rows of a call as backends take them."""
    logits("warm_logits", warm)
    width = warm.shape[1]
    if warm_rows is not None:
        warm_rows = index_rows("warm_rows", warm_rows, warm.shape[0], warm)
    batch = warm.shape[0] if warm_rows is None else warm_rows.shape[0]
    allowed = f"1 to {width}, the width of warm_logits"
    vocab = width if vocab_size is None else integer_value("vocab_size", vocab_size, allowed)
    if not 1 <= vocab <= width:
        raise fail("vocab_size", vocab, allowed)
    if vocab > MAX_VOCAB:
        raise fail("vocab_size", vocab, f"1 to {MAX_VOCAB}")

    if base is None and base_rows is not None:
        base = warm
    if base is not None and vector is not None:
        raise InputError("base_logits and vector were both given; allowed: one of them, or neither")
    choice("direction", direction, DIRECTIONS)
    code = DIRECTIONS[direction] if base is not None else PLAIN if vector is None else VECTOR

    if base is not None:
        if base is not warm:
            logits("base_logits", base)
        if base.shape[1] < vocab or (vocab_size is None and base.shape[1] != width):
            raise fail("base_logits", shape(base), f"the vocabulary of warm_logits, {width}")
        if base.dtype != warm.dtype or base.device != warm.device:
            was, allowed = f"{base.dtype} on {base.device}", f"{warm.dtype} on {warm.device} as warm_logits"
            raise fail("base_logits", was, allowed)
        if base_rows is not None:
            base_rows = index_rows("base_rows", base_rows, base.shape[0], warm)
        if (base.shape[0] if base_rows is None else base_rows.shape[0]) != batch:
            name, given = ("base_logits", base) if base_rows is None else ("base_rows", base_rows)
            raise fail(name, shape(given), f"{batch} rows, as many as the warm rows")
    if vector is not None:
        if not dense(vector) or vector.shape not in ((vocab,), (batch, vocab), (width,), (batch, width)):
            raise fail("vector", shape(vector), f"({width},) or ({batch}, {width})")
        if vector.device != warm.device or not vector.dtype.is_floating_point:
            raise fail("vector", f"{vector.dtype} on {vector.device}", f"a float tensor on {warm.device}")
        vector = vector.float().contiguous()
    return Operands(warm, base, vector, warm_rows, base_rows, vocab, code)


def _shown(number: Any) -> Any:
    """A number for an error message; of an input of a graph being compiled no more is known."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not has_static_value(number):
            return "a number out of range"
    return number


def parameter(
    name: str,
    value: float | Tensor,
    batch: int,
    like: Tensor,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    integer: bool = False,
) -> PerRow:
    """A scalar or a (B,) tensor, finite and in [low, high]."""
    if isinstance(value, Tensor):
        return PerRow(0, _row_parameter(name, value, batch, like, low, high, integer))
    number = (integer_value if integer else float_value)(name, value, "a number or a (B,) tensor")
    if integer and number >= TWO64 >> 1:
        raise fail(name, _shown(value), "an integer below 2**63")
    if not low <= number <= high or not -math.inf < number < math.inf:
        raise fail(name, _shown(value), span(low, high))
    if not integer and not -LARGEST <= number <= LARGEST:
        raise fail(name, _shown(value), f"a number of float32, at most {LARGEST:g}")
    return PerRow(number)


def temperature_value(value: float | Tensor, batch: int, like: Tensor) -> PerRow:
    """As ``parameter``: 0 (greedy), or a number that logits can be divided by."""
    number, rows = parameter("temperature", value, batch, like, 0.0)
    if 0 < number < COLDEST:
        raise fail("temperature", _shown(value), _TEMPERATURES)
    if rows is not None and host_values(rows):
        cold = ((rows > 0) & (rows < COLDEST)).nonzero()[:, 0].tolist()
        if cold:
            raise fail(f"temperature[{cold[0]}]", rows[cold[0]].item(), _TEMPERATURES)
    return PerRow(number, rows)


def _row_parameter(name, value, batch, like, low, high, integer) -> Tensor:
    if dense(value) and value.dim() == 0:
        value = value.expand(batch)
    if not dense(value) or value.shape != (batch,):
        raise fail(name, shape(value), f"a scalar or ({batch},), one a row")
    if value.device != like.device:
        raise fail(name, f"on {value.device}", f"the device of the logits, {like.device}")
    if integer and (value.dtype.is_floating_point or value.is_complex() or value.dtype == torch.bool):
        raise fail(name, str(value.dtype), "an integer tensor")
    if value.is_complex():
        raise fail(name, str(value.dtype), "a real tensor")
    value = value.to(torch.int64 if integer else torch.float32).contiguous()
    if not (low == -math.inf and integer) and host_values(value):
        bad = ~((value >= low) & (value <= high) & torch.isfinite(value))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise fail(f"{name}[{row}]", value[row].item(), span(low, high))
    return value


def _usual(entry: Parameter) -> tuple[Any, float, float]:
    """Type and bounds of the numbers that need no second look."""
    if entry.kind == "int":
        return int, max(entry.low, -(TWO64 >> 1)), min(entry.high, (TWO64 >> 1) - 1)
    low = COLDEST if entry.name == "temperature" else max(entry.low, -LARGEST)
    return float, low, min(entry.high, LARGEST)


_USUAL: dict[str, tuple[Any, float, float]] = {entry.name: _usual(entry) for entry in PARAMETER.values()}


def checked(name: str, value: Any, batch: int, like: Tensor) -> tuple[float, Tensor | None]:
    """A parameter of the table, within the bounds that it has there, as the fields of a :class:`PerRow`."""
    kind, low, high = _USUAL[name]
    if type(value) is kind and low <= value <= high:
        return value, None  # no object for it: this is a good part of what a call costs beside its kernel
    entry = PARAMETER[name]
    if name == "temperature":
        return temperature_value(value, batch, like)
    if name in ("seed", "offset"):
        return word64(name, value, batch, like)
    return parameter(name, value, batch, like, entry.low, entry.high, integer=entry.kind == "int")


def numbers_as_tensors(op: Op, given: dict[str, Any], batch: int, like: Tensor) -> None:
    """Make tensors of the numbers in ``given`` that are inputs of the graph being compiled.

    In a call of the op they would become constants of the graph, which every other value compiles anew.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value

    for name, per_row in op.slots:
        if per_row:
            number, rows = given[name]
            if rows is None and not has_static_value(number):
                given[name] = PerRow(0, filled(number, PARAMETER[name].kind == "int", batch, like))


def filled(number: Any, integer: bool, batch: int, like: Tensor) -> Tensor:
    """A number that a graph being compiled takes in, as (B,) float32 or int64."""
    if not integer:  # a product: the compiler knows how to take its float from a tensor, that of full() not
        return torch.ones(batch, dtype=torch.float32, device=like.device) * number
    if number < 0:  # perhaps of a seed from 2**63 on, a number that generated code has no integer type for
        return torch.ops.svdk.word_per_row(like, number, batch)
    return torch.full((batch,), number, dtype=torch.int64, device=like.device)


def span(low: float, high: float) -> str:
    """An interval of numbers in words."""
    if low == -math.inf and high == math.inf:
        return "a finite number"
    return f"a number >= {low:g}" if high == math.inf else f"a number in [{low:g}, {high:g}]"


def word64(name: str, value: int | Tensor, batch: int, like: Tensor) -> PerRow:
    """A seed or offset: 64 bits, passed on as a signed int64."""
    if isinstance(value, Tensor):
        return PerRow(0, _row_parameter(name, value, batch, like, -math.inf, math.inf, True))
    number = integer_value(name, value, "a 64-bit integer or a (B,) tensor of them")
    if not -(TWO64 >> 1) <= number < TWO64:
        raise fail(name, _shown(number), "a 64-bit integer")
    return PerRow(number - TWO64 if number >= TWO64 >> 1 else number)


def label_ids(labels: Tensor | None, batch: int, vocab: int, like: Tensor) -> Tensor:
    """int64 (B,) labels inside the vocabulary."""
    if not isinstance(labels, Tensor) or labels.shape != (batch,):
        was = shape(labels) if isinstance(labels, Tensor) else repr(labels)
        raise fail("labels", was, f"an integer tensor of shape ({batch},)")
    return index_rows("labels", labels, vocab, like).contiguous()


def penalty_value(penalty: float) -> float:
    """lambda: finite or -inf."""
    number = float_value("penalty", penalty, "a finite number or -inf")
    if not number < math.inf:  # nor is NaN
        raise fail("penalty", penalty, "a finite number or -inf")
    if number != -math.inf and not -LARGEST <= number <= LARGEST:
        raise fail("penalty", penalty, f"-inf or a number of float32, at most {LARGEST:g}")
    return number


def logit_bias(bias: Tensor | None, rows: Operands) -> Tensor | None:
    """What is added to a call's logits, (V,) or (B, V) float32."""
    if bias is None:
        return None
    width, batch, like = rows.warm.shape[1], rows.batch, rows.warm
    if not dense(bias) or bias.shape not in ((width,), (batch, width), (rows.vocab,), (batch, rows.vocab)):
        raise fail("logit_bias", shape(bias), f"({width},) or ({batch}, {width})")
    if bias.dtype != torch.float32 or bias.device != like.device:
        raise fail("logit_bias", f"{bias.dtype} on {bias.device}", f"torch.float32 on {like.device}")
    return bias if bias.stride(-1) == 1 else bias.contiguous()


def token_bitmask(bitmask: Tensor | None, rows: Operands) -> Tensor | None:
    """Which tokens of a call are allowed, int32 (B, ceil(V / 32) or more): bit i % 32 of word i // 32."""
    if bitmask is None:
        return None
    batch, words, like = rows.batch, -(-rows.vocab // 32), rows.warm
    if not dense(bitmask) or bitmask.dim() != 2 or bitmask.shape[0] != batch or bitmask.shape[1] < words:
        raise fail("bitmask", shape(bitmask), f"({batch}, {words}) or wider, a bit a token")
    if bitmask.dtype != torch.int32 or bitmask.device != like.device:
        raise fail("bitmask", f"{bitmask.dtype} on {bitmask.device}", f"torch.int32 on {like.device}")
    return bitmask if bitmask.stride(1) == 1 else bitmask.contiguous()


def skipped_rows(skip: Tensor | None, batch: int, like: Tensor) -> Tensor | None:
    """The rows to be left alone, bool (B,)."""
    if skip is None:
        return None
    if not dense(skip) or skip.shape != (batch,) or skip.dtype != torch.bool:
        was = f"{shape(skip)}, {skip.dtype}" if isinstance(skip, Tensor) else repr(skip)
        raise fail("skip", was, f"a bool tensor of shape ({batch},)")
    if skip.device != like.device:
        raise fail("skip", f"on {skip.device}", f"the device of the logits, {like.device}")
    return skip.contiguous()


def logits_out(out: Tensor | None, rows: Operands, given: Mapping[str, Any]) -> Tensor:
    """Where a call's (B, V) logits go: ``out`` as far as it can be written row by row, or a new float32."""
    warm = rows.warm
    wanted = (batch_of(rows), warm.shape[1])
    if out is None:
        like = warm
        if not torch.compiler.is_compiling():  # if anything differs between vmap's calls, the result does
            like = next(iter(batches(STEERED_LOGITS.flatten(rows, {**given, "out": None}))), warm)
        return like.new_empty(wanted, dtype=torch.float32)
    if not dense(out) or out.shape != wanted:
        raise fail("out", shape(out), f"{wanted}, as wide as warm_logits")
    if out.dtype not in (torch.float32, warm.dtype) or out.device != warm.device:
        allowed = f"float32 or the dtype of warm_logits, {warm.dtype}, on {warm.device}"
        raise fail("out", f"{out.dtype} on {out.device}", allowed)
    if (out.stride(1) != 1 and out.shape[1] > 1) or (out.stride(0) < out.shape[1] and out.shape[0] > 1):
        raise fail("out", f"strided {tuple(out.stride())}", "contiguous rows that do not overlap")
    operands = [x for x in (out, warm, rows.base, rows.vector) if x is not None]
    if torch.compiler.is_compiling() or not all(map(has_data, operands)):
        return out  # the graph gives the op memory of its own
    in_place = rows.warm_rows is None and out.data_ptr() == warm.data_ptr()
    in_place = in_place and (out.stride(), out.dtype) == (warm.stride(), warm.dtype)
    read = {"warm_logits": None if in_place else warm, "base_logits": rows.base, "vector": rows.vector}
    for name, x in read.items():
        if x is not None and _overlap(out, x):
            allowed = (
                "memory of its own, or that of warm_logits, whole and in order, if nothing else is there"
            )
            raise fail("out", f"in the memory of {name}", allowed)
    return out


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the first and last bytes of two tensors enclose memory that both have."""
    (a_from, a_to), (b_from, b_to) = map(_span, (a, b))
    return a_from < b_to and b_from < a_to


def _span(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() * (x.numel() > 0)
