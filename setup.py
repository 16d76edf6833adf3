"""Which extensions to build, and nothing else (metadata: pyproject.toml). SVDK_SKIP_EXT=1 builds none,
SVDK_CUDA=0|1 overrides the detection of CUDA; ``python setup.py preflight`` only says what is missing."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

STABLE_ABI, PYTHON_ABI = "0x020a000000000000", "0x030A0000"  # torch 2.10 and Python 3.10, and all later ones
SKIP, CUDA = os.environ.get("SVDK_SKIP_EXT") == "1", os.environ.get("SVDK_CUDA", "auto")
HINT = "SVDK_SKIP_EXT=1 installs without compiled kernels"


def missing() -> str | None:
    """What this machine lacks for a build, in one line."""
    if sys.version_info < (3, 10):  # noqa: UP036 - pip checks this, make does not
        return f"svdk: Python was {sys.version.split()[0]}; 3.10 or newer is needed"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not SKIP and not any(map(shutil.which, compilers)):
        return f"svdk: no C++ compiler ({' or '.join(compilers)}; Debian: apt-get install g++); {HINT}"
    if not SKIP and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return f"svdk: no Python headers (Python.h; Debian: apt-get install python3-dev); {HINT}"
    return None


if sys.argv[1:] == ["preflight"]:
    sys.exit(missing())

from setuptools import setup  # noqa: E402 - a preflight must not need it


def cuda_missing(torch) -> str | None:
    """Why the CUDA module cannot be built; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    return None if any(Path("csrc/cuda").glob("*.cu")) else "this version of svdk has no CUDA sources"


def extensions() -> dict:
    """The keyword arguments of setup() that build the compiled modules."""
    if SKIP:
        return {}
    if importlib.util.find_spec("torch") is None:
        sys.exit("svdk: torch is needed to build; pip install 'torch>=2.10' first")
    if reason := missing():
        sys.exit(reason)
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if CUDA == "1" and (reason := cuda_missing(torch)):
        sys.exit(f"svdk: SVDK_CUDA=1, but {reason}")
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"]
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12 misreads its own AVX-512 headers
    cpu = CppExtension(
        "svdk._C",
        sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("Py_LIMITED_API", PYTHON_ABI)],
        extra_compile_args={"cxx": flags + quiet},
        depends=[str(p) for p in Path("csrc").rglob("*.h")],
        py_limited_api=True,
    )
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [cpu], "cmdclass": {"build_ext": BuildExtension}, "options": options}


setup(**extensions())
