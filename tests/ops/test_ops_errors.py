"""Bad input to the operations: the message names the argument, what it was and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

import svdk
from svdk.errors import BackendError, InputError
from svdk.ops import schema
from tests.helpers import ops_cases as oc

W, B = torch.randn(3, 10), torch.randn(3, 10)
LABELS = torch.tensor([0, 1, 2])
ROWS = torch.tensor([2, 0])
BITS = torch.full((3, 1), -1, dtype=torch.int32)

BAD_SAMPLE = [
    ((W[0],), {}, r"warm_logits was .*\(10,\)"),
    ((W.long(),), {}, "warm_logits was torch.int64"),
    (([[1.0]],), {}, "warm_logits was list"),
    ((torch.empty(3, 0),), {}, r"warm_logits was .*\(3, 0\)"),
    ((W.T,), {}, "warm_logits was strided"),
    ((W.double(),), {}, "torch.float64; allowed: float32, bfloat16 or float16"),
    ((W, B[:, :9]), {}, r"base_logits was .*\(3, 9\); allowed: .*10"),
    ((W, B[:2]), {}, r"base_logits was .*\(2, 10\); allowed: 3 rows"),
    ((W, B.bfloat16()), {}, "base_logits was torch.bfloat16 on cpu; allowed: torch.float32"),
    ((W, B), {"vector": W[0]}, "base_logits and vector were both given"),
    ((W,), {"vector": W[0, :4]}, r"vector was .*\(4,\)"),
    ((W,), {"vector": LABELS}, "vector was"),
    ((W, B), {"direction": "up"}, "direction was 'up'; allowed: 'kl_gradient' | 'log_ratio'"),
    ((W, B), {"strength_mode": "auto"}, "strength_mode was 'auto'"),
    ((W,), {"strength_mode": "kl_budget"}, "strength_mode was 'kl_budget'; allowed: 'constant'"),
    ((W, B), {"strength_mode": "label"}, "labels was None"),
    ((W, B), {"labels": LABELS}, "labels was given"),
    ((W, B), {"strength_mode": "label", "labels": LABELS + 9}, r"labels was 9..11; allowed: .*\[0, 10\)"),
    ((W, B), {"strength_mode": "label", "labels": LABELS[:2]}, r"labels was .*\(2,\)"),
    ((W, B), {"strength_mode": "kl_budget", "strength": -1.0}, "strength was -1.0; allowed: a number >= 0"),
    ((W, B), {"strength": math.nan}, "strength was nan; allowed: a finite number"),
    ((W, B), {"strength": "1"}, None),
    ((W, B), {"strength": "much"}, "strength was 'much'"),
    ((W, B), {"strength": torch.ones(4)}, r"strength was .*\(4,\); allowed: .*\(3,\)"),
    ((W, B), {"alpha": 1.5}, r"alpha was 1.5; allowed: a number in \[0, 1\]"),
    ((W, B), {"alpha": torch.tensor([0.1, -0.5, 0.1])}, r"alpha\[1\] was -0.5"),
    ((W, B), {"penalty": math.inf}, "penalty was inf"),
    ((W, B), {"penalty": math.nan}, "penalty was nan"),
    ((W, B), {"temperature": -1}, "temperature was -1; allowed: a number >= 0"),
    ((W, B), {"temperature": math.inf}, "temperature was inf"),
    ((W, B), {"top_k": -1}, "top_k was -1"),
    ((W, B), {"top_k": 1.5}, "top_k was 1.5"),
    ((W, B), {"top_k": torch.ones(3)}, "top_k was torch.float32"),
    ((W, B), {"top_p": 1.1}, "top_p was 1.1"),
    ((W, B), {"min_p": -0.1}, "min_p was -0.1"),
    ((W, B), {"seed": 2**64}, "seed was 18446744073709551616; allowed: a 64-bit integer"),
    ((W, B), {"offset": torch.zeros(2, dtype=torch.int64)}, "offset was"),
    ((W, B), {"vocab_size": 11}, "vocab_size was 11; allowed: 1 to 10"),
    ((W, B), {"vocab_size": 0}, "vocab_size was 0"),
    ((W,), {"warm_rows": torch.tensor([3])}, r"warm_rows was 3..3; allowed: row indices in \[0, 3\)"),
    ((W,), {"warm_rows": [0]}, "warm_rows was"),
    ((W, B), {"base_rows": torch.tensor([0, 1])}, "base_rows was"),
    ((W, B), {"logit_bias": W[0, :9]}, r"logit_bias was .*\(9,\); allowed: \(10,\) or \(3, 10\)"),
    ((W, B), {"logit_bias": W[:2]}, r"logit_bias was .*\(2, 10\)"),
    ((W, B), {"logit_bias": W[:2], "warm_rows": ROWS, "base_rows": ROWS}, None),
    ((W, B), {"logit_bias": W, "warm_rows": ROWS, "base_rows": ROWS}, r"logit_bias was .*\(3, 10\)"),
    (
        (W, B),
        {"logit_bias": W.double()},
        "logit_bias was torch.float64 on cpu; allowed: torch.float32 on cpu",
    ),
    ((W, B), {"logit_bias": W.to("meta")}, "logit_bias was torch.float32 on meta; allowed: .* on cpu"),
    ((W, B), {"logit_bias": [0.0] * 10}, r"logit_bias was \[0.0"),
    ((W, B), {"bitmask": BITS.long()}, "bitmask was torch.int64 on cpu; allowed: torch.int32 on cpu"),
    ((W, B), {"bitmask": BITS.to("meta")}, "bitmask was torch.int32 on meta; allowed: .* on cpu"),
    ((W, B), {"bitmask": BITS[:2]}, r"bitmask was .*\(2, 1\); allowed: \(3, 1\)"),
    ((W, B), {"bitmask": BITS[:, 0]}, r"bitmask was .*\(3,\)"),
    ((torch.zeros(3, 33),), {"bitmask": BITS}, r"bitmask was .*\(3, 1\); allowed: \(3, 2\) or wider"),
    ((torch.zeros(3, 33),), {"bitmask": BITS, "vocab_size": 32}, None),
    ((W, B), {"bitmask": W > 0}, r"bitmask was torch.bool on cpu|bitmask was .*\(3, 10\)"),
    ((W, B), {"backend": "tpu"}, "backend was 'tpu'; allowed: 'auto'"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD_SAMPLE, ids=range(len(BAD_SAMPLE)))
def test_sample_refuses(args, kwargs, message):
    if message is None:  # what Python itself takes for a number is one
        svdk.steered_sample(*args, **kwargs)
        return
    with pytest.raises(InputError, match=message):
        svdk.steered_sample(*args, **kwargs)


def test_logprob_refuses():
    with pytest.raises(InputError, match="labels was None"):
        svdk.steered_logprob(W, B)
    with pytest.raises(InputError, match=r"labels was .*allowed"):
        svdk.steered_logprob(W, B, torch.tensor([0, 1, 10]))
    with pytest.raises(InputError, match="strengths was"):
        svdk.steered_logprob(W, B, LABELS, strengths=torch.ones(2, 2))
    with pytest.raises(InputError, match=r"strengths\[1\] was nan"):
        svdk.steered_logprob(W, B, LABELS, strengths=torch.tensor([0.0, math.nan]))


def test_extract_refuses():
    with pytest.raises(InputError, match="base_logits was None"):
        svdk.extract(W)
    with pytest.raises(InputError, match="alpha was 2"):
        svdk.extract(W, B, alpha=2)


def test_a_named_backend_that_cannot_run_says_why():
    blocked = {n: why for n, why in svdk.backends.status().items() if why != "available"}
    assert svdk.backends.status()["reference"] == "available"
    for name, why in blocked.items():
        with pytest.raises(BackendError, match=f"backend '{name}' cannot run: "):
            svdk.steered_sample(W, B, backend=name)
        assert why


def test_rows_of_device_side_parameters_out_of_range_are_invalid():
    """Inside a compiled or device-side call nothing can be raised: such rows come back INVALID."""
    flat_row = torch.tensor([0.1, 5.0, 0.1])
    for namespace in (torch.ops.svdk, svdk.reference):
        arguments = oc.flat(schema.STEERED_SAMPLE, W, B, alpha=flat_row, info=True)
        token, _, ints = namespace.steered_sample(*arguments)
        assert ints[1].tolist() == [0, 1, 0]
        assert int(token[1]) == int(W[1].argmax())
