"""Every name in docs/algorithm.md exists, where the document says it is."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.ops.test_algorithm import DOCUMENT, NAIVE, ROOT

SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
SOURCES = {
    "reference": ["svdk/ops/reference.py"],
    "CPU": ["csrc/common.h", "csrc/cpu/*"],
    "CUDA": ["csrc/common.h", "csrc/cuda/*"],
    "Triton": ["kernels/*.py"],
}


def tables() -> Iterator[list[list[str]]]:
    """The cells of every table of the document, row by row, the head first."""
    for table in re.findall(r"(?:^\|.*\n)+", DOCUMENT, re.MULTILINE):
        rows = [line.strip("|").split("|") for line in table.splitlines()]
        yield [rows[0], *rows[2:]]


class Place(NamedTuple):
    """What a row of a table says of a column: this step or operation is there."""

    row: str
    file: str
    names: list[str]


def places() -> Iterator[Place]:
    """Every place of the tables whose columns are headed by a file, or by the folder of the files in it."""
    for head, *rows in tables():
        folders = [re.findall("`(.*/.*)`", cell) for cell in head]
        for row in rows:
            for folder, cell in zip(folders, row, strict=True):
                words, file = re.findall("`([^`]+)`", cell) if folder else [], folder[0] if folder else ""
                while words:
                    if words[0].endswith(SUFFIXES):
                        file = folder[0] + words.pop(0)
                    names = list(itertools.takewhile(lambda word: not word.endswith(SUFFIXES), words))
                    words = words[len(names) :]
                    yield Place(row[0].strip(), file, names)


def source(*patterns: str) -> str:
    """The text of all files that fit."""
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path.suffix in SUFFIXES]
    assert files, patterns
    return "\n".join(path.read_text() for path in files)


def test_every_place_in_the_tables_exists():
    found = list(places())
    assert len(found) >= 4 * 15
    gone = [place for place in found if not (ROOT / place.file).is_file() or not place.names]
    assert gone == []
    text = {place.file: (ROOT / place.file).read_text() for place in found}
    missing = [
        (p.file, name) for p in found for name in p.names if not re.search(rf"\b{name}\b", text[p.file])
    ]
    assert missing == []


def test_sixteen_names_are_shared():
    (names,) = (rows for head, *rows in tables() if head[0].strip() == "name")
    assert len(names) == 16
    for implementation, patterns in SOURCES.items():
        text = source(*patterns)
        shared = [name.strip(" `") for name, what, _ in names if f"not in the {implementation}" not in what]
        assert len(shared) >= 15
        assert [name for name in shared if not re.search(rf"\b{name}", text)] == [], implementation


def test_every_word_in_code_style_exists():
    text = source("csrc/**/*", "kernels/*.py", "svdk/**/*.py") + NAIVE
    words = set(re.findall("`([A-Za-z]+_\\w*|[A-Z][a-z]+[A-Z]\\w+|svdk(?:[.]\\w+)+)`", DOCUMENT))
    assert len(words) > 30
    assert sorted(word for word in words if not re.search(rf"\b{word.split('.')[-1]}", text)) == []
    files = set(re.findall(r"`((?:\w+/)+[\w.]+)`", DOCUMENT))
    assert sorted(file for file in files if not (ROOT / file).exists()) == []


def steps_in(text: str) -> set[int]:
    """The numbers in "steps 2 to 4 and 7", "all twelve steps" and the like."""
    numbers = set(range(1, 13)) if "all twelve steps" in text else set()
    for said in re.findall(r"\bsteps? ((?:\d+|to|and|[,\s#/*]+)+)", text, re.IGNORECASE):
        numbers.update(map(int, re.findall(r"\d+", said)))
        for first, last in re.findall(r"(\d+)[\s#/*]+to[\s#/*]+(\d+)", said):
            numbers.update(range(int(first), int(last) + 1))
    return numbers


def test_every_kernel_file_says_its_steps_in_its_head():
    silent = []
    for place in places():
        step = re.match(r"\d+", place.row)
        if step and place.file != "svdk/ops/reference.py":
            lines = (ROOT / place.file).read_text().splitlines()
            head = lines if place.file.endswith("common.h") else lines[:25]
            if int(step[0]) not in steps_in("\n".join(head)):
                silent.append((place.file, step[0]))
    assert silent == []
