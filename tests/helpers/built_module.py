"""One built wheel under another PyTorch: ``PYTHON tests/helpers/built_module.py SITE``, svdk being in SITE.

Needs torch, numpy and pytest in that Python. Runs every case of the shared test body on the CPU kernels
against the reference, and the ops under torch.compile's tracing, and prints the versions.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(site: str) -> None:
    """Check the CPU module installed in ``site``; raises AssertionError with the case."""
    sys.path[:0] = [site, str(Path(__file__).resolve().parents[2])]
    # An editable install of the source tree must not stand in for what is under test.
    sys.meta_path[:] = [
        f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", f)).lower()
    ]
    import torch

    import svdk
    from svdk import _C
    from tests.helpers import ops_cases as oc

    for module in (svdk, _C):
        assert module.__file__.startswith(site), f"{module.__name__} came from {module.__file__}"
    assert svdk.backends.status()["cpu"] == "available"
    labels = torch.tensor([0, 3, 998])
    checked = 0
    for dtype in oc.DTYPES:
        warm, base = oc.logits(3, 999, dtype, seed=1)
        for case in oc.CASES:
            args, kwargs = oc.operands(case, warm, base)
            token, info = svdk.steered_sample(*args, **kwargs, seed=7, backend="cpu", return_info=True)
            oc.assert_same_tokens(token, args, kwargs | {"seed": 7})
            assert int(info.status.max()) == 0
            checked += 1
        got, want = (
            svdk.steered_logprob(warm, base, labels, strengths=torch.tensor([-1.0, 2.0]), backend=name)
            for name in ("cpu", "reference")
        )
        oc.assert_close(got.logprob, want.logprob, f"logprob {dtype}")
        got, want = (svdk.extract(warm, base, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(got.token_ids, want.token_ids)
    graph = torch.compile(
        lambda w, b: svdk.steered_sample(w, b, seed=3) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(graph(warm, base), svdk.steered_sample(warm, base, seed=3) + 1)
    print(
        f"svdk {svdk.__version__} ({Path(_C.__file__).name}) under torch {torch.__version__}: {checked} cases"
    )


if __name__ == "__main__":
    main(sys.argv[1])
