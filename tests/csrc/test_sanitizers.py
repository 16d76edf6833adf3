"""The C++ CPU kernels, every instruction set, under ASan + UBSan and under TSan.

The program is the fuzzing harness of ``tests/fuzz`` (no Python or PyTorch inside), fed with the corpus that
libFuzzer left and with random inputs; it also holds every answer against a float64 oracle. Planted bugs show
that each net catches.
"""

from __future__ import annotations

import re
import signal

import pytest

from tests.fuzz import build
from tests.fuzz.build import Edit

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("sanitizers"),
]
RANDOM = {"address": "400", "thread": "60"}
STEP = {"address": 1, "thread": 10}  # of the corpus: a data race depends little on the numbers


@pytest.fixture(scope="module", params=["address", "thread"])
def sanitizer(request):
    if (reason := build.missing(request.param)) is not None:
        pytest.skip(reason)
    return request.param


def test_corpus_and_random_inputs_are_clean(sanitizer):
    program = build.build(sanitizer)
    corpus = [line for line in build.CORPUS.read_text().splitlines() if line and not line.startswith("#")]
    done = build.replay(program, "-hex", str(build.CORPUS), str(STEP[sanitizer]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{-(-len(corpus) // STEP[sanitizer])} inputs passed" in done.stdout
    done = build.replay(program, "-random", RANDOM[sanitizer], "7")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_uniform_of_one_draws_the_last_token_with_mass():
    """53 bits of ones make it, by a seed that nobody knows; the oracle wants no mass behind the token."""
    units = ("sample", "candidates", "target")
    one = Edit("philox.h", "(static_cast<double>(bits >> 11) + 0.5) * 0x1p-53", "bits * 0.0 + 1.0", units)
    program = build.build("plain", one)
    done = build.replay(program, "-hex", str(build.CORPUS))
    program.unlink()
    assert done.returncode == 0, done.stderr[-3000:]


PLANTED = {
    "read_past_the_row": (
        "address",
        Edit("cpu/blocks.h", "std::memcpy(space, p, n * sizeof(float));",
             "std::memcpy(space, p, (n + 1) * sizeof(float));", ("arch_portable",)),
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "one_slice_for_all_threads": (
        "thread",
        Edit("cpu/sample.cpp", "SliceFindings& found = slices_[slice];", "SliceFindings& found = slices_[0];",
             ("sample",)),
        "ThreadSanitizer: data race",
    ),
}  # fmt: skip

# Each finding of the fuzzer, its fix taken out: the corpus must notice, without a sanitizer but for one.
PORTABLE, CANDIDATES, FILTERS = ("arch_portable",), ("candidates",), ("filters",)
MAXIMA = (
    "exceptional.beyond_float || std::fabs(max_w) > kFloatSafe ||\n             std::fabs(max_b) > kFloatSafe"
)
EXACTLY = "moving.largest + std::fabs(c.mu) * moving.reach > kExact"
FIXES = {
    "exp_is_zero_below": Edit("cpu/blocks.h", ": -127.0f", ": -126.0f", PORTABLE),
    "list_holds_the_cut": Edit(
        "cpu/filters.cpp",
        "if (!complete && (kept.weight < budget || kept.last.z < list.bound)) return false;",
        "",
        FILTERS,
    ),
    "min_p_floor": Edit("cpu/sample.cpp", "if (floor > filter_.floor)", "if (false)", ("sample",)),
    "ties_by_id": Edit("cpu/filters.cpp", "k_ ? kMaxId : share.last.id};", "kMaxId};", FILTERS),
    "masses_of_what_stays": Edit(
        "cpu/sample.cpp", "filter_.keeps(static_cast<float>(t.z), t.id) ? t.mass : 0.0", "t.mass", ("sample",)
    ),
    "best_always_stays": Edit("cpu/sample.cpp", "filter_.best = best_.id;", "", ("sample",)),
    "large_maxima_in_double": Edit("cpu/sweep.h", MAXIMA, "exceptional.beyond_float", PORTABLE),
    "slack_of_clamped_logits": Edit("cpu/full_sweep.h", "largest < FLT_MAX", "true", PORTABLE),
    "large_scores_in_double": Edit("cpu/full_sweep.h", EXACTLY, "false", PORTABLE),
    "pivot": Edit("cpu/candidates.cpp", "if (c.direction == kVector) {", "if (false) {", CANDIDATES),
    "outside_about_its_maximum": Edit(
        "cpu/candidates.cpp",
        "return c.log_p_of(top) + std::log(sum);",
        "return std::log(std::exp(c.log_p_of(top)) * sum);",
        CANDIDATES,
    ),
    "log_sum_apart": Edit(
        "common.h",
        "return (static_cast<double>(w) - max_w) - log_zw;",
        "return w - (max_w + log_zw);",
        ("sample", "logprob", "extract", "candidates"),
    ),
}
PLANTED |= {name: ("plain", edit, r"check\.h:\d+ ") for name, edit in FIXES.items()}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name):
    sanitizer, edit, message = PLANTED[name]
    if (reason := build.missing(sanitizer)) is not None:
        pytest.skip(reason)
    program = build.build(sanitizer, edit)
    done = build.replay(program, "-hex", str(build.CORPUS), str(STEP.get(sanitizer, 1)))
    program.unlink()
    assert done.returncode != 0, f"{name}: nothing noticed"
    if done.returncode != -signal.SIGSEGV:
        assert re.search(message, done.stderr), done.stderr[-3000:]
