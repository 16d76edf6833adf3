"""What is in the wheel works from the wheel: the benchmarks and the GPU check, away from any checkout."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from svdk.bench import gpu_check
from tests import ROOT
from tests.system.test_packaging import NOT_COPIED, install, run

# As ``python -m MODULE ARGUMENTS``, but this environment's own editable install must not help.
AS_MODULE = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", f)).lower()]
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with svdk in it, installed by pip, without compiled kernels: what is asked here needs none."""
    work = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT, work / "source", symlinks=True, ignore=NOT_COPIED)
    install(work / "source", work / "site", SVDK_SKIP_EXT="1")
    shutil.rmtree(work / "source")
    return work / "site"


@pytest.fixture
def module(site, tmp_path):
    """``module(NAME, ARGUMENTS...)`` runs it from the installation, in an empty folder: (code, output)."""
    return lambda *arguments: run(
        [sys.executable, "-c", AS_MODULE, *arguments], tmp_path, PYTHONPATH=str(site)
    )


def test_the_command_lines_answer(module):
    code, output = module("svdk", "bench", "--help")
    assert code == 0, output
    assert "--quick" in output
    code, output = module("svdk.bench.gpu_check", "--help")
    assert code == 0, output
    assert all(step in output for step in gpu_check.steps(gpu_check.BACKENDS, ROOT))
    assert "(default: gpu_check.json)" in " ".join(output.split())


def test_a_step_without_tests_runs(module, tmp_path):
    output = tmp_path / "step.json"
    arguments = ("--device", "cpu", "--step", "exercise", "reference", "--output", str(output))
    code, said = module("svdk.bench.gpu_check", *arguments)
    assert code == 0, said
    assert json.loads(output.read_text()) == {"ok": True}


def test_no_checkout_is_taken_for_its_own(site, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".git").mkdir()
    code = "from svdk.bench import machine; print(machine.__file__, machine.checkout(), machine.commit())"
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)) == (
        0, f"{site / 'svdk' / 'bench' / 'machine.py'} None None\n",
    )  # fmt: skip


CHECKOUT = {
    "svdk/__init__.py": "raise ImportError('the svdk beside the tests')",
    "tests/__init__.py": "",
    "tests/helper.py": "",
    "tests/ops/test_ops.py": """
from tests import helper

def test_cuda():
    import svdk

    assert svdk.__file__.startswith({site!r})
""",
    "pyproject.toml": (ROOT / "pyproject.toml").read_text(),
}
ONE_STEP = """
import json, sys
from pathlib import Path
from svdk.bench import gpu_check
gpu_check.SHARED_TESTS = gpu_check.SHARED_TESTS[:1]
step = gpu_check.steps(["cuda"], Path(sys.argv[1]))["tests_cuda"]
gpu_check.run_steps({"tests": step}, 1, 100, lambda _, outcome: print(json.dumps(outcome)))
"""


def test_the_tests_of_a_checkout_are_run_on_what_is_installed(site, tmp_path):
    root = tmp_path / "a checkout"
    for name, text in CHECKOUT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.replace("{site!r}", repr(str(site))))
    (site / "tests").mkdir()
    (site / "tests" / "__init__.py").write_text("raise ImportError('tests that somebody else installed')")
    status, output = run([sys.executable, "-c", ONE_STEP, root], tmp_path, PYTHONPATH=str(site))
    shutil.rmtree(site / "tests")
    assert status == 0, output
    assert json.loads(output)["ok"] is True, output
