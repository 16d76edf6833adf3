"""What a decoding step costs on this machine, with a base row and without."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from svdk.utils.views import BASE, WARM

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
    from svdk.models.paired_forward import PairedForward, why_not_paired
    from svdk.models.two_pass import TwoPass

    ids = torch.zeros(1, PROMPT, dtype=torch.int64, device=pair.device)
    is_paired = why_not_paired(pair, ids, None) is None
    both = PairedForward(pair) if is_paired else TwoPass(pair, (WARM, BASE))
    forwards: dict[int, PairedForward | TwoPass] = {1: TwoPass(pair, (WARM,)), 2: both}
    found: dict[int, list[float]] = {rows: [] for rows in forwards}
    with pair.evaluating():
        for _ in range(ROUNDS):
            for rows, forward in forwards.items():
                cache: Any = forward.new_cache()
                for step in range(STEPS + 1):
                    pending = ids if step == 0 else ids[:, :1]
                    start = time.perf_counter()
                    forward(pending, None, cache=cache)
                    if pair.device.type == "cuda":
                        torch.cuda.synchronize(pair.device)
                    if step:  # the first one runs the prompt
                        found[rows].append(time.perf_counter() - start)
    return {f"ms_rows_{rows}": 1e3 * statistics.median(taken) for rows, taken in found.items()}
