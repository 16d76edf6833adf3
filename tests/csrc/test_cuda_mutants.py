"""The shim's tests can fail: each planted bug in a copy of the CUDA sources must be noticed."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
from dataclasses import dataclass

import pytest
import torch

import svdk
from tests.helpers import cuda_shim
from tests.helpers import ops_cases as oc
from tests.helpers.cuda_shim import CLUSTER, SOLO, WORKSPACE

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")

SMALL = {**cuda_shim.SMALL, "SHIM_SAMPLE_ONLY": 1}
SCHEDULES = range(6)


@dataclass(frozen=True)
class Mutant:
    """One edit of one file of csrc; ``old`` occurs there, and its first occurrence is replaced."""

    name: str
    file: str
    old: str
    new: str


def without(name: str, file: str, before: str, gone: str, after: str = "") -> Mutant:
    """A mutant that lacks the text between two others."""
    return Mutant(name, file, before + gone + after, before + after)


BARRIER = "__syncthreads();\n"
MUTANTS = (
    without(
        "no_barrier_before_a_reduction_is_read",
        "cuda/reduce.cuh",
        "if (lane_id() == 0) slot[warp_id()] = x;\n  ",
        BARRIER,
    ),
    without(
        "no_barrier_after_a_reduction_is_read", "cuda/reduce.cuh", "all = op(all, slot[i]);\n  ", BARRIER
    ),
    without(
        "no_barrier_before_a_scan_is_read",
        "cuda/reduce.cuh",
        "if (lane_id() == 31) slot[warp_id()] = x;\n  ",
        BARRIER,
    ),
    without(
        "no_barrier_before_candidates_are_counted",
        "cuda/sweep.cuh",
        "",
        BARRIER,
        "  const int n = static_cast",
    ),
    without(
        "no_barrier_before_parts_are_read", "cuda/team.cuh", "", "cta.team_barrier();\n", "    return true;"
    ),
    without("no_barrier_before_the_ticket", "cuda/team.cuh", "__threadfence();\n  ", BARRIER),
    without("the_workspace_is_not_reset", "cuda/team.cuh", "", "if (s.last) a.tickets[cta.row] = 0;"),
    without("no_barrier_after_a_broadcast", "cuda/team.cuh", "", "team_barrier();\n", "  }\n};"),
    Mutant("vector_past_the_end_of_the_row", "cuda/read.cuh", "at + N <= s.vocab)", "at + N <= s.vocab + 1)"),
    Mutant(
        "tail_off_by_one",
        "cuda/sweep.cuh",
        "left < N ? left : N);",
        "left < N ? left - 1 : N);",
    ),
    Mutant("joined_loads_off_by_a_word", "cuda/read.cuh", "if (shift & 4) {", "if (shift & 2) {"),
    Mutant(
        "a_candidate_is_lost",
        "cuda/team.cuh",
        "if (place < static_cast<uint32_t>(kCapacity))",
        "if (place != 1)",
    ),
    Mutant(
        "candidates_against_half_the_threshold",
        "cuda/sweep.cuh",
        "top + log_alpha -",
        "top + 0.5f * log_alpha -",
    ),
    Mutant("an_overflow_goes_unnoticed", "cuda/sweep.cuh", "overflow = true;", "overflow = false;"),
    Mutant("cross_term_stays_behind_the_maximum", "common.h", "cross + usable * (", "cross + 0 * ("),
    Mutant("a_slice_is_entered_too_far", "cuda/draw_sweep.cuh", "(target - before) / mass", "target / mass"),
    Mutant(
        "masses_of_slices_are_not_of_the_row",
        "cuda/draw_sweep.cuh",
        "mass = x.sum * fast_exp((static_cast<float>(x.max) - max) * draw.rate);",
        "mass = x.sum;",
    ),
    Mutant("a_draw_takes_the_last_lane", "cuda/draw_sweep.cuh", "behind = first < 32;", "behind = false;"),
    Mutant("a_draw_forgets_its_chunk", "cuda/draw_sweep.cuh", "start = before;", "start = 0;"),
    Mutant(
        "a_slice_is_skipped",
        "cuda/team.cuh",
        "(rank + 1) * slices.count / size;",
        "(rank + 1) * (slices.count - 1) / size;",
    ),
)
WHOLE = (
    Mutant(
        "powers_keep_the_rounding_of_their_shift",
        "cuda/sweep.cuh",
        "keep_w = exp2_approx(-rest_w)",
        "keep_w = 0.99f",
    ),
    Mutant(
        "the_cross_term_keeps_it", "cuda/sweep.cuh", "excess = to_nats * (rest_b - rest_w)", "excess = 0.05f"
    ),
    Mutant("masked_vectors_are_not_counted", "cuda/sweep.cuh", "warm_masked += N;", "warm_masked += 1;"),
)
"""Of the way that whole iterations of a sweep take, which short slices do not have."""
CASES = ("default", "kl_budget", "kl_budget_everywhere", "plain", "plain_top_p", "cold_top_p")
SEVERAL_WARPS = oc.Case("several_warps", {"alpha": 0.01, "top_p": 0.9, "temperature": 1.5})
"""About 45 candidates where there is room for 64: more than one warp has some."""


def problems():
    """Calls that together touch what the mutants break: aligned and odd rows, few and many tokens in play."""
    for vocab, scale in ((999, 3.0), (1000, 3.0), (1200, 0.6)):
        warm, base = oc.logits(2, vocab, seed=vocab, scale=scale)
        warm[0, -1], warm[1, -2] = 3.5 * scale, 3.4 * scale  # the tail of the row matters
        for case in (*oc.CASES, SEVERAL_WARPS):
            if case.name in CASES or case is SEVERAL_WARPS:
                args, kwargs = oc.operands(case, warm, base)
                yield args, kwargs | {"seed": 3, "return_info": True}


def expectations():
    return [(a, k, svdk.steered_sample(*a, **k, backend="reference")) for a, k in problems()]


def assert_right(library, expected) -> None:
    """Every layout in every schedule gives what the reference gives."""
    for schedule in SCHEDULES:
        for transport, split in ((SOLO, 1), (CLUSTER, 2), (WORKSPACE, 2)):
            shim = cuda_shim.Shim(library, transport, split, schedule)
            for args, kwargs, (token, info) in expected:
                got, floats, ints = shim.steered_sample(*oc.flat_arguments(args, kwargs))
                oc.assert_same_tokens(got, args, kwargs, token)
                assert torch.equal(ints, torch.stack([info.candidates, info.status]))
                oc.assert_close(floats[0], info.strength, "strength", rtol=1e-3)
                oc.assert_close(floats[1], info.kl, "kl", rtol=1e-3)
                if torch.equal(got, token):
                    oc.assert_close(floats[2], info.logprob_steered, "logprob", rtol=1e-3, atol=1e-3)


def is_right(library, expected) -> bool:
    """In a child process: a broken kernel may crash or never end."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a crash is an answer
        signal.setitimer(signal.ITIMER_PROF, 100)  # of its own time: the machine may be busy
        code = 2
        try:
            assert_right(library, expected)
            code = 0
        except AssertionError:
            code = 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != 2, "the test itself failed"
    return code == 0


@pytest.fixture(scope="module")
def expected():
    return expectations()


def mutated(folder, mutant: Mutant | None):
    """A copy of the sources with one edit."""
    for part in (("csrc",), ("tests", "shim")):
        shutil.copytree(cuda_shim.ROOT.joinpath(*part), folder.joinpath(*part), dirs_exist_ok=True)
    if mutant is not None:
        path = folder / "csrc" / mutant.file
        text = path.read_text()
        assert mutant.old in text, f"{mutant.name}: the line to break is no longer in {mutant.file}"
        path.write_text(text.replace(mutant.old, mutant.new, 1))
    return folder


def test_the_sources_as_they_are_pass(expected, tmp_path):
    assert is_right(cuda_shim.build(mutated(tmp_path, None), **SMALL), expected)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_bug_is_noticed(mutant, expected, tmp_path):
    library = cuda_shim.build(mutated(tmp_path, mutant), **SMALL)
    assert not is_right(library, expected)


def whole_expectations():
    """Calls with whole iterations, some of whose vectors a grammar masks."""
    expected = []
    warm, base = oc.logits(1, 8192, seed=2, scale=3.0)
    masked = warm.clone()
    masked[:, 1000:3000] = -oc.INF
    for operands in ((warm, base), (masked, base.where(masked.isfinite(), masked))):
        for case in oc.CASES:
            if case.name in ("default", "kl_budget_everywhere", "plain"):
                args, kwargs = oc.operands(case, *operands)
                kwargs = kwargs | {"seed": 3, "return_info": True}
                expected.append((args, kwargs, svdk.steered_sample(*args, **kwargs, backend="reference")))
    return expected


def whole_is_right(library) -> bool:
    for args, kwargs, (token, info) in whole_expectations():
        got, floats, ints = cuda_shim.Shim(library).steered_sample(*oc.flat_arguments(args, kwargs))
        want = torch.stack([info.strength, info.kl, info.logprob_steered, info.logprob_warm])
        close = torch.allclose(floats[:4].nan_to_num(7), want.nan_to_num(7), rtol=1e-3, atol=1e-3)
        if not (torch.equal(got, token) and close and torch.equal(ints[0], info.candidates)):
            return False
    return True


def test_whole_iterations_as_they_are_pass():
    assert whole_is_right(cuda_shim.build(SHIM_SAMPLE_ONLY=1))


@pytest.mark.parametrize("mutant", WHOLE, ids=lambda m: m.name)
def test_a_bug_planted_in_whole_iterations_is_noticed(mutant, tmp_path):
    assert not whole_is_right(cuda_shim.build(mutated(tmp_path, mutant), SHIM_SAMPLE_ONLY=1))
