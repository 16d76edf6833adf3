"""The lint: pre-commit's hooks run what `make lint` runs, and all of it is installed with pinned versions."""

from __future__ import annotations

import re

import pytest

from tests import ROOT
from tests.system.test_supply_chain import group

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")


def hooks() -> list[dict]:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "nothing is fetched"
    return repository["hooks"]


def linted() -> list[str]:
    """The commands of ``make lint``, without the files that they are given."""
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    return [re.sub(r" (\.|\$\(CXX_FILES\))$", "", line.strip()) for line in recipe.splitlines()]


def test_the_hooks_run_the_commands_of_make_lint():
    assert [hook["entry"].replace(".venv", "$(VENV)") for hook in hooks()] == linted()
    tools = {line.removeprefix("$(VENV)/bin/").split()[0] for line in linted()}
    assert tools == {"ruff", "clang-format", "mypy"}
    assert tools <= {line.split("==")[0] for line in group("lint")}
    for hook in hooks():
        assert {"id", "name", "language", "entry"} <= set(hook) and hook["language"] == "system"


def test_the_hooks_look_at_every_file_of_theirs():
    patterns = {hook["id"]: re.compile(hook["files"]) for hook in hooks() if "files" in hook}
    for name, folders, suffixes in (
        ("clang-format", ("csrc", "tests"), {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}),
        ("mypy", ("svdk", "kernels", "bench"), {".py"}),
    ):
        found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
        files = [path.relative_to(ROOT).as_posix() for path in found]
        assert files
        assert not [file for file in files if not patterns[name].search(file)]
    assert patterns["mypy"].search("pyproject.toml")
