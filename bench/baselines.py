"""What svdk is compared with; ``tests/bench/test_bench.py`` proves each one's distribution.

Each baseline is written as its best user would write it: everything in float32 (bfloat16 and float16 logits
are cast once), no host synchronisation, no tensor that a cheaper one could replace. Shapes as in
:func:`svdk.steered_sample`: logits ``(B, V)``, tokens int64 ``(B,)``.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12


def steering(
    warm: Tensor,
    base: Tensor | None,
    *,
    vector: Tensor | None = None,
    direction: str = "kl_gradient",
    alpha: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``log p``, the direction (0 outside C) and C, each ``(B, V)``, and K ``(B, 1)``, in eager PyTorch."""
    log_p = warm.float().log_softmax(-1)
    p = log_p.exp()
    if vector is not None:
        delta, kl = vector.float().expand_as(log_p), torch.zeros_like(log_p[:, :1])
    elif base is None:
        raise ValueError("base was None without a vector; allowed: one of them")
    else:
        ratio = log_p - base.float().log_softmax(-1)
        kl = (p * ratio).sum(-1, keepdim=True)
        delta = ratio - kl
        if direction == "kl_gradient":
            delta = p * delta
    if alpha == 0:
        return log_p, delta, torch.ones_like(log_p, dtype=torch.bool), kl
    inside = log_p >= log_p.amax(-1, keepdim=True) + math.log(alpha)
    return log_p, delta.masked_fill(~inside, 0.0), inside, kl


def steered_logits(
    warm: Tensor,
    base: Tensor | None = None,
    *,
    strength: float = 1.0,
    strength_mode: str = "constant",
    labels: Tensor | None = None,
    penalty: float = -math.inf,
    **options: Any,
) -> Tensor:
    """Steered logits ``(B, V)`` up to a constant a row: SVDecode's formulas, one PyTorch call each."""
    log_p, delta, inside, _ = steering(warm, base, **options)
    mu: float | Tensor = strength
    if strength_mode != "constant":
        p = log_p.exp()
        mean = (p * delta).sum(-1, keepdim=True)
        if strength_mode == "label":
            if labels is None:
                raise ValueError("labels was None with strength_mode 'label'; allowed: (B,)")
            mu = (delta.gather(1, labels[:, None]) - mean) / ((delta * delta).sum(-1, keepdim=True) + EPS)
        else:
            variance = (p * (delta - mean) ** 2).sum(-1, keepdim=True)
            mu = (2 * strength / variance.clamp_min(EPS)).sqrt()
    steered = log_p + mu * delta
    outside = -math.inf if penalty == -math.inf else log_p + mu * penalty
    return torch.where(inside, steered, outside)


def pick(p: Tensor) -> Tensor:
    """A token a row by probabilities up to a factor a row; on a CPU one uniform and its place in the sums.

    ``torch.multinomial`` draws an exponential for every entry, which only GPUs do at memory speed.
    """
    if p.device.type != "cpu":
        return torch.multinomial(p, 1)[:, 0]
    sums = p.cumsum(-1)
    place = torch.searchsorted(sums, torch.rand_like(sums[:, :1]) * sums[:, -1:], right=True)
    return place[:, 0].clamp_(max=p.shape[1] - 1)


def softmax(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities, float32."""
    return (z.float() if temperature == 1 else z.float() / temperature).softmax(-1)


def one_uniform(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax and :func:`pick`; greedy for temperature 0 (a CPU is faster with floats than 16 bits)."""
    if temperature == 0:
        return (z.float() if z.device.type == "cpu" else z).argmax(-1)
    return pick(softmax(z, temperature))


def multinomial(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax and ``torch.multinomial``."""
    return torch.multinomial(softmax(z, temperature), 1)[:, 0]


def exponential_race(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Stand-in for vLLM's sampler, in PyTorch: softmax, divide by Exp(1) noise, argmax.

    vLLM's ``random_sample`` is these three operations; its Triton Gumbel kernel is the logarithm of them.
    Neither can be installed beside svdk on every machine, so the reports say "vLLM-style".
    """
    p = softmax(z, temperature)
    return p.div_(torch.empty_like(p).exponential_()).argmax(-1)


def eager(warm: Tensor, base: Tensor | None = None, *, temperature: float = 1.0, **options: Any) -> Tensor:
    """Steered sampling (or greedy) in eager PyTorch; also what torch.compile is given."""
    return one_uniform(steered_logits(warm, base, **options), temperature)


def eager_race(
    warm: Tensor, base: Tensor | None = None, *, temperature: float = 1.0, **options: Any
) -> Tensor:
    """As :func:`eager`, drawn with :func:`exponential_race`."""
    return exponential_race(steered_logits(warm, base, **options), temperature)


@cache
def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> Any:
    from transformers import LogitsProcessorList, generation

    found = LogitsProcessorList()
    if temperature != 1:
        found.append(generation.TemperatureLogitsWarper(temperature))
    if top_k:
        found.append(generation.TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(generation.TopPLogitsWarper(top_p))
    if min_p:
        found.append(generation.MinPLogitsWarper(min_p))
    return found


def warpers(
    warm: Tensor,
    base: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    **options: Any,
) -> Tensor:
    """transformers' logits warpers and ``torch.multinomial``, after eager steering when there is a base."""
    z = warm.float() if base is None and "vector" not in options else steered_logits(warm, base, **options)
    return multinomial(_warpers(temperature, top_k, top_p, min_p)(None, z))


def filtered(z: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The least that PyTorch needs at temperature 1: topk, a sort for top-p alone, a mask for min-p.

    Unlike the warpers it draws among what topk or the sort returned, and masks nothing in place.
    """
    z = z.float()
    if not top_k and top_p >= 1:
        below_top = z - z.amax(-1, keepdim=True)  # masking these is cheaper than masking probabilities
        return pick(torch.nn.functional.threshold(below_top, math.log(min_p), -math.inf).softmax(-1))
    values, ids = z.topk(top_k) if top_k else z.sort(-1, descending=True)
    p = values.softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    if min_p:
        p = p.masked_fill(p < min_p * p[:, :1], 0.0)
    return ids.gather(-1, pick(p)[:, None])[:, 0]


def why_not_flashinfer(device: torch.device) -> str | None:
    """None when FlashInfer can be measured on ``device``, else the reason."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    return None if device.type == "cuda" else "flashinfer needs a CUDA device"


def flashinfer(
    warm: Tensor,
    base: Tensor | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """FlashInfer's sampler on plain logits, float32.

    ``seed`` and ``offset``, int64 ``(B,)`` on the device: without them it asks the CPU's generator, which
    cannot be captured in a graph.
    """
    from flashinfer import sampling

    probabilities = warm.float().softmax(-1)
    draws = {} if seed is None else {"seed": seed, "offset": offset}
    if not top_k and top_p >= 1:
        return sampling.sampling_from_probs(probabilities, **draws).long()
    k = top_k or warm.shape[1]
    order = {"filter_apply_order": "top_k_first"}  # as transformers filters
    return sampling.top_k_top_p_sampling_from_probs(probabilities, k, top_p, **order, **draws).long()


def logprob(
    warm: Tensor,
    base: Tensor | None,
    labels: Tensor,
    *,
    strengths: Tensor,
    penalty: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eager ``steered_logprob``: logprob, slope, curvature and greedy token, each ``(B, M)``."""
    log_p, delta, inside, _ = steering(warm, base, **options)
    move = delta if penalty == 0 else torch.where(inside, delta, penalty)
    at_label = move.gather(1, labels[:, None])
    columns = []
    for mu in strengths.unbind(0):
        z = (log_p + mu * move).log_softmax(-1)
        q = z.exp()
        mean = (q * move).sum(-1, keepdim=True)
        curvature = (q * (move - mean) ** 2).sum(-1, keepdim=True)
        greedy = z.masked_fill(~inside, -math.inf).argmax(-1, keepdim=True)
        columns.append((z.gather(1, labels[:, None]), at_label - mean, curvature, greedy))
    at_labels, slopes, curvatures, tokens = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
    return at_labels, slopes, curvatures, tokens


def extract(
    warm: Tensor, base: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eager ``extract``: row pointers ``(B + 1,)``, ids, p and delta ``(N,)``, and K ``(B,)``."""
    log_p, delta, inside, kl = steering(warm, base, **options)
    row, ids = inside.nonzero(as_tuple=True)
    row_ptr = torch.zeros(warm.shape[0] + 1, dtype=torch.int64, device=warm.device)
    row_ptr[1:] = inside.sum(1).cumsum(0)
    return row_ptr, ids, log_p[row, ids].exp(), delta[row, ids], kl[:, 0]
