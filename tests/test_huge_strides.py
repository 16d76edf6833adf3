"""Rows that lie billions of elements apart: offsets must be computed in 64 bits on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import svdk
from tests import cuda_shim
from tests import ops_cases as oc

pytestmark = [
    pytest.mark.parametrize("backend", cuda_shim.kernels()),
    pytest.mark.usefixtures("shim_backend"),
]
VOCAB = 333
STRIDE = 2**31 + 24  # rows 1 and 2 start beyond what 32 bits hold, signed and not


def far_apart(rows: Tensor) -> Tensor:
    """The same rows (3, V), STRIDE elements apart: 8.6 GB of addresses, of which few pages are touched."""
    try:
        storage = torch.empty(2 * STRIDE + rows.shape[1], dtype=rows.dtype, device=rows.device)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"no room for rows far apart: {error}")
    view = storage.as_strided(rows.shape, (STRIDE, 1))
    view.copy_(rows)
    return view


def rows_of(backend: str) -> tuple[Tensor, Tensor]:
    return tuple(x.to(oc.device_of(backend)) for x in oc.logits(3, VOCAB, torch.bfloat16, seed=3))


def test_rows_beyond_32_bits(backend):
    warm, base = rows_of(backend)
    labels = torch.tensor([1, 2, 3], device=warm.device)
    far = (far_apart(warm), far_apart(base))
    for kwargs in ({"seed": 5}, {"seed": 6, "alpha": 0.0, "top_p": 0.9}):
        got = svdk.steered_sample(*far, **kwargs, backend=backend)
        oc.assert_same_tokens(got, (warm, base), kwargs)
    got, want = (
        svdk.steered_logprob(*x, labels, strength=0.5, penalty=0.0, backend=name)
        for x, name in ((far, backend), ((warm, base), "reference"))
    )
    oc.assert_close(got.logprob, want.logprob, "logprob")
    got, want = (svdk.extract(*x, backend=n) for x, n in ((far, backend), ((warm, base), "reference")))
    assert torch.equal(got.token_ids.cpu(), want.token_ids.cpu())
    oc.assert_close(got.delta, want.delta, "delta")


def test_paired_rows_and_a_table_of_vectors_beyond_32_bits(backend):
    warm, base = rows_of(backend)
    both = far_apart(torch.stack([warm[0], base[0], warm[1]]))
    index = {
        "warm_rows": torch.tensor([2, 0], device=warm.device),
        "base_rows": torch.tensor([1, 1], device=warm.device),
    }
    got = svdk.steered_sample(both, **index, backend=backend)
    oc.assert_same_tokens(got, (warm[[1, 0]], base[[0, 0]]), {})
    vectors = base.float()
    got = svdk.steered_sample(warm, vector=far_apart(vectors), seed=2, backend=backend)
    oc.assert_same_tokens(got, (warm,), {"vector": vectors, "seed": 2})
