"""``bench/gpu_check.py`` where there is no GPU: it says so, and its statistics can fail."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import svdk
from svdk.bench import gpu_check
from tests import cuda_shim

NO_GPU = pytest.mark.skipif(svdk.backends.status()["cuda"] == "available", reason="this machine can run it")


@NO_GPU
def test_it_refuses_clearly_without_a_gpu(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "svdk.bench.gpu_check", "--output", str(output)]
    done = subprocess.run(command, cwd=cuda_shim.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "the cuda backend cannot run here: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_help_names_every_step(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(step in shown for step in gpu_check.STEPS)


def test_statistics_notice_what_they_should():
    expected = torch.full((100,), 0.5 / 99, dtype=torch.float64)
    expected[0], expected[1] = 0.5, 1e-4
    expected /= expected.sum()
    counts = expected * gpu_check.DRAWS
    assert gpu_check.chi_square_p_value(counts, expected * gpu_check.DRAWS) > 0.99
    assert abs(gpu_check._tail_deviation(counts, expected)) < 1e-6
    counts[1] *= 1.5
    assert gpu_check._tail_deviation(counts, expected) > 4.5
    counts[5] *= 1.2
    assert gpu_check.chi_square_p_value(counts, expected * gpu_check.DRAWS) < 1e-6
