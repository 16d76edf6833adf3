"""For regression tracking: ``pytest bench --benchmark-only`` (pytest-benchmark compares and stores).

One benchmark an operation, backend and setting, at one shape; ``svdk bench`` has the baselines and the grid.
"""

from __future__ import annotations

import pytest
import torch

from svdk.bench import cases, logits, machine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, VOCAB, DTYPE = 8, 151936, torch.float32


@pytest.fixture(scope="module")
def operands() -> list[logits.Operands]:
    """Cold operands: enough copies to outgrow the caches."""
    made = logits.make("zipf", BATCH, VOCAB, DTYPE, DEVICE)
    return logits.rotation(made, True, machine.last_cache(DEVICE), machine.free_memory(DEVICE) // 4)


@pytest.mark.parametrize("backend", cases.available_backends(DEVICE))
@pytest.mark.parametrize("setting", cases.SETTINGS)
def test_call(benchmark, operands, setting, backend):
    """The median is what to watch."""
    call = cases.svdk_call(cases.SETTINGS[setting], backend, DEVICE)
    turn = iter(range(1 << 62))

    def once() -> None:
        call(operands[next(turn) % len(operands)])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = cases.bytes_moved(cases.SETTINGS[setting], BATCH, VOCAB, DTYPE)
    benchmark.pedantic(once, rounds=50, warmup_rounds=3)
