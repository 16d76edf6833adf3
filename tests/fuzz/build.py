"""Builds the fuzzing harness over the C++ CPU kernels: with or without a sanitizer or a planted bug."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc"
CORPUS = HERE / "corpus.txt"
ARCHITECTURES = ("arch_portable", "arch_avx2", "arch_avx512")
UNITS = ("sample", "logprob", "extract", "candidates", "filters", "logits", "arch", *ARCHITECTURES)
"""The kernels without PyTorch: all of csrc/cpu but the binding."""
HARNESS = ("target", "replay")
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread", "-DSVDK_REAL_THREADS"],
}


@dataclass(frozen=True)
class Edit:
    """A planted bug: ``old``, once in ``file`` of csrc, becomes ``new``; ``units`` or target include it."""

    file: str
    old: str
    new: str
    units: tuple[str, ...]


def compiler() -> str | None:
    """The C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def missing(sanitizer: str) -> str | None:
    """Why the compiler cannot build with this sanitizer here; None if it can."""
    if compiler() is None:
        return "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }")
        command = [compiler(), *SANITIZERS[sanitizer], str(source), "-o", str(source.with_suffix(""))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            return f"the compiler has no {sanitizer} sanitizer: {done.stderr.strip().splitlines()[-1]}"
        ran = subprocess.run([source.with_suffix("")], capture_output=True, text=True, timeout=60)
        return (
            f"the {sanitizer} sanitizer does not start here: {ran.stderr[:200]}" if ran.returncode else None
        )


def build(sanitizer: str, edit: Edit | None = None) -> Path:
    """The ``replay`` program; objects are kept between runs, by the hash of all that goes into them."""
    flags = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-pthread",
        "-w",
        "-DSVDK_SLICE_BLOCKS=1",
        "-DSVDK_CAPACITY=64",
        *SANITIZERS[sanitizer],
    ]
    digest = hashlib.sha256(repr((flags, compiler())).encode())
    for path in sorted(
        [*KERNELS.glob("*.h"), *KERNELS.glob("cpu/*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    ):
        digest.update(path.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"svdk-fuzz-{os.getuid()}" / digest.hexdigest()[:16]
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    objects = {name: kept / f"{name}.o" for name in (*UNITS, *HARNESS)}
    for name, target in objects.items():
        if not target.exists():
            _compile(flags, _source(ROOT, name), target)
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        if edit is not None:
            tree = Path(folder)
            shutil.copytree(KERNELS, tree / "csrc")
            shutil.copytree(HERE, tree / "tests" / "fuzz")
            text = (tree / "csrc" / edit.file).read_text()
            if text.count(edit.old) != 1:
                raise AssertionError(f"{edit.file} has {text.count(edit.old)} of {edit.old!r}; wanted: one")
            (tree / "csrc" / edit.file).write_text(text.replace(edit.old, edit.new))
            for name in edit.units:
                objects[name] = tree / f"{name}.o"
                _compile(flags, _source(tree, name), objects[name])
        label = "replay" if edit is None else "replay-" + hashlib.sha256(repr(edit).encode()).hexdigest()[:8]
        _link(flags, objects.values(), kept / label)
    return kept / label


def _source(root: Path, name: str) -> Path:
    return root.joinpath(*(("tests", "fuzz") if name in HARNESS else ("csrc", "cpu")), f"{name}.cpp")


def _compile(flags: list[str], source: Path, target: Path) -> None:
    part = target.with_suffix(f".{os.getpid()}")  # two test workers may be at it at once
    _run([compiler(), *flags, "-c", str(source), "-o", str(part)])
    os.replace(part, target)


def _link(flags: list[str], objects, target: Path) -> None:
    part = target.with_suffix(f".{os.getpid()}")
    _run([compiler(), *flags, *map(str, objects), "-o", str(part)])
    os.replace(part, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise AssertionError(done.stderr[-2000:])


def replay(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run it; the exit status and what it said."""
    env = dict(os.environ, ASAN_OPTIONS="abort_on_error=0:detect_leaks=1", TSAN_OPTIONS="halt_on_error=1")
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300, env=env)
