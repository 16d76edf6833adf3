"""torch.compile(fullgraph=True) of the Triton backend for a GPU that is not here; prints what came of it.

Run as a program without TRITON_INTERPRET. Stand-in CUDA tensors are traced down to the kernel launch, and
the compiler's own analysis says which arguments the kernel writes; a logits tensor among them would be
copied at every step.
"""

from __future__ import annotations

import json

import torch
import triton
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import svdk
from svdk.kernels import library, tuning
from svdk.ops import backends


class Driver:
    """Names a target; nothing is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    tuning._device = lambda index: ("a GPU", 132)
    backends._resolved["triton", "cuda"] = library.BACKEND
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    with FakeTensorMode(allow_non_fake_inputs=True):
        warm, base = (torch.empty(4, 151936, device="cuda") for _ in range(2))
        rows = torch.empty(4, dtype=torch.int64, device="cuda")
        grid = torch.empty(3, device="cuda")

        def sample(warm, base, seed):
            return svdk.steered_sample(warm, base, seed=seed, offset=7, backend="triton")

        def score(warm, base, labels):
            return svdk.steered_logprob(warm, base, labels, strengths=grid, backend="triton").greedy

        def steer(warm, base, rows):
            return svdk.steered_logits(warm, base, skip=rows > 0, backend="triton")

        for function, launches_of in ((sample, 1), (score, 1), (steer, 2)):
            compiled = torch.compile(
                function, fullgraph=True, backend=lambda g, x: aot_module_simplified(g, x, fw_compiler=keep)
            )
            shape = list(compiled(warm, base, rows).shape)
            nodes = graphs[-1].graph.nodes
            launches = [n for n in nodes if "triton_kernel_wrapper" in str(n.target)]
            written = sorted(n.args[1] for n in nodes if "getitem" in str(n.target) and n.args[0] in launches)
            line = {"name": function.__name__, "shape": shape, "launches": len(launches), "kept": written}
            print(json.dumps(line | {"expected": launches_of}))


if __name__ == "__main__":
    main()
