"""The CUDA kernels under random options, transports and schedules, against one CTA in order: the same bits.

For a minute; ``SVDK_FUZZ=N`` N times as long. A race that was once there is planted, and must be found.
"""

from __future__ import annotations

import math
import os
import random
import time

import pytest
import torch

from tests.csrc.test_cuda_mutants import Mutant, mutated
from tests.helpers import cuda_shim
from tests.helpers import ops_cases as oc

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")
SECONDS = 50 * int(os.environ.get("SVDK_FUZZ", "1"))
SMALL = {**cuda_shim.SMALL, "SHIM_SAMPLE_ONLY": 1}
RACE = Mutant(
    "the_others_write_over_the_strength_they_were_told",
    "cuda/full_sweep.cuh",
    "if (threadIdx.x == 0 && (cta.leads() || !told)) c.mu = mu;",
    "if (threadIdx.x == 0) c.mu = mu;",
)


def problem(rng: random.Random):
    """A call, as ``(args, kwargs)``."""
    vocab, dtype = rng.choice((700, 1000, 2000)), rng.choice(list(oc.DTYPES))
    warm, base = oc.logits(2, vocab, dtype, seed=rng.randrange(1000), scale=rng.choice((0.5, 2.0, 4.0)))
    if rng.random() < 0.2:
        warm[:, rng.randrange(vocab // 2) :] = -math.inf
    kwargs = {
        "alpha": rng.choice((0.0, 0.01, 0.1, 0.1)),
        "penalty": rng.choice((-math.inf, -3.0, -3.0, 1.0)),
        "direction": rng.choice(("kl_gradient", "log_ratio")),
        "temperature": rng.choice((0.0, 0.7, 1.0, 1.0)),
        "top_k": rng.choice((0, 0, 0, 20)),
        "top_p": rng.choice((1.0, 1.0, 0.8)),
        "min_p": rng.choice((0.0, 0.0, 0.05)),
        "seed": rng.randrange(2**40),
        "return_info": True,
    }
    mode = rng.choice(("constant", "label", "kl_budget", "kl_budget"))
    if rng.random() < 0.15:
        return (warm,), {k: v for k, v in kwargs.items() if k not in ("alpha", "penalty", "direction")}
    kwargs |= {"strength_mode": mode, "strength": rng.choice((0.05, 0.5, 2.0))}
    if mode == "label":
        kwargs["labels"] = torch.tensor([rng.randrange(vocab) for _ in range(2)])
    return (warm, base), kwargs


def bits(shim: cuda_shim.Shim, flat) -> list:
    return [x.nan_to_num(9e9) if x.is_floating_point() else x for x in shim.steered_sample(*flat)]


def first_difference(library, seconds: float, schedules: int = 3) -> str | None:
    """What differed, of as many random calls as there is time for."""
    rng, end, runs = random.Random(1), time.monotonic() + seconds, 0
    while time.monotonic() < end or runs == 0:
        args, kwargs = problem(rng)
        flat = oc.flat_arguments(args, kwargs)
        want = bits(cuda_shim.Shim(library), flat)
        for _ in range(schedules):
            transport = rng.choice((cuda_shim.CLUSTER, cuda_shim.CLUSTER, cuda_shim.WORKSPACE))
            layout = (transport, rng.choice((2, 3, 4, 16)), rng.randrange(1, 10**6))
            try:
                got = bits(cuda_shim.Shim(library, *layout), flat)
            except cuda_shim.ShimError as error:
                return f"{layout} {kwargs}: {error}"
            if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
                return f"{layout} {kwargs}: {got} instead of {want}"
            runs += 1
    return None


@pytest.mark.timeout(SECONDS + 300)
def test_every_layout_and_schedule_gives_the_bits_of_one_cta():
    assert first_difference(cuda_shim.build(**SMALL), SECONDS) is None


def test_a_planted_race_is_found(tmp_path):
    found = first_difference(cuda_shim.build(mutated(tmp_path, RACE), **SMALL), 300, schedules=8)
    assert found is not None
    assert "instead of" in found
