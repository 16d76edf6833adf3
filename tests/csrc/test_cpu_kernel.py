"""What is special to the C++ kernel: instruction sets, slices and threads, its memory, other compilers."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import svdk
from tests import ROOT
from tests.helpers import ops_cases as oc

pytestmark = pytest.mark.skipif(svdk.backends.status()["cpu"] != "available", reason="svdk._C was not built")
CSRC = ROOT / "csrc" / "cpu"

PROGRAM = """
import torch, svdk, svdk._C
from tests.helpers import ops_cases as oc
torch.set_num_threads(int({threads}))
out = []
for vocab in (31, 999, 40001):
    for dtype in oc.DTYPES:
        warm, base = oc.logits(3, vocab, dtype, seed=2)
        base[0, 5] = warm[1, 7] = float("-inf")
        for case in oc.CASES:
            args, kwargs = oc.operands(case, warm, base)
            out += svdk.steered_sample(*args, **kwargs, seed=1, backend="cpu").tolist()
print(svdk._C.cpu_arch(), *out)
"""


def run(arch: str, threads: int = 1) -> tuple[str, list[str]]:
    env = dict(os.environ, SVDK_CPU_ARCH=arch)
    code = PROGRAM.format(threads=threads)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    name, *tokens = done.stdout.split()
    return name, tokens


@pytest.fixture(scope="module")
def portable_tokens():
    name, tokens = run("portable")
    assert name == "portable"
    return tokens


@pytest.mark.parametrize("arch", ["avx2", "avx512"])
def test_every_instruction_set_draws_the_same_tokens(arch, portable_tokens):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needs = {"avx2": ("avx2", "fma", "f16c"), "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl")}[arch]
    if not all(f" {flag} " in flags.replace("\n", " \n") for flag in needs):
        pytest.skip(f"this processor has no {arch}")
    name, tokens = run(arch)
    assert name == arch
    assert tokens == portable_tokens


def test_an_unknown_instruction_set_is_refused():
    env = dict(os.environ, SVDK_CPU_ARCH="mmx")
    code = "import torch, svdk; svdk.steered_sample(torch.zeros(1, 4), backend='cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "SVDK_CPU_ARCH was 'mmx'; allowed here" in done.stderr


@pytest.mark.parametrize("case", oc.CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_and_slices_do_not_change_a_token(case, batch):
    """With one thread a row is swept whole; with several, few rows are cut into slices."""
    before = torch.get_num_threads()
    warm, base = oc.logits(batch, 70001, seed=batch)
    args, kwargs = oc.operands(case, warm, base)
    results = []
    try:
        for threads in (1, 2, 5, 7):
            torch.set_num_threads(threads)
            results.append(svdk.steered_sample(*args, **kwargs, seed=6, backend="cpu", return_info=True))
    finally:
        torch.set_num_threads(before)
    for token, info in results[1:]:
        assert torch.equal(token, results[0][0])
        for name in ("strength", "kl", "logprob_steered"):
            oc.assert_close(getattr(info, name), getattr(results[0][1], name), name, rtol=1e-5, atol=1e-5)


FULL_ROWS = {
    "log_ratio_everywhere": {"direction": "log_ratio", "alpha": 0.0, "strength": 1.5},
    "finite_penalty": {"penalty": -1.5, "strength": 2.0},
    "kl_budget_everywhere": {"strength_mode": "kl_budget", "strength": 0.5, "alpha": 0.0},
}


@pytest.mark.parametrize("name", FULL_ROWS)
def test_no_bit_depends_on_the_number_of_threads(name):
    """Nor on the batch: K steers every token of a full row, so that its last bit can move a token."""
    before = torch.get_num_threads()
    warm, base = oc.logits(1, 151936, seed=3)
    results = []
    try:
        for threads in (1, 2, 3, 5, 8):
            for batch in (1, 3):
                torch.set_num_threads(threads)
                rows = (warm.expand(batch, -1), base.expand(batch, -1))
                token, info = svdk.steered_sample(*rows, **FULL_ROWS[name], backend="cpu", return_info=True)
                results.append((token[0], info.kl[0], info.strength[0], info.logprob_steered[0]))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for x, y in zip(found, results[0], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("alpha", [0.1, 1e-3])
def test_candidates_beyond_the_buffer_take_the_second_sweep(alpha):
    """Flat rows: far more tokens are within ln(alpha) of the maximum than the buffer holds."""
    warm, base = oc.logits(2, 30000, seed=1, scale=0.05)
    for kwargs in ({}, {"strength_mode": "kl_budget", "strength": 0.01}, {"top_p": 0.5}, {"top_k": 5000}):
        kwargs = dict(kwargs, alpha=alpha)
        token, info = svdk.steered_sample(warm, base, backend="cpu", return_info=True, **kwargs)
        assert int(info.candidates.min()) > 4096
        oc.assert_same_tokens(token, (warm, base), kwargs)
        _, want = svdk.steered_sample(warm, base, backend="reference", return_info=True, **kwargs)
        oc.assert_close(info.strength, want.strength, "strength", rtol=1e-3)


def test_a_rising_maximum_does_not_lose_or_keep_wrong_candidates():
    """Each token above all before it: everything is a candidate for a while, few remain."""
    warm = torch.linspace(-40, 20, 20000)[None].contiguous()
    base = warm.flip(1).contiguous()
    got = svdk.extract(warm, base, backend="cpu")
    want = svdk.extract(warm, base, backend="reference")
    assert torch.equal(got.token_ids, want.token_ids)
    oc.assert_close(got.delta, want.delta, "delta")
    falling = svdk.extract(base, warm, backend="cpu")
    assert torch.equal(falling.token_ids, svdk.extract(base, warm, backend="reference").token_ids)


def test_memory_does_not_grow_with_the_vocabulary():
    """A million-token vocabulary: the calls leave the peak where the logits put it."""
    warm, base = oc.logits(4, 1_000_000)
    svdk.steered_sample(warm[:, :1000], base[:, :1000], backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kwargs in (
        {},
        {"alpha": 0.0, "direction": "log_ratio"},
        {"alpha": 0.0, "top_p": 0.9},
        {"penalty": 0.0},
    ):
        svdk.steered_sample(warm, base, backend="cpu", return_info=True, **kwargs)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 3000, f"{grown_kib} KiB: less than one row of 1,000,000 floats is allowed"


@pytest.mark.parametrize("name", ["aarch64-linux-gnu-g++", "clang++"])
def test_the_kernel_compiles_for_arm_and_with_clang(name, tmp_path):
    compiler = shutil.which(name)
    if compiler is None:
        pytest.skip(f"no {name} (Debian: g++-aarch64-linux-gnu, clang)")
    for source in CSRC.glob("*.cpp"):
        if source.name != "binding.cpp":  # the only file that needs PyTorch's headers
            # To an object: clang looks at the instruction set of inlined functions only when it makes code.
            command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-c", str(source)]
            command += ["-o", str(tmp_path / "kernel.o")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
