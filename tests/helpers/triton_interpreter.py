"""Triton's interpreter for tests: ``enable`` sets TRITON_INTERPRET and makes nested calls cheap.

It must run before the first import of ``triton`` in the process (``tests/conftest.py`` sees to that).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings

import torch

HAVE_TRITON = importlib.util.find_spec("triton") is not None


def enable() -> None:
    """Where no GPU is visible, set TRITON_INTERPRET=1 (a caller's own setting stays) and patch."""
    if torch.cuda.is_available() or getattr(enable, "done", False):
        return
    enable.done = True
    late = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
    if late:
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set; enable() must come first")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if not HAVE_TRITON or os.environ["TRITON_INTERPRET"] != "1":
        return
    # NumPy warns of the infinities and NaNs that the kernels handle on purpose.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(function):
        """Helpers run inside their kernel's patched language; patching it again is half of the run time."""
        languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if languages and all(x.range.__name__ == "_new_range" for x in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_once
