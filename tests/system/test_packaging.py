"""What pip installs: the compiled wheel, the pure-Python one, and what the set-up says is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests import ROOT

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "*.so", "__pycache__", "*.egg-info", "demo-out"
)

# This environment's own editable install must not help the copy under test.
USE_IT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", f)).lower()]
import torch, svdk
warm, base = torch.randn(2, 50), torch.randn(2, 50)
print(svdk.__file__, svdk.backends.status()["cpu"], svdk.steered_sample(warm, base).shape)
assert "transformers" not in sys.modules
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unpacked source distribution: what is not in it, no installation has."""
    work = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, work / "svdk", symlinks=True, ignore=NOT_COPIED)
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    code, output = run([sys.executable, "-c", build, work], work / "svdk", SVDK_SKIP_EXT="1")
    assert code == 0, output
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(work / "unpacked", filter="data")
    (folder,) = (work / "unpacked").iterdir()
    return folder


def run(command, cwd, **env):
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=dict(os.environ, **env),
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr


def install(source, target, **env):
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    code, output = run([*pip, "--target", target, "."], source, **env)
    assert code == 0, output


def test_install_with_the_extension(source, tmp_path):
    install(source, tmp_path / "site", USE_NINJA="0")
    code, output = run([sys.executable, "-c", USE_IT], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert code == 0, output
    assert str(tmp_path / "site") in output
    assert "available" in output


def test_install_without_the_extension_runs_on_the_reference(source, tmp_path):
    install(source, tmp_path / "site", SVDK_SKIP_EXT="1")
    assert not list((tmp_path / "site").rglob("*.so"))
    code, output = run([sys.executable, "-c", USE_IT], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert code == 0, output
    assert "was not built" in output


def test_a_broken_extension_is_an_error_not_a_fallback(source, tmp_path):
    install(source, tmp_path / "site", SVDK_SKIP_EXT="1")
    (tmp_path / "site" / "svdk" / "_C.abi3.so").write_bytes(b"no ELF")
    code, output = run([sys.executable, "-c", USE_IT], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert code != 0
    assert "svdk._C is installed but does not load" in output


def test_wheel_contents(source, tmp_path):
    code, output = run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            tmp_path,
            ".",
        ],
        source,
        SVDK_SKIP_EXT="1",
    )
    assert code == 0, output
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"svdk", f"{wheel.name.split('-py3')[0]}.dist-info"}, (
        "never a top-level kernels or tests module"
    )
    assert "svdk/kernels/__init__.py" in names
    assert "svdk/cli/__init__.py" in names
    assert "svdk/demo/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_preflight_says_what_is_missing(tmp_path):
    setup = [sys.executable, ROOT / "setup.py", "preflight"]
    assert run(setup, ROOT) == (0, "")
    code, output = run(setup, ROOT, CXX="no-such-compiler")
    assert code == 1
    assert output.startswith("svdk: no C++ compiler (no-such-compiler;")
    assert output.count("\n") == 1


def test_cuda_on_demand_raises_when_it_cannot(source):
    import torch

    if torch.version.cuda and shutil.which("nvcc") and list((ROOT / "csrc/cuda").glob("*.cu")):
        pytest.skip("this machine can build the CUDA module")
    code, output = run([sys.executable, "setup.py", "build_ext"], source, SVDK_CUDA="1")
    assert code == 1
    assert "svdk: SVDK_CUDA=1, but" in output


def test_import_is_light():
    """``import svdk`` must not pull in transformers, nor anything that takes long."""
    code = (
        "import sys, torch, time; t = time.perf_counter(); import svdk; svdk.steered_sample; "
        "d = time.perf_counter() - t; assert 'transformers' not in sys.modules; "
        "assert 'peft' not in sys.modules; print(d)"
    )
    status, output = run([sys.executable, "-c", code], ROOT)
    assert status == 0, output
