"""FlashInfer's sampling functions by name and argument, on svdk's kernels, on the CPU as well.

``import svdk.sampling as sampling`` in place of ``from flashinfer import sampling``: the same distributions
and return types. What FlashInfer's module has (read in 0.6.18), and what is different here:

- ``softmax``: a temperature of 0 is the argmax; numbers between 0 and 1e-30 are refused, as everywhere in
  svdk. A row with NaN or +inf, or all -inf, is NaN throughout.
- ``sampling_from_logits``, ``sampling_from_probs``, ``top_p_sampling_from_probs``,
  ``top_k_sampling_from_probs``, ``min_p_sampling_from_probs``, ``top_k_top_p_sampling_from_logits``,
  ``top_k_top_p_sampling_from_probs``: tokens for a given seed differ from FlashInfer's (other uniforms).
  ``top_k`` 0 and ``top_p`` 1 are off, ``top_p`` 0 is the argmax. ``top_p`` is a share of what the row (or its
  top-k) sums to; FlashInfer takes it as it is. A token that ties with the k-th stays; of tokens that tie at
  top-p's boundary the lower ids stay, where FlashInfer keeps all.
- ``top_p_renorm_probs``, ``top_k_renorm_probs``, ``top_k_mask_logits``: what they keep is exactly what the
  sampler of that name may draw. A row of zeros stays zeros; one with NaN (or a negative or infinite
  probability) comes back as NaN throughout, of logits as what it kept and its NaN; FlashInfer says nothing
  of such rows. ``top_p_renorm_prob`` and
  ``top_k_renorm_prob`` are other names.
- ``chain_speculative_sampling``: each position has one uniform number, for both counts; FlashInfer draws the
  rejected one's a second time for the count of accepted tokens. See there for rows without a distribution.
- ``get_seed_and_offset``: a CPU generator gives a fresh seed and offset 0; the offset is the one before the
  increment.
- ``get_sampling_module``: not here, it compiles FlashInfer's kernels; :func:`svdk.backends.status` says what
  svdk runs on. ``flashinfer.top_k`` and its kind are not part of that module: ``torch.topk``.

Everywhere:

- ``indices`` (B,) are the rows of ``probs`` to draw from. A parameter's tensor belongs to ``probs`` (N, V):
  it has one entry a row, (N,), and an output uses that of its own row, ``top_p[indices[i]]``. (FlashInfer
  checks that length everywhere, but reads ``top_k`` and ``min_p`` by output in two kernels: its issue 5339.)
- ``seed`` and ``offset`` belong to the outputs: a number, (1,) or (B,), each by itself. A (B,) tensor of
  seeds gives every output its own stream: its token depends on its own seed, offset and row, not on the rows
  around it. A single seed is spread over the outputs, so that they draw independently. If either is None,
  both come from ``generator`` or torch's own.
- A row without a distribution (NaN, +inf, nothing above zero) draws its argmax, 0 if there is none;
  ``return_valid`` says so.
- Everything is deterministic: ``deterministic``, ``is_deterministic`` and ``enable_pdl`` change nothing.
- Every bad argument is an :class:`svdk.InputError`, a ``ValueError``. Parameters in tensors on a device are
  not looked at: a row whose parameter is out of range is one without a distribution.

Sources: the public interface of flashinfer.sampling; see there for each argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdk.errors import InputError
from svdk.ops import api, arguments
from svdk.ops.configs import SamplingConfig, SteeringConfig
from svdk.ops.probabilities import (
    cut,
    filtered,
    log_of,
    marked,
    normalised,
    outside_top_k,
    outside_top_p,
    probabilities,
)
from svdk.ops.results import Status
from svdk.ops.schema import PerRow
from svdk.ops.seeds import get_seed_and_offset, row_words
from svdk.ops.speculative import chain_speculative_sampling
from svdk.utils.checks import fail

ORDERS = ("top_k_first", "joint")

Samples = Tensor | tuple[Tensor, Tensor]

__all__ = [
    "chain_speculative_sampling",
    "get_seed_and_offset",
    "min_p_sampling_from_probs",
    "sampling_from_logits",
    "sampling_from_probs",
    "softmax",
    "top_k_mask_logits",
    "top_k_renorm_prob",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_prob",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]


def softmax(
    logits: Tensor, temperature: Tensor | float | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """Probabilities float32 (B, V) of logits over a temperature, a number or (B,); 0 gives the argmax.

    A temperature above 0 is at least 1e-30.
    """
    arguments.logits("logits", logits)
    x = logits.float()
    if temperature is None:
        return x.softmax(-1)
    number, rows = arguments.temperature_value(temperature, x.shape[0], x)
    t = x.new_full((1, 1), number) if rows is None else rows[:, None]
    best = torch.zeros_like(x, dtype=torch.bool).scatter(1, x.argmax(1, keepdim=True), True)
    x = x - x.amax(1, keepdim=True)  # first: the quotients of two great logits would both be infinite
    return (x.where((t > 0) | best, -torch.inf) / t.where(t > 0, 1.0)).softmax(-1)


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """One token a row of ``softmax(logits)``: int32 (B,), or like ``indices`` (B,), the rows to draw from."""
    _check_logits(logits, check_nan)
    return _draw(logits, indices, generator, seed, offset)


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """One token a row of ``probs``; ``return_valid`` adds bool (B,): the row is not all zero, and no NaN."""
    return _draw_probs(probs, indices, generator, check_nan, seed, offset, return_valid)


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """As :func:`sampling_from_probs`, from the fewest tokens that hold ``top_p``, a number or (B,)."""
    return _draw_probs(probs, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p)


def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """As :func:`sampling_from_probs`, from the ``top_k`` likeliest tokens, an integer or (B,)."""
    return _draw_probs(probs, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k)


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """As :func:`sampling_from_probs`, from tokens at least ``min_p`` times as likely as the likeliest."""
    return _draw_probs(probs, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p)


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """Both filters: "top_k_first" takes top-p of the renormalised top-k; "joint" takes what both keep."""
    order = arguments.choice("filter_apply_order", filter_apply_order, ORDERS)
    _check_logits(logits, check_nan)
    cuts: dict[str, Any] = {"top_k": cut("top_k", top_k, logits), "top_p": cut("top_p", top_p, logits)}
    if order == "joint":
        logits = marked(logits, **cuts)
        outside = outside_top_k(logits, cuts["top_k"])
        outside |= outside_top_p(logits.float().softmax(-1), cuts["top_p"])
        logits, cuts = logits.masked_fill(outside, -torch.inf), {}
    return _draw(logits, indices, generator, seed, offset, **cuts)


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """As :func:`top_k_top_p_sampling_from_logits`, from probabilities."""
    joint = arguments.choice("filter_apply_order", filter_apply_order, ORDERS) == "joint"
    cuts = {"top_k": top_k, "top_p": top_p}
    return _draw_probs(probs, indices, generator, check_nan, seed, offset, return_valid, joint, **cuts)


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    """``probs`` (N, V) without what top-p cuts, normalised; float32. Ties: the lower id stays first."""
    p = probabilities("probs", probs)
    return normalised(filtered(p, top_p=cut("top_p", top_p, p)))


def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int, is_deterministic: bool = False) -> Tensor:
    """``probs`` (N, V) without all but the ``top_k`` likeliest, normalised, in the same dtype. Ties stay."""
    p = probabilities("probs", probs)
    return normalised(filtered(p, top_k=cut("top_k", top_k, p))).to(probs.dtype)


def top_k_mask_logits(logits: Tensor, top_k: Tensor | int) -> Tensor:
    """``logits`` (N, V) with -inf for all but the ``top_k`` greatest, in the same dtype. Ties stay."""
    arguments.logits("logits", logits)
    cuts = {"top_k": cut("top_k", top_k, logits)}
    x = marked(logits, **cuts)
    return x.masked_fill(outside_top_k(x, **cuts), -torch.inf)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


def _draw_probs(
    probs: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    return_valid: bool,
    joint: bool = False,
    **cuts: Any,
) -> Any:
    """A draw from probabilities after ``cuts``, by logits: those of cut tokens are -inf."""
    p = probabilities("probs", probs)
    _refuse_nan("probs", probs, check_nan)
    left = filtered(p, joint=joint, **{name: cut(name, value, p) for name, value in cuts.items()})
    return _draw(log_of(left), indices, generator, seed, offset, return_valid)


def _draw(
    logits: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    return_valid: bool = False,
    **cuts: PerRow,
) -> Any:
    """A draw from checked logits; the kernel makes the ``cuts``."""
    places = None if indices is None else arguments.index_rows("indices", indices, len(logits), logits)
    outputs = len(logits) if places is None else len(places)
    filters: dict[str, Any] = {}
    for name, (number, rows) in cuts.items():
        filters[name] = number if rows is None else rows if places is None else rows[places]
    seeds, offset = row_words(seed, offset, outputs, generator, logits)
    values = SteeringConfig().values() | SamplingConfig(**filters).values()
    values |= {"seed": seeds, "offset": offset}
    token, info = api.sample(arguments.operands(logits, warm_rows=places), values, return_info=return_valid)
    token = token.to(torch.int32 if indices is None else indices.dtype)
    return token if info is None else (token, (info.status & int(Status.INVALID)) == 0)


def _check_logits(logits: Tensor, check_nan: bool) -> None:
    """``InputError`` unless a kernel takes these."""
    if arguments.logits("logits", logits).dtype not in arguments.LOGIT_DTYPES:
        raise fail("logits", logits.dtype, "float32, bfloat16 or float16")
    _refuse_nan("logits", logits, check_nan)


def _refuse_nan(name: str, x: Tensor, check: bool) -> None:
    if check and bool(x.isnan().any()):
        raise InputError(f"{name} held NaN; allowed: no NaN with check_nan=True")
