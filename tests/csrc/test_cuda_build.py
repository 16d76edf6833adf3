"""The CUDA kernels compile, without a GPU and without a CUDA build of torch, within what a launch assumes.

``make cuda-check`` does the same for every instantiation and architecture, and loads the module.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests import ROOT
from tests.helpers import cuda_resources, cuda_shim

NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
SOURCE = """
#include "extract.cuh"
#include "logits.cuh"
#include "logprob.cuh"
#include "sample.cuh"
using namespace svdk::cuda;
template __global__ void svdk::cuda::steered_sample_kernel<BFloat16, kBase>(SampleArgs);
template __global__ void svdk::cuda::steered_sample_kernel<float, kNone>(SampleArgs);
template __global__ void svdk::cuda::steered_sample_kernel<Adjusted<BFloat16>, kBase>(SampleArgs);
template __global__ void svdk::cuda::steered_logprob_kernel<float, kBase>(LogprobArgs);
template __global__ void svdk::cuda::steered_logits_kernel<BFloat16, kBase>(LogitsArgs);
template __global__ void svdk::cuda::extract_measure_kernel<Half, kVectorRow>(ExtractArgs);
template __global__ void svdk::cuda::extract_fill_kernel<BFloat16, kBase>(ExtractArgs);
"""


@NEEDS_NVCC
def test_kernels_stay_within_what_the_launch_assumes(tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(SOURCE)
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", "-cubin", "-Xptxas=-v"]
    command += [f"-I{cuda_resources.CSRC}", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = cuda_resources.kernels(done.stderr + done.stdout)
    assert len(found) == 7
    assert cuda_resources.problems(found) == []


HEADERS = [ROOT / "csrc" / "common.h", *sorted(cuda_resources.CSRC.glob("*.cuh"))]


@pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_every_header_includes_what_it_uses(header, tmp_path):
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\n')
    command = [cuda_shim.compiler(), "-std=c++17", "-fsyntax-only", "-DSVDK_SHIM"]
    command += [f"-I{ROOT / 'tests' / 'shim'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


REPORT = """
ptxas info    : Compiling entry function 'good' for 'sm_90a'
ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 40448 bytes smem
ptxas info    : Compiling entry function 'spills' for 'sm_80'
ptxas info    : Function properties for spills
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 50000 bytes smem, 400 bytes cmem[0]
"""


def test_the_report_is_read_right():
    good, bad = cuda_resources.kernels(REPORT)
    assert (good.name, good.arch, good.registers, good.shared) == ("good", "sm_90a", 96, 40448)
    assert cuda_resources.problems([good]) == []
    assert len(cuda_resources.problems([bad])) == 3
