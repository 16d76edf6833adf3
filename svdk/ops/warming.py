"""Running every variant of a kernel before serving begins, so that nothing compiles or loads amid it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svdk.errors import InputError
from svdk.ops.api import steered_logits, steered_logprob, steered_sample

OPS = (steered_sample, steered_logits, steered_logprob)
_BY_ROW = {"labels", "skip", "warm_rows", "base_rows", "strength", "alpha", "temperature"}
_BY_ROW |= {"top_k", "top_p", "min_p", "seed", "offset"}
_TABLES = ("vector", "logit_bias", "bitmask", "out")


def warm_up(
    op: Callable[..., Any], warm_logits: Tensor, base_logits: Tensor | None = None, **options: Any
) -> tuple[int, ...]:
    """Run ``op`` as its largest step will be, then with fewer rows, so that all batches up to that are ready.

    A first call compiles (Triton) or loads (CUDA) its kernel, which takes seconds and must not happen while a
    graph is captured. Which kernel that is depends on the dtype and layout of the logits, on which options
    are tensors, and for Triton on the number of rows by powers of two. Call this once for each kind of step,
    with the tensors of the real one; the values in them do not matter.

    Args:
        op: ``svdk.steered_sample``, ``svdk.steered_logits`` or ``svdk.steered_logprob``.
        warm_logits: ``(B, V)``, of the largest batch B; or any number of rows with ``warm_rows`` ``(B,)``.
        base_logits: ``(B, V)``, or rows picked by ``base_rows``; as for ``op``.
        options: the other arguments of ``op``. Tensors with one entry or row a row of the batch are cut to
            fewer rows; everything else is passed on as it is. A tensor ``out`` is written to.

    Returns:
        The batches that were run: B, and every power of two below it, from the largest to 1.

    Raises:
        InputError: for another ``op``, or what ``op`` raises itself.
        BackendError: the backend cannot run.
    """
    if op not in OPS:
        allowed = ", ".join(f"svdk.{known.__name__}" for known in OPS)
        raise InputError(f"op was {op!r}; allowed: {allowed}")
    warm_rows, base_rows = options.get("warm_rows"), options.get("base_rows")
    most = len(warm_logits) if warm_rows is None else len(warm_rows)
    batches = (most, *(1 << n for n in reversed(range(max(most - 1, 0).bit_length()))))

    def cut(name: str, value: Any, rows: int) -> Any:
        of_rows = isinstance(value, Tensor) and (
            (name in _BY_ROW and value.dim() == 1) or (name in _TABLES and value.dim() == 2)
        )
        return value[:rows] if of_rows else value

    for rows in batches:
        warm = warm_logits if warm_rows is not None else warm_logits[:rows]
        base = base_logits if base_logits is None or base_rows is not None else base_logits[:rows]
        op(warm, base, **{name: cut(name, value, rows) for name, value in options.items()})
    if warm_logits.device.type == "cuda":
        torch.cuda.synchronize(warm_logits.device)
    return batches
