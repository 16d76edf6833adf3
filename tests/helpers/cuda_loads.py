"""Loads a freshly built ``svdk._C_cuda`` and runs its fakes; no GPU needed. Usage: cuda_loads.py FOLDER."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import svdk
from svdk.ops import schema

OPS = ("steered_sample", "steered_logprob", "extract", "steered_logits")


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
        rows = schema.Operands(warm, warm, None, None, None, 50, schema.KL_GRADIENT)
        given = {p.name: schema.PerRow(p.default) for p in schema.PARAMETERS} | {"penalty": -math.inf}
        given |= {"labels": None, "strength_mode": schema.CONSTANT, "info": True}
        given |= {"logit_bias": None, "bitmask": None}
        token, floats, ints = torch.ops.svdk.steered_sample(*schema.STEERED_SAMPLE.flatten(rows, given))
        assert (token.shape, token.dtype, token.device.type) == ((3,), torch.int64, "cuda")
        assert (floats.shape, ints.shape) == ((5, 3), (2, 3))
        assert info.kl.shape == (3,)
        grid = torch.empty(4, device="cuda")
        given |= {"labels": token, "strengths": grid}
        curves, greedy, *_ = torch.ops.svdk.steered_logprob(*schema.STEERED_LOGPROB.flatten(rows, given))
        assert (curves.shape, greedy.shape) == ((3, 3, 4), (3, 4))
        given |= {"skip": None, "out": torch.empty(3, 50, device="cuda")}
        status = torch.ops.svdk.steered_logits(*schema.STEERED_LOGITS.flatten(rows, given))
        assert (status.shape, status.dtype) == ((3,), torch.int32)
    status = svdk.backends.status()["cuda"]
    assert status == "available" or "device" in status, status
    print(f"svdk._C_cuda loads and registers {', '.join(OPS)}; backend: {status}")


if __name__ == "__main__":
    main(sys.argv[1])
