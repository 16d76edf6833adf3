"""Where the CTAs of a cluster run: how many processors they share out among them, read from ``%smid``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

CLUSTERS = 8
SOURCE = """
extern "C" __global__ void __cluster_dims__({size}, 1, 1) __launch_bounds__(256, 2) where(int* out) {{
  __shared__ volatile char as_much_as_svdk[41728];
  as_much_as_svdk[threadIdx.x] = 0;
  unsigned processor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(processor));
  const long long start = clock64();
  while (clock64() - start < 200000) {{}}
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<int>(processor);
}}
"""
"""CTAs as large as those of the kernels, which stay until all have begun."""


def shared_processors(processors: list[int], size: int) -> dict[str, Any]:
    """Of CTAs in the order of their clusters of ``size``: how many clusters have two on one processor."""
    clusters = [processors[i : i + size] for i in range(0, len(processors), size)]
    most = [max(Counter(cluster).values()) for cluster in clusters]
    return {"size": size, "clusters": clusters, "doubled": sum(n > 1 for n in most)}


def measure(device: torch.device, size: int) -> dict[str, Any]:
    """:func:`shared_processors` of ``CLUSTERS`` clusters launched at once, with the default policy."""
    out = torch.empty(CLUSTERS * size, dtype=torch.int32, device=device)
    kernel = torch.cuda._compile_kernel(SOURCE.format(size=size), "where")
    kernel(grid=(len(out), 1, 1), block=(256, 1, 1), args=[out])
    torch.cuda.synchronize(device)
    return shared_processors(out.tolist(), size)
