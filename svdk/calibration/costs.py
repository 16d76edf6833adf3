"""What a decoding step costs on this machine, with a base row and without."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from svdk.models.pair import ModelPair

PROMPT = 32
STEPS = 8
ROUNDS = 3


@torch.no_grad()
def decoding_costs(pair: ModelPair) -> dict[str, float]:
    """Median milliseconds a token of one sequence: ``ms_rows_1`` (warm alone), ``ms_rows_2`` (with base).

    Forwards alone, as they decode: in one pass where the adapter allows it. Measured in turns, behind
    a prompt of 32 tokens.
    """
    from svdk.models.cpu_linear import fast_linears, replaced
    from svdk.models.paired_forward import PairedForward, why_not_paired

    ids = torch.zeros(1, PROMPT, dtype=torch.int64, device=pair.device)
    paired: Any = PairedForward(pair) if why_not_paired(pair, ids, None) is None else None
    linears = fast_linears(pair.module)  # as decoding has them
    found: dict[int, list[float]] = {1: [], 2: []}
    with pair.evaluating():
        for _ in range(ROUNDS):
            for rows, taken in found.items():
                names = ("warm",) if rows == 1 else ("warm", "base")
                together = paired is not None and rows == 2
                caches = [paired.new_cache()] if together else list(map(pair.new_cache, names))
                for step in range(STEPS + 1):
                    pending = ids if step == 0 else ids[:, :1]
                    start = time.perf_counter()
                    if together:
                        paired(pending, None, cache=caches[0])
                    else:
                        with replaced(linears):
                            for name, cache in zip(names, caches, strict=True):
                                getattr(pair, name)(pending, None, cache=cache)
                    if pair.device.type == "cuda":
                        torch.cuda.synchronize(pair.device)
                    if step:  # the first one runs the prompt
                        taken.append(time.perf_counter() - start)
    return {f"ms_rows_{rows}": 1e3 * statistics.median(taken) for rows, taken in found.items()}
