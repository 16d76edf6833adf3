"""FlashInfer's sampling functions by name and argument, on svdk's kernels, on the CPU as well.

``import svdk.sampling as sampling`` in place of ``from flashinfer import sampling``: the same distributions
and return types. Tokens for a given seed differ from FlashInfer's (other uniforms), and

- a (B,) tensor of seeds gives every row its own stream: its token depends on its own seed, offset and
  logits, not on the rows around it. A single seed (or none: it then comes from ``generator`` or torch's
  own) is spread over the rows, so that they draw independently;
- everything is deterministic: ``deterministic``, ``is_deterministic`` and ``enable_pdl`` change nothing;
- ``top_k`` 0 and ``top_p`` 1 are off.

Sources: the public interface of flashinfer.sampling; see there for each argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdk.errors import InputError
from svdk.ops import api, arguments
from svdk.ops.configs import SamplingConfig, SteeringConfig
from svdk.ops.results import Status

ORDERS = ("top_k_first", "joint")

Samples = Tensor | tuple[Tensor, Tensor]


def softmax(
    logits: Tensor, temperature: Tensor | float | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """Probabilities float32 (B, V) of logits over a temperature, a number or (B,); 0 gives the argmax."""
    arguments.logits("logits", logits)
    x = logits.float()
    if temperature is None:
        return x.softmax(-1)
    number, rows = arguments.parameter("temperature", temperature, x.shape[0], x, 0.0)
    t = torch.full_like(x[:, 0], number) if rows is None else rows
    greedy = torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0)
    t = t[:, None]
    return torch.where(t == 0, greedy, (x / torch.where(t == 0, 1.0, t)).softmax(-1))


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
    return _draw(logits, indices, generator, check_nan, seed, offset)


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
    return _draw(_log(probs, check_nan), indices, generator, False, seed, offset, return_valid)


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
    return _draw(_log(probs, check_nan), indices, generator, False, seed, offset, return_valid, top_p=top_p)


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
    return _draw(_log(probs, check_nan), indices, generator, False, seed, offset, return_valid, top_k=top_k)


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
    return _draw(_log(probs, check_nan), indices, generator, False, seed, offset, return_valid, min_p=min_p)


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
    if arguments.choice("filter_apply_order", filter_apply_order, ORDERS) == "joint":
        _refuse_nan("logits", logits, check_nan)
        logits, check_nan, indices = _top_p_only(logits.float().softmax(-1), top_p, indices)
        top_p = 1.0
    return _draw(logits, indices, generator, check_nan, seed, offset, top_k=top_k, top_p=top_p)


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
    logits = _log(probs, check_nan)
    if arguments.choice("filter_apply_order", filter_apply_order, ORDERS) == "joint":
        logits, _, indices = _top_p_only(probs, top_p, indices)
        top_p = 1.0
    return _draw(logits, indices, generator, False, seed, offset, return_valid, top_k=top_k, top_p=top_p)


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    """``probs`` (B, V) without what top-p cuts, normalised; float32. Ties: the lower id stays first."""
    arguments.logits("probs", probs)
    p = probs.float()
    number, rows = arguments.parameter("top_p", top_p, p.shape[0], p, 0.0, 1.0)
    limit = torch.full_like(p[:, 0], number) if rows is None else rows
    order = p.sort(dim=1, descending=True, stable=True)
    share = order.values.double() / order.values.double().sum(1, keepdim=True)
    before = share.cumsum(1) - share
    keep = (before < limit[:, None]) | (limit[:, None] >= 1)
    keep[:, 0] = True
    return _normalised(torch.where(torch.zeros_like(keep).scatter(1, order.indices, keep), p, 0.0))


def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int, is_deterministic: bool = False) -> Tensor:
    """``probs`` (B, V) without all but the ``top_k`` likeliest, normalised, in the same dtype. Ties stay."""
    arguments.logits("probs", probs)
    return _normalised(torch.where(_in_top_k(probs, top_k), probs.float(), 0.0)).to(probs.dtype)


def top_k_mask_logits(logits: Tensor, top_k: Tensor | int) -> Tensor:
    """``logits`` (B, V) with -inf for all but the ``top_k`` greatest, in the same dtype. Ties stay."""
    arguments.logits("logits", logits)
    return logits.masked_fill(~_in_top_k(logits, top_k), -torch.inf)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


def _draw(
    logits: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    return_valid: bool = False,
    **filters: Any,
) -> Any:
    _refuse_nan("logits", logits, check_nan)
    arguments.logits("logits", logits)
    rows = logits.shape[0] if indices is None else indices.shape[0]
    seeds, offset = _seeds(seed, offset, rows, generator, logits.device)
    values = SteeringConfig().values() | SamplingConfig(**filters).values()
    values |= {"seed": seeds, "offset": offset}
    token, info = api.sample(arguments.operands(logits, warm_rows=indices), values, return_info=return_valid)
    token = token.to(torch.int32 if indices is None else indices.dtype)
    return token if info is None else (token, (info.status & int(Status.INVALID)) == 0)


def _seeds(
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    rows: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> tuple[Tensor, int | Tensor]:
    """Seeds int64 (rows,) and an offset that the op takes."""
    if seed is None or offset is None:  # as FlashInfer: one without the other is not used
        where = "cpu" if generator is None else generator.device
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=where)
        offset = 0
    if isinstance(offset, Tensor):
        offset = offset.to(device).view(torch.int64) if offset.dtype == torch.uint64 else offset.to(device)
        offset = offset.expand(rows) if offset.shape == (1,) else offset
    if isinstance(seed, Tensor):
        seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed
        seed = seed.to(device)
        if seed.shape == (rows,) and rows != 1:
            return seed, offset
        if seed.shape not in ((), (1,)):
            raise InputError(f"seed was {arguments.shape(seed)}; allowed: an integer, (1,) or ({rows},)")
        first = seed.reshape(1)
    else:
        number, _ = arguments.word64("seed", seed, rows, torch.empty(0))
        first = torch.tensor([number], device=device)
    jump = torch.arange(rows, device=device) * (arguments.GOLDEN - (1 << 64))  # int64 wraps around, as wanted
    return first + jump, offset


def _log(probs: Tensor, check_nan: bool) -> Tensor:
    """Logits of probabilities; NaN stays NaN and negative becomes it, so that the row is marked."""
    arguments.logits("probs", probs)
    _refuse_nan("probs", probs, check_nan)
    return probs.float().log()


def _top_p_only(
    probs: Tensor, top_p: Tensor | float, indices: Tensor | None
) -> tuple[Tensor, bool, Tensor | None]:
    """Logits of what top-p keeps, one row an output; top-k of these is then what both keep."""
    if indices is None:
        return top_p_renorm_probs(probs, top_p).log(), False, None
    own = top_p_renorm_probs(probs[indices.long()], top_p).log()  # top_p (B,) belongs to outputs, not to rows
    return own, False, torch.arange(len(indices), device=indices.device, dtype=indices.dtype)


def _in_top_k(x: Tensor, top_k: Tensor | int) -> Tensor:
    """Bool (B, V): at least the k-th greatest of the row; 0 keeps all."""
    vocab = x.shape[1]
    number, rows = arguments.parameter("top_k", top_k, x.shape[0], x, 0, integer=True)
    if rows is None:
        kth = x.topk(min(int(number), vocab) or vocab, dim=1).values[:, -1:]
    else:
        k = torch.where(rows > 0, rows.clamp(max=vocab), vocab)
        kth = x.sort(dim=1, descending=True).values.gather(1, (k - 1)[:, None])
    return x >= kth


def _normalised(probs: Tensor) -> Tensor:
    return probs / probs.sum(1, keepdim=True)


def _refuse_nan(name: str, x: Tensor, check: bool) -> None:
    if check and bool(x.isnan().any()):
        raise InputError(f"{name} held NaN; allowed: no NaN with check_nan=True")
