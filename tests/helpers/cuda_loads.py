"""Loads a freshly built ``svdk._C_cuda`` and runs its fakes; no GPU needed. Usage: cuda_loads.py FOLDER."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import svdk

OPS = ("steered_sample", "steered_logprob", "extract")


def load(folder: Path) -> None:
    """Import the one ``_C_cuda`` under ``folder`` as part of svdk."""
    (path,) = folder.rglob("_C_cuda*.so")
    spec = importlib.util.spec_from_file_location("svdk._C_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["svdk._C_cuda"] = module


def main(folder: str) -> None:
    """Load, check the registration, run every op on fake CUDA tensors and its refusal on real ones."""
    load(Path(folder))
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"svdk::{op}", "CUDA"), op
    with FakeTensorMode():
        warm = torch.empty(3, 50, device="cuda", dtype=torch.bfloat16)
        token, info = svdk.steered_sample(warm, warm, return_info=True, backend="reference")
        flat = (warm, warm, None, None, None)
        token, floats, ints = torch.ops.svdk.steered_sample(
            *flat, None, 50, 0, 0, -math.inf, 1.0, None, 0.1, None, 1.0, None,
            0, None, 1.0, None, 0.0, None, 7, None, 0, None, True,
        )  # fmt: skip
        assert (token.shape, token.dtype, token.device.type) == ((3,), torch.int64, "cuda")
        assert (floats.shape, ints.shape) == ((5, 3), (2, 3))
        assert info.kl.shape == (3,)
        grid = torch.empty(4, device="cuda")
        curves, greedy, *_ = torch.ops.svdk.steered_logprob(
            *flat, token, 50, 0, 0.0, 0.1, None, 1.0, None, grid
        )
        assert (curves.shape, greedy.shape) == ((3, 3, 4), (3, 4))
    status = svdk.backends.status()["cuda"]
    assert status == "available" or "device" in status, status
    print(f"svdk._C_cuda loads and registers {', '.join(OPS)}; backend: {status}")


if __name__ == "__main__":
    main(sys.argv[1])
