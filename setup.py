"""Which extensions to build, and nothing else; the metadata is in pyproject.toml.

SVDK_SKIP_EXT=1 builds none (the reference backend still runs).
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup

STABLE_ABI = "0x020a000000000000"  # torch 2.10: one built module serves it and every later release
PYTHON_ABI = "0x030A0000"


def missing() -> str | None:
    """What this machine lacks for a build, in one line."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler} or g++) on PATH"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python headers (Python.h; Debian: python3-dev)"
    return None


def extensions() -> dict:
    """The keyword arguments of setup() that build the compiled modules."""
    if os.environ.get("SVDK_SKIP_EXT") == "1":
        return {}
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("svdk: torch is needed to build; pip install 'torch>=2.10' first")
    if reason := missing():
        raise SystemExit(f"svdk: {reason}; SVDK_SKIP_EXT=1 installs without compiled kernels")
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    cpu = CppExtension(
        "svdk._C",
        sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("Py_LIMITED_API", PYTHON_ABI)],
        extra_compile_args={"cxx": flags},
        depends=[str(p) for p in Path("csrc").rglob("*.h")],
        py_limited_api=True,
    )
    return {
        "ext_modules": [cpu],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
