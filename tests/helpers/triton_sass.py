"""Counts the instructions of the Triton kernels' hot loops, compiled for sm_90; one JSON line a loop.

Run as a program, without TRITON_INTERPRET: ``python tests/helpers/triton_sass.py``. No GPU is needed. As in
``cuda_sass``, the count is that of the shortest way round a loop that does the work of an iteration.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from svdk.kernels import tuning
from svdk.kernels.sample import steered_sample_kernel
from svdk.ops import schema
from tests.helpers import cuda_sass, triton_aot

LOOPS = {
    "steered": ({}, 2),
    "plain": ({"KIND": schema.PLAIN | triton_aot.DIRECT}, 1),
}
"""What is changed of ``triton_aot.SAMPLE``, and exponentials an item (a pair of logits, or a token)."""


def count(changed: dict, exponentials: int, config: tuning.Config = tuning.DEFAULT) -> dict[str, float]:
    """Instructions an item of a bfloat16 variant's first loop that has an iteration's exponentials."""
    compiled = triton_aot.compile_variant(
        steered_sample_kernel, triton_aot.SAMPLE | changed, "bf16", (), triton_aot.TARGETS["sm_90"]
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = cuda_sass._run(str(cuda_sass._tool("nvdisasm")), "-hex", "-c", str(cubin))
    (code,) = cuda_sass.parse(listing).values()
    items = tuning.block_of(config, 2) // (32 * config.num_warps)
    work = cuda_sass.Loop("", items=items, loads=0, exponentials=items * exponentials)
    for start, end in sorted(cuda_sass._loops(code)):
        body = code.instructions[start : end + 1]
        if sum(x.work[1] for x in body) < work.exponentials:
            continue
        if way := cuda_sass.shortest_way(code, start, work):
            found = {"instructions": round(len(way) / items, 2), "double": sum(x.in_double for x in way)}
            return found | triton_aot.resources(compiled)
    raise AssertionError("no loop does the work of an iteration")


def main() -> int:
    """Print the counts; 77 where there is no disassembler."""
    if cuda_sass._tool("nvdisasm") is None:
        print("svdk: no nvdisasm here: nothing was counted", file=sys.stderr)
        return 77
    for name, (changed, exponentials) in LOOPS.items():
        print(json.dumps({"loop": name, **count(changed, exponentials)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
