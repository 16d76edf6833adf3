"""The four operations: check the arguments, pick a backend, call it, wrap what comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from svdk.errors import InvalidLogitsError
from svdk.ops import arguments, backends, gradients
from svdk.ops.results import LogprobInfo, SampleInfo, Status, SteeringBatch
from svdk.ops.schema import (
    CONSTANT,
    EXTRACT,
    KL_BUDGET,
    LABEL,
    PLAIN,
    STEERED_LOGITS,
    STEERED_LOGPROB,
    STEERED_SAMPLE,
    STRENGTH_MODES,
    Op,
    Operands,
    batch_of,
)
from svdk.ops.seeds import row_keys

_WITHOUT_LABELS = tuple(name for name, mode in STRENGTH_MODES.items() if mode != LABEL)
_PER_ROW = tuple(p.name for p in STEERED_SAMPLE.parameters if p.kind != "scalar" and p.name != "seed")


def _flat(function: Any, op: Op, rows: Operands, given: dict[str, Any]) -> list[Any]:
    """The arguments that a backend's ``op`` is called with, from those that were checked."""
    compiling = torch.compiler.is_compiling()
    if compiling:
        arguments.numbers_as_tensors(op, given, batch_of(rows), rows.warm)
    flat = op.flatten(rows, given)
    if not compiling and not isinstance(function, torch._ops.OpOverloadPacket):
        arguments.refuse_batches(flat)
    return flat


def _raise_invalid(status: Tensor) -> None:
    if not torch.compiler.is_compiling() and not arguments.has_data(status):
        raise arguments.fail("check", "True", "False while tracing and under torch.func: there are no values")
    rows = (status & int(Status.INVALID)).nonzero()[:, 0].tolist()
    if rows:
        shown = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
        raise InvalidLogitsError(
            f"rows {shown}: the logits (biased and masked) were NaN, +inf or nowhere finite (or a per-row "
            "parameter was out of range); allowed: finite values and -inf, at least one finite warm logit"
        )


def _check_mode(mode: int, values: Mapping[str, Any], rows: Operands) -> None:
    """Refuse a strength mode, or a strength, that does not fit the rest of the call."""
    if mode != CONSTANT and rows.direction == PLAIN:
        name = repr(values["strength_mode"])
        raise arguments.fail("strength_mode", name, "'constant' without base_logits or vector")
    if mode == KL_BUDGET:
        arguments.parameter("strength", values["strength"], batch_of(rows), rows.warm, 0.0)


def steered_sample(
    warm_logits: Tensor,
    base_logits: Tensor | None = None,
    *,
    vector: Tensor | None = None,
    logit_bias: Tensor | None = None,
    bitmask: Tensor | None = None,
    strength: float | Tensor = 1.0,
    strength_mode: str = "constant",
    labels: Tensor | None = None,
    direction: str = "kl_gradient",
    alpha: float | Tensor = 0.1,
    penalty: float = -math.inf,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    warm_rows: Tensor | None = None,
    base_rows: Tensor | None = None,
    vocab_size: int | None = None,
    check: bool = False,
    return_info: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, SampleInfo]:
    """Sample one token a row from steered logits, in one pass over the logits.

    With ``p = softmax(z_w)``, ``q = softmax(z_b)``, ``r = log p - log q`` and ``K = sum p r`` the steering
    vector is ``delta = p (r - K)`` (``kl_gradient``, SVDecode, arXiv 2509.15888) or ``r - K``
    (``log_ratio``); on the confidence set ``C = {p >= alpha max p}`` the logits become ``z_w + mu delta``,
    outside ``z_w + mu penalty`` (never drawn when ``penalty`` is -inf). Then, as in transformers:
    temperature, top-k, top-p, min-p, sample.

    Args:
        warm_logits: ``(B, V)``, or any number of rows with ``warm_rows``; float32, bfloat16 or float16,
            last dimension contiguous.
        base_logits: ``(B, V)``, or rows picked by ``base_rows`` (of ``warm_logits`` itself if this is None).
            Without it and without ``vector`` this is a plain sampler: no mask, no steering.
        vector: ``(V,)`` or ``(B, V)`` steering vector to use instead of a base model.
        logit_bias: float32 ``(V,)`` or ``(B, V)``, added in float32 to the warm and to the base logits (not
            to a vector) before anything else; -inf forbids a token, a sum that is NaN or +inf makes its row
            INVALID. It goes by the rows of the result, as parameters do, not by ``warm_rows``.
        bitmask: int32 ``(B, ceil(V / 32))`` or wider, as xgrammar and llguidance make them: token i is
            allowed where bit ``i % 32`` of word ``i // 32`` is 1. The others count as -inf in both models,
            whatever their logits are; a row with nothing allowed is INVALID. Strength, C, filters and the
            log-probabilities of :class:`SampleInfo` are those of the biased, masked rows.
        strength: mu, or the KL budget in nats for ``strength_mode="kl_budget"``; scalar or ``(B,)``.
        strength_mode: ``"constant"``; ``"label"``: mu = g / (||delta||^2 + 1e-12) for ``labels``;
            ``"kl_budget"``: mu = sqrt(2 kappa / Var_p(delta)).
        labels: int64 ``(B,)``, for ``"label"`` only.
        direction: ``"kl_gradient"`` or ``"log_ratio"``; ignored with ``vector``.
        alpha: threshold of C in [0, 1]; 0 keeps every token.
        penalty: lambda, finite or -inf.
        temperature: >= 0; 0 is greedy (ties: lowest id).
        top_k: 0 is off. Ties with the k-th stay, as in transformers.
        top_p: in [0, 1]; 1 is off. The most likely token always stays.
        min_p: in [0, 1]; 0 is off.
        seed: 64-bit Philox key; scalar or ``(B,)``. Rows of one scalar draw different noise, as in
            ``generate``: row r has the key ``seed + r * 0x9E3779B97F4A7C15`` modulo 2**64.
        offset: 64-bit Philox counter, the step; scalar or ``(B,)``. The same key and offset give the same
            token in every backend, whatever the batch around the row is.
        warm_rows: int64 ``(B,)`` rows of ``warm_logits`` to use.
        base_rows: int64 ``(B,)`` rows of ``base_logits`` to use.
        vocab_size: use only the first ``vocab_size`` columns (padded vocabularies).
        check: synchronise and raise on rows with NaN, +inf or nothing finite. Without it such a row gets
            the argmax over its finite warm logits, biased and masked (0 if there is none) and status INVALID.
        return_info: also return a :class:`SampleInfo`.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        int64 tokens ``(B,)``, with ``return_info`` also a :class:`SampleInfo`.

    Raises:
        InputError: an argument of the wrong shape, dtype, device or value.
        InvalidLogitsError: with ``check``, naming the rows.
        BackendError: the named backend cannot run.
    """
    rows = arguments.operands(warm_logits, base_logits, vector, direction, warm_rows, base_rows, vocab_size)
    values = {
        "logit_bias": logit_bias,
        "bitmask": bitmask,
        "strength": strength,
        "strength_mode": strength_mode,
        "labels": labels,
        "alpha": alpha,
        "penalty": penalty,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "offset": offset,
    }
    token, info = sample(rows, values, check=check, return_info=return_info, backend=backend)
    return token if info is None else (token, info)


def sample(
    rows: Operands,
    values: Mapping[str, Any],
    *,
    check: bool = False,
    return_info: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SampleInfo | None]:
    """:func:`steered_sample` for the operands of a call and its other arguments by name."""
    warm, batch, labels = rows.warm, batch_of(rows), values.get("labels")
    mode = STRENGTH_MODES[arguments.choice("strength_mode", values["strength_mode"], STRENGTH_MODES)]
    _check_mode(mode, values, rows)
    if mode == LABEL:
        labels = arguments.label_ids(labels, batch, rows.vocab, warm)
        values = {**values, "strength": 0.0}  # it follows from the label
    elif labels is not None:
        raise arguments.fail("labels", "given", "None unless strength_mode='label'")
    given: dict[str, Any] = {name: arguments.checked(name, values[name], batch, warm) for name in _PER_ROW}
    given["seed"] = row_keys(values["seed"], batch, warm)
    given["labels"], given["strength_mode"] = labels, mode
    given["logit_bias"] = arguments.logit_bias(values.get("logit_bias"), rows)
    given["bitmask"] = arguments.token_bitmask(values.get("bitmask"), rows)
    given["penalty"] = arguments.penalty_value(values["penalty"])
    given["info"] = return_info or check
    op = backends.resolve(backend, warm).steered_sample
    token, floats, ints = gradients.without(op, _flat(op, STEERED_SAMPLE, rows, given))
    if check:
        _raise_invalid(ints[1])
    return token, SampleInfo(*floats.unbind(0), *ints.unbind(0)) if return_info else None


def steered_logprob(
    warm_logits: Tensor,
    base_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    strength: float | Tensor = 1.0,
    strengths: Tensor | None = None,
    vector: Tensor | None = None,
    direction: str = "kl_gradient",
    alpha: float | Tensor = 0.1,
    penalty: float = 0.0,
    warm_rows: Tensor | None = None,
    base_rows: Tensor | None = None,
    vocab_size: int | None = None,
    check: bool = False,
    backend: str = "auto",
) -> LogprobInfo:
    """Log-probability of labels under steered logits, with what calibration needs, in one call.

    ``A(mu) = log sum p exp(mu delta)`` and its first two derivatives come with it (source: design
    section 2, the exact step-size theory of SVDecode, arXiv 2509.15888).

    ``logprob`` can be differentiated once, forwards or backwards, in the logits, the vector and the
    strengths; the confidence set is held fixed. Nothing else that svdk returns has a gradient or claims one.

    Args:
        labels: int64 ``(B,)``, each inside the vocabulary.
        strength: mu; scalar or ``(B,)``. Results have shape ``(B,)``.
        strengths: float ``(M,)`` grid of mu used for every row instead; results have shape ``(B, M)``.
        penalty: lambda outside C; 0 by default, so that a label outside C keeps a finite probability.
        warm_logits, base_logits, vector, direction, alpha, warm_rows, base_rows, vocab_size, check, backend:
            as in :func:`steered_sample`.

    Raises:
        InputError, InvalidLogitsError, BackendError: as :func:`steered_sample`.
    """
    rows = arguments.operands(warm_logits, base_logits, vector, direction, warm_rows, base_rows, vocab_size)
    warm, batch = rows.warm, batch_of(rows)
    labels = arguments.label_ids(labels, batch, rows.vocab, warm)
    if strengths is not None:
        if not arguments.dense(strengths) or strengths.dim() != 1 or strengths.device != warm.device:
            raise arguments.fail("strengths", arguments.shape(strengths), f"a (M,) tensor on {warm.device}")
        strengths = arguments.parameter("strengths", strengths, strengths.shape[0], warm).rows
    given = {
        "labels": labels,
        "strength": arguments.checked("strength", strength, batch, warm),
        "alpha": arguments.checked("alpha", alpha if rows.direction != PLAIN else 0.0, batch, warm),
        "penalty": arguments.penalty_value(penalty),
        "strengths": strengths,
    }
    op = backends.resolve(backend, warm).steered_logprob
    curves, greedy, stats, status = gradients.logprob(op, _flat(op, STEERED_LOGPROB, rows, given))
    if check:
        _raise_invalid(status)
    if strengths is None:
        logprob, slope, curvature = curves
        curves, greedy = (logprob[:, 0], slope[:, 0], curvature[:, 0]), greedy[:, 0]
    fields = (*curves, greedy, *stats.unbind(0), status)
    return LogprobInfo(*fields)


def extract(
    warm_logits: Tensor,
    base_logits: Tensor | None = None,
    *,
    vector: Tensor | None = None,
    direction: str = "kl_gradient",
    alpha: float | Tensor = 0.1,
    warm_rows: Tensor | None = None,
    base_rows: Tensor | None = None,
    vocab_size: int | None = None,
    check: bool = False,
    backend: str = "auto",
) -> SteeringBatch:
    """The steering vectors of a batch, restricted to C, as a ragged sparse batch.

    Arguments and errors as in :func:`steered_sample`; ``base_logits`` (or ``base_rows``) or ``vector``
    is needed. With ``alpha=0`` every finite token is an entry: B * V of them.
    """
    rows = arguments.operands(warm_logits, base_logits, vector, direction, warm_rows, base_rows, vocab_size)
    if rows.direction == PLAIN:
        raise arguments.fail("base_logits", "None", "(B, V) logits, base_rows, or a vector")
    given = {"alpha": arguments.checked("alpha", alpha, batch_of(rows), rows.warm)}
    op = backends.resolve(backend, rows.warm).extract
    try:
        row_ptr, ids, p, delta, stats, status = gradients.without(op, _flat(op, EXTRACT, rows, given))
    except DynamicOutputShapeException:
        allowed = "one whose mode has a shape_env, as the number of entries depends on the logits"
        raise arguments.fail("warm_logits", "a fake tensor", allowed) from None
    if check:
        _raise_invalid(status)
    kl, max_logit, lse = stats.unbind(0)
    return SteeringBatch(row_ptr, ids, p, delta, kl, max_logit, lse, status)


def steered_logits(
    warm_logits: Tensor,
    base_logits: Tensor | None = None,
    *,
    vector: Tensor | None = None,
    strength: float | Tensor = 1.0,
    strength_mode: str = "constant",
    direction: str = "kl_gradient",
    alpha: float | Tensor = 0.1,
    penalty: float = -math.inf,
    skip: Tensor | None = None,
    out: Tensor | None = None,
    warm_rows: Tensor | None = None,
    base_rows: Tensor | None = None,
    vocab_size: int | None = None,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The whole rows of steered logits that :func:`steered_sample` draws from, without a synchronisation.

    For logits processors, serving engines and analysis: decoding with svdk never needs these rows. As there,
    a ``penalty`` of -inf takes the tokens outside C out whatever the strength is, 0 too: ``skip`` is for rows
    that are to stay as they are. With a finite penalty, or alpha 0, strength 0 gives the warm logits.

    Args:
        skip: bool ``(B,)``: these rows are copied; their base row is not looked at, NaN in them is no error.
        out: ``(B, V)`` to write to, of ``warm_logits``' width and device, float32 or its dtype, last
            dimension contiguous. It may be ``warm_logits`` itself, if that is neither picked by ``warm_rows``
            nor holds the base rows; any other overlap with an operand is refused. None: a new float32 tensor.
        strength_mode: ``"constant"`` or ``"kl_budget"``.
        warm_logits, base_logits, vector, strength, direction, alpha, penalty, warm_rows, base_rows,
            vocab_size, check, backend: as in :func:`steered_sample`. Without base and vector the valid rows
            are copied.

    Returns:
        ``out``: -inf at what cannot be drawn and from ``vocab_size`` on. Finite values stay within the range
        of its dtype. A row with NaN, +inf or nothing finite is NaN.

    Raises:
        InputError, InvalidLogitsError, BackendError: as :func:`steered_sample`.
    """
    rows = arguments.operands(warm_logits, base_logits, vector, direction, warm_rows, base_rows, vocab_size)
    warm, batch = rows.warm, batch_of(rows)
    mode = STRENGTH_MODES[arguments.choice("strength_mode", strength_mode, _WITHOUT_LABELS)]
    _check_mode(mode, {"strength_mode": strength_mode, "strength": strength}, rows)
    given: dict[str, Any] = {
        "strength_mode": mode,
        "strength": arguments.checked("strength", strength, batch, warm),
        "alpha": arguments.checked("alpha", alpha, batch, warm),
        "penalty": arguments.penalty_value(penalty),
        "skip": arguments.skipped_rows(skip, batch, warm),
    }
    op = backends.resolve(backend, warm).steered_logits
    given["out"] = arguments.logits_out(out, rows, given)
    status = gradients.without(op, _flat(op, STEERED_LOGITS, rows, given))
    if check:
        _raise_invalid(status)
    return given["out"]


__all__ = ["extract", "steered_logits", "steered_logprob", "steered_sample"]
