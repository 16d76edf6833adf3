"""Which extensions to build, and nothing else (metadata: pyproject.toml). SVDK_SKIP_EXT=1 builds none,
SVDK_CUDA=0|1 overrides the detection of CUDA; ``python setup.py preflight`` only says what is missing."""

import importlib.util
import os
import shutil
import subprocess
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
    """Why the CUDA module cannot be built; None if it can, and then CUDA_HOME is set."""
    if CUDA == "0" or torch.version.cuda is None:
        return "SVDK_CUDA=0" if CUDA == "0" else f"torch {torch.__version__} is a build without CUDA"
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    # What is on PATH may be a link or a script; nvcc itself says where it is.
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    here = [line.split("=", 1)[1] for line in said.splitlines() if line.startswith("#$ _HERE_=")]
    os.environ.setdefault("CUDA_HOME", str(Path(here[0]).parent))
    return None


def extensions() -> dict:
    """The keyword arguments of setup() that build the compiled modules."""
    if SKIP:
        return {}
    if importlib.util.find_spec("torch") is None:
        sys.exit("svdk: torch is needed to build; pip install 'torch>=2.10' first")
    if reason := missing():
        sys.exit(reason)
    import torch

    if (no_cuda := cuda_missing(torch)) and CUDA == "1":
        sys.exit(f"svdk: SVDK_CUDA=1, but {no_cuda}")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-warning-option"]
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12 and its AVX-512 headers
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI), ("Py_LIMITED_API", PYTHON_ABI)]
    common = {"depends": [str(p) for p in Path("csrc").rglob("*.*h")], "py_limited_api": True}
    cpu = {"define_macros": macros, "extra_compile_args": {"cxx": flags + quiet}, **common}
    modules = [CppExtension("svdk._C", sorted(map(str, Path("csrc/cpu").glob("*.cpp"))), **cpu)]
    if not no_cuda:
        if not torch.cuda.is_available():  # a build machine: for every architecture there may be
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0a;10.0+PTX")
        nvcc = ["-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fvisibility=hidden"]
        cuda = {"extra_compile_args": {"cxx": flags, "nvcc": nvcc}, **common}
        cuda["define_macros"] = [*macros, ("USE_CUDA", None)]
        modules.append(CUDAExtension("svdk._C_cuda", ["csrc/cuda/binding.cu"], **cuda))
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}, "options": options}


setup(**extensions())
