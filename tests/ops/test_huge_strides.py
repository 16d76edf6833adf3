"""Rows billions of elements apart, all in one place, or none: strides and sizes at their ends, per backend.

Offsets must be computed in 64 bits, and nothing may copy or read what lies between the rows.
"""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from torch import Tensor

import svdk
from tests.helpers import cuda_shim
from tests.helpers import ops_cases as oc

pytestmark = [
    pytest.mark.parametrize("backend", ["reference", *cuda_shim.kernels()]),
    pytest.mark.usefixtures("shim_backend"),
]
VOCAB = 333
# Rows and stride: a stride beyond 32 bits, and one within that takes later rows beyond them, signed and not.
APART = pytest.mark.parametrize(("count", "stride"), [(3, 2**31 + 24), (9, 2**29 + 24)])


def far_apart(rows: Tensor, stride: int) -> Tensor:
    """The same rows, ``stride`` elements apart: over 8.6 GB of addresses, of which few pages are touched."""
    try:
        size = (rows.shape[0] - 1) * stride + rows.shape[1]
        storage = torch.empty(size, dtype=rows.dtype, device=rows.device)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"no room for rows far apart: {error}")
    view = storage.as_strided(rows.shape, (stride, 1))
    view.copy_(rows)
    return view


def rows_of(backend: str, count: int = 3) -> tuple[Tensor, Tensor]:
    return tuple(x.to(oc.device_of(backend)) for x in oc.logits(count, VOCAB, torch.bfloat16, seed=3))


def compare(backend: str, warm: Tensor, other: dict, same: Tensor, same_other: dict) -> None:
    """The three ops on ``warm`` and ``other`` against the reference on the same rows, contiguous."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels = torch.arange(1, same.shape[0] + 1, device=same.device)
    for kwargs in ({"seed": 5}, {"seed": 6, "alpha": 0.0, "top_p": 0.9}):
        got = svdk.steered_sample(warm, **other, **kwargs, backend=backend)
        oc.assert_same_tokens(got, (same,), same_other | kwargs)
    calls = ((warm, other | {"backend": backend}), (same, same_other | {"backend": "reference"}))
    got, want = (svdk.steered_logprob(x, labels=labels, strength=0.5, penalty=0.0, **kw) for x, kw in calls)
    for name in ("logprob", "gain"):
        oc.assert_close(getattr(got, name), getattr(want, name), name)
    got, want = (svdk.extract(x, **kw) for x, kw in calls)
    for name in ("row_ptr", "token_ids"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name).cpu()), name
    oc.assert_close(got.delta, want.delta, "delta")
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
    assert grown < 1, f"{grown:.1f} GiB: something copied what lies between the rows"


@APART
def test_rows_beyond_32_bits(backend, count, stride):
    warm, base = rows_of(backend, count)
    far, far_base = far_apart(warm, stride), far_apart(base, stride)
    compare(backend, far, {"base_logits": far_base}, warm, {"base_logits": base})


@APART
def test_paired_rows_beyond_32_bits(backend, count, stride):
    rows = rows_of(backend, count)[0]
    both = far_apart(rows, stride)
    warm_rows, base_rows = (torch.tensor(i, device=rows.device) for i in ([count - 1, 0], [1, count - 1]))
    paired = {"base_logits": both, "warm_rows": warm_rows, "base_rows": base_rows}
    compare(backend, both, paired, rows[warm_rows], {"base_logits": rows[base_rows]})


@APART
def test_a_table_of_vectors_beyond_32_bits(backend, count, stride):
    """The ops hand it to the kernels contiguous, and must copy its rows alone."""
    warm, base = rows_of(backend, count)
    vectors = base.float()
    compare(backend, warm, {"vector": far_apart(vectors, stride)}, warm, {"vector": vectors})


def test_a_row_stride_of_zero(backend):
    warm, base = (x[:1] for x in rows_of(backend))
    other, same = {"base_logits": base.expand(4, -1)}, {"base_logits": base.repeat(4, 1)}
    compare(backend, warm.expand(4, -1), other, warm.repeat(4, 1), same)


def test_an_index_of_no_rows(backend):
    warm, base = rows_of(backend)
    none = torch.empty(0, dtype=torch.int64, device=warm.device)
    index = {"warm_rows": none, "base_rows": none, "backend": backend}
    assert svdk.steered_sample(warm, base, **index).shape == (0,)
    assert svdk.steered_logprob(warm, base, none, strength=1.0, **index).logprob.shape == (0,)
    assert svdk.extract(warm, base, **index).row_ptr.tolist() == [0]
