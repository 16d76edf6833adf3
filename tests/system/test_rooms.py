"""The house stays in order: which room imports which, how long files and argument lists get."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests import ROOT

ROOMS = ("utils", "ops", "models", "warmstart", "calibration", "generation", "vllm", "eval", "demo", "cli")
"""In this order: a room imports only rooms to its left."""
SIDE_BY_SIDE = {"demo": {"eval"}}
"""Not even to the left: these know nothing of each other."""
ALIASES = {"backends": "ops", "reference": "ops", "sampling": "ops"}
"""Other names of modules; a room uses the modules themselves."""
MOST_PARAMETERS = 10
PUBLIC = {
    "steered_sample", "steered_logprob", "steered_logits", "top_k_top_p_sampling_from_probs", "generate",
    "decode", "choose",
    "SteeringLogitsProcessor.__init__", "warm_start", "extract_steering", "calibrate", "static_vector",
    "static_steering", "SteeredLM.__init__", "evaluate_harness",
}  # fmt: skip
"""What users call with keywords. Kernels have long launch signatures too; everything else passes objects."""


def sources() -> list[Path]:
    """The Python files of the package, kernels and benchmarks included."""
    folders = (ROOT / "svdk", ROOT / "kernels", ROOT / "bench")
    return sorted(
        path for folder in folders for path in folder.rglob("*.py") if "__pycache__" not in path.parts
    )


FILES = [path for path in sources() if not {"kernels", "bench"} & set(path.relative_to(ROOT).parts[1:-1])]
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of svdk's modules that are imported anywhere in a file, for types too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "svdk"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_room_imports_only_rooms_to_its_left(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] != "svdk" or len(parts) < 3:
        return
    room, rank = parts[1], ROOMS.index(parts[1])
    for name in imported(ast.parse(path.read_text())):
        other = name.split(".")[1] if "." in name else ""
        assert other not in ALIASES, f"{name}: the module itself is in svdk.ops"
        if other in ROOMS and other != room:
            assert ROOMS.index(other) < rank and other not in SIDE_BY_SIDE.get(room, ()), name


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_and_argument_lists_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < 500
    functions = []
    for node in ast.walk(ast.parse(text)):
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        functions += [
            (owner, child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
    for owner, function in functions:
        given = function.args
        names = [
            a.arg
            for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)
            if a.arg not in ("self", "cls")
        ]
        public = owner + function.name in PUBLIC or function.name.endswith("_kernel")
        assert public or len(names) <= MOST_PARAMETERS, f"{function.name} takes {len(names)}"


def test_no_module_shadows_the_standard_library():
    names = {path.stem for path in FILES if path.relative_to(ROOT).parts[0] == "svdk"}
    assert not {name for name in names & sys.stdlib_module_names if not name.startswith("__")}


def test_kernels_have_the_same_files_everywhere():
    shared = {
        "steering",
        "sweep",
        "full_sweep",
        "candidates",
        "filters",
        "sample",
        "logprob",
        "extract",
        "logits",
    }
    for folder in ("csrc/cpu", "csrc/cuda", "kernels"):
        assert shared <= {path.stem for path in (ROOT / folder).iterdir()}, folder


def test_the_tests_mirror_the_rooms():
    rooms = {path.name for path in (ROOT / "svdk").iterdir() if path.is_dir() and path.name != "__pycache__"}
    tested = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert rooms <= tested, rooms - tested
    assert not [path for path in (ROOT / "tests").glob("*.py") if re.match("test_", path.name)]
