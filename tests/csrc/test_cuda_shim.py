"""The CUDA kernels, from the same source, on the CPU: every test of the ops that the other backends pass.

``tests/shim`` runs one fiber a CUDA thread. It is built twice: with the kernels' own constants, and with
short slices and few candidates, so that small vocabularies meet every path (rows split over CTAs, more
candidates than are kept, searches over the whole row). ``tests/csrc/test_cuda_mutants.py`` shows that these
tests can fail.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

import svdk
from svdk.ops import backends
from tests.csrc.test_cuda_mutants import Mutant, mutated
from tests.helpers import cuda_shim
from tests.helpers import ops_cases as oc
from tests.ops import test_ops, test_steered_logits

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")

# transport, CTAs a row, schedule (0: in order, else the seed of a random one)
LAYOUTS = {
    "solo": (cuda_shim.SOLO, 1, 0),
    "cluster": (cuda_shim.CLUSTER, 3, 5),
    "workspace": (cuda_shim.WORKSPACE, 2, 9),
}
CASE = pytest.mark.parametrize("case", oc.CASES, ids=lambda c: c.name)
DIRECTION = pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])


@pytest.fixture(scope="module")
def library():
    return cuda_shim.build(**cuda_shim.SMALL)


def install(monkeypatch, shim):
    """The shim as a backend, tested on vocabularies that it can do in a reasonable time."""
    cuda_shim.install(monkeypatch, shim)
    monkeypatch.setattr(oc, "vocabs", lambda _: (1, 31, 32, 999, 2500))


@pytest.fixture(params=LAYOUTS)
def backend(request, monkeypatch, library):
    install(monkeypatch, cuda_shim.Shim(library, *LAYOUTS[request.param]))
    return "shim"


@CASE
@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_sample(backend, case, dtype):
    test_ops.test_sample_equals_reference(backend, case, dtype)


@CASE
def test_odd_rows(backend, case):
    for row in oc.odd_rows():
        test_ops.test_odd_rows(backend, case, *row.values)


@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.1, 1.0])
@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio", "vector"])
def test_logprob(backend, direction, alpha, monkeypatch):
    monkeypatch.setattr(oc, "vocabs", lambda _: (1, 32, 999))
    for penalty in (-oc.INF, 0.0, -2.0, 1.5):
        test_ops.test_logprob_equals_reference(backend, alpha, penalty, direction)


@DIRECTION
@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_extract(backend, direction, dtype):
    for alpha in (0.0, 0.01, 0.1):
        test_ops.test_extract_equals_reference(backend, alpha, direction, dtype)


LOGITS_CASE = pytest.mark.parametrize("case", test_steered_logits.CASES, ids=lambda c: c.name)


@LOGITS_CASE
def test_logits(backend, case):
    for dtype in oc.DTYPES:
        test_steered_logits.test_equals_reference(backend, case, dtype)
    for row in oc.odd_rows():
        test_steered_logits.test_odd_rows(backend, case, *row.values)
    test_steered_logits.test_the_draw_is_from_these_rows(backend, case)
    test_steered_logits.test_paired_strided_and_padded_rows(backend, case)


@LOGITS_CASE
def test_logits_in_place_and_skipped(backend, case):
    test_steered_logits.test_in_place(backend, case)
    for dtype in oc.DTYPES:
        test_steered_logits.test_skipped_rows_are_copied(backend, case, dtype)


@pytest.mark.parametrize("penalty", [-oc.INF, -1.0])
def test_logits_of_flat_rows_and_at_the_limits(backend, penalty):
    for scale in (0.0, 0.02, 0.5):
        test_steered_logits.test_flat_rows_take_a_second_sweep(backend, scale, penalty)
    test_steered_logits.test_a_rising_maximum_loses_no_candidate(backend)
    test_steered_logits.test_per_row_parameters_are_each_rows_own(backend)
    test_steered_logits.test_check_names_the_rows(backend)
    test_steered_logits.test_a_parameter_out_of_range_on_the_device_is_an_invalid_row(backend)
    test_steered_logits.test_empty_batch(backend)
    for dtype in oc.DTYPES:
        test_steered_logits.test_strength_zero(backend, dtype, penalty)
        test_steered_logits.test_finite_logits_stay_finite(backend, dtype)


@DIRECTION
def test_per_row_parameters(backend, direction):
    test_ops.test_per_row_parameters_are_each_rows_own(backend, direction)


@CASE
def test_paired_strided_and_padded_rows(backend, case):
    test_ops.test_paired_strided_and_padded_rows(backend, case)


@CASE
def test_a_row_does_not_depend_on_its_batch(backend, case):
    test_ops.test_a_row_does_not_depend_on_its_batch(backend, case)


def test_ties_empty_batches_checks_and_extreme_strengths(backend):
    test_ops.test_ties_go_to_the_lowest_id(backend)
    test_ops.test_empty_batch(backend)
    test_ops.test_extreme_strengths_stay_in_range(backend)
    for mode in ("steered", "plain"):
        test_ops.test_check_names_the_rows(backend, mode)


@CASE
@pytest.mark.parametrize("vocab", [997, 4000])
def test_every_layout_and_schedule_gives_the_same_bits(case, vocab, library, monkeypatch):
    """Tokens and diagnostics, bit for bit, however a row is split and whatever runs first."""
    warm, base = oc.logits(2, vocab, torch.bfloat16, seed=vocab, scale=2.0)
    args, kwargs = oc.operands(case, warm, base)
    first = None
    layouts = [(cuda_shim.SOLO, 1, 0), (cuda_shim.SOLO, 1, 3), (cuda_shim.CLUSTER, 2, 0)]
    layouts += [
        (cuda_shim.CLUSTER, 16, 9),
        (cuda_shim.CLUSTER, 4, 7),
        (cuda_shim.WORKSPACE, 4, 0),
        (cuda_shim.WORKSPACE, 3, 11),
    ]
    for layout in layouts:
        install(monkeypatch, cuda_shim.Shim(library, *layout))
        got = svdk.steered_sample(*args, **kwargs, seed=3, backend="shim", return_info=True)
        bits = (got[0], *(getattr(got[1], name) for name in got[1].__dataclass_fields__))
        first = first or bits
        for x, y in zip(bits, first, strict=True):
            assert torch.equal(x.nan_to_num(9e9), y.nan_to_num(9e9)), layout


def test_rows_that_do_not_exist_are_invalid(backend):
    """Indices on the device are not looked at before the launch; the kernel must not follow them."""
    warm, base = oc.logits(3, 500)
    warm_rows, base_rows = torch.tensor([0, 3, 2, 1]), torch.tensor([0, 1, -1, 2**40])
    flat = oc.flat_arguments((warm, base), {})
    flat = (warm, base, None, warm_rows, base_rows, *flat[5:-1], True)
    token, floats, ints = backends.resolve(backend, warm).steered_sample(*flat)
    assert ints[1].tolist() == [0, 1, 1, 1]
    assert token.tolist()[1:] == [0, int(warm[2].argmax()), int(warm[1].argmax())]
    assert torch.isnan(floats[:, 1:]).all()


@pytest.mark.parametrize("width", [1003, 1001])
@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_rows_off_16_byte_boundaries_give_the_same_bits(backend, dtype, width):
    """With an odd row length every row starts elsewhere; heads, tails and joined loads must not show."""
    warm, base = oc.logits(9, width, dtype, seed=4)
    aligned = torch.zeros(2, 9, 1024, dtype=dtype)
    aligned[0, :, :width], aligned[1, :, :width] = warm, base
    for kwargs in ({"strength_mode": "kl_budget", "strength": 0.1, "alpha": 0.0}, {}):
        want = svdk.steered_sample(
            aligned[0], aligned[1], vocab_size=width, backend=backend, return_info=True, **kwargs
        )
        got = svdk.steered_sample(warm, base, backend=backend, return_info=True, **kwargs)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1].kl, want[1].kl)
        assert torch.equal(got[1].strength, want[1].strength)


def test_a_uniform_of_one_draws_the_last_token_with_mass(tmp_path, monkeypatch):
    """53 bits that are all ones make it, by a seed that nobody knows."""
    one = Mutant("one", "philox.h", "(static_cast<double>(bits >> 11) + 0.5) * 0x1p-53", "bits * 0.0 + 1.0")
    library = cuda_shim.build(mutated(tmp_path, one), **cuda_shim.SMALL)
    install(monkeypatch, cuda_shim.Shim(library, cuda_shim.CLUSTER, 3, 5))
    oc.assert_the_last_with_mass(monkeypatch, "shim")


@CASE
@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_whole_iterations_equal_the_reference(case, dtype, monkeypatch):
    """Short slices have none: with the kernels' own constants."""
    install(monkeypatch, cuda_shim.Shim(cuda_shim.build(), cuda_shim.CLUSTER, 2, 4))
    monkeypatch.setattr(oc, "vocabs", lambda _: (12400,))
    test_ops.test_sample_equals_reference("shim", case, dtype)


FULL_SIZE = ("default", "kl_everywhere", "plain", "plain_top_k", "plain_wide_top_k", "top_p_penalty")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_vocabulary_with_the_kernels_own_constants(name, monkeypatch):
    case = next(c for c in oc.CASES if c.name == name)
    warm, base = oc.logits(1, 151936, torch.bfloat16, seed=6)
    args, kwargs = oc.operands(case, warm, base)
    install(monkeypatch, cuda_shim.Shim(cuda_shim.build(), cuda_shim.CLUSTER, 8, 2))
    token, info = svdk.steered_sample(*args, **kwargs, seed=5, backend="shim", return_info=True)
    oc.assert_same_tokens(token, args, kwargs | {"seed": 5})
    _, want = svdk.steered_sample(*args, **kwargs, seed=5, backend="reference", return_info=True)
    oc.assert_close(info.kl, want.kl, "kl")
    assert torch.equal(info.candidates, want.candidates)


@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_flat_rows_take_the_second_sweep(backend, scale):
    """More candidates than are kept, at first (0.5) or for good (0.02)."""
    warm, base = oc.logits(2, 3000, seed=1, scale=scale)
    for kwargs in ({}, {"strength_mode": "kl_budget", "strength": 0.01}, {"top_p": 0.5}, {"top_k": 500}):
        token, info = svdk.steered_sample(warm, base, backend=backend, return_info=True, **kwargs)
        _, want = svdk.steered_sample(warm, base, backend="reference", return_info=True, **kwargs)
        oc.assert_same_tokens(token, (warm, base), kwargs)
        assert torch.equal(info.candidates, want.candidates)
        oc.assert_close(info.strength, want.strength, "strength", rtol=1e-3)


def test_a_rising_maximum_loses_no_candidate(backend):
    """Each token above all before it: everything is a candidate for a while, few remain."""
    warm = torch.linspace(-40, 20, 3000)[None].contiguous()
    base = warm.flip(1).contiguous()
    for w, b in ((warm, base), (base, warm)):
        got, want = (svdk.extract(w, b, backend=name) for name in (backend, "reference"))
        assert torch.equal(got.token_ids, want.token_ids)
        oc.assert_close(got.delta, want.delta, "delta")


# Planted: 132 processors in groups of 16 or 18, two CTAs on each, as an H100 may have them; clusters of 16
# as two a group. The wanted numbers follow from what `choose_cluster` says that it counts.
H100 = (264, 132, 64, 32, 16)
NO_LARGE = (264, 132, 64, 32, 0)


@pytest.mark.parametrize(
    ("batch", "active", "split"),
    [
        (1, H100, 16), (8, H100, 16), (16, H100, 16), (17, H100, 8), (32, H100, 8),
        (33, H100, 4), (64, H100, 4), (132, H100, 2), (133, H100, 4), (256, H100, 1), (264, H100, 1),
        (265, H100, 4), (1, NO_LARGE, 8), (8, NO_LARGE, 8), (33, NO_LARGE, 4), (0, H100, 1),
        (1, (264, 0, 0, 0, 0), 1), (100_000, H100, 1),
    ],
)  # fmt: skip
def test_a_row_more_than_fills_the_device_starts_no_second_wave_of_long_rows(batch, active, split):
    choose = cuda_shim.build().shim_choose_cluster
    rows = (ctypes.c_int64 * 5)(*active)
    assert choose(ctypes.c_int64(batch), ctypes.c_int64(151936), rows) == split


@pytest.mark.parametrize("vocab", [1, 8192, 8193, 50257, 151936, 10**7])
def test_no_cluster_is_larger_than_a_row_has_slices_or_the_device_holds(vocab):
    choose = cuda_shim.build().shim_choose_cluster
    for active in (H100, NO_LARGE, (8, 4, 0, 0, 0)):
        held = [1 << k for k, rows in enumerate(active) if rows]
        for batch in (1, 2, 31, 64, 300, 5000):
            split = choose(ctypes.c_int64(batch), ctypes.c_int64(vocab), (ctypes.c_int64 * 5)(*active))
            assert split in held
            assert split <= -(-vocab // 8192)
