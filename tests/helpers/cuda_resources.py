"""Reads the resource report of the CUDA compiler (``-Xptxas=-v``) and says what the launch cannot afford."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
REGISTERS = 64 * 1024  # of a processor, on every architecture from sm_80 on
ADJUSTED = 96
"""Bytes that kernels which adjust logits (bias, mask) may spill: on sm_100 they lack some registers (measured
with CUDA 13.0: 68 bytes at most there; elsewhere none, and 16 bytes of local memory in one on sm_90a)."""
STATIC_SHARED = 48 * 1024  # of a CTA, without opting in to more

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """What one kernel needs on one architecture."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def constant(name: str) -> int:
    """A ``constexpr int`` of the kernels."""
    found = re.search(rf"\b{name} = (\d+)", (CSRC / "platform.cuh").read_text())
    assert found, f"{name} is no longer in platform.cuh"
    return int(found.group(1))


def kernels(report: str) -> list[Kernel]:
    """Every kernel of a compiler report."""
    result = []
    for part in re.split(r"(?=Compiling entry function)", report)[1:]:
        entry, stack, used = _ENTRY.search(part), _STACK.search(part), _USED.search(part)
        assert entry and stack and used, f"not a report of the compiler: {part[:200]}"
        shared = _SHARED.search(part)
        frame, stores, loads = map(int, stack.groups())
        size = int(shared.group(1)) if shared else 0
        result.append(Kernel(*entry.groups(), int(used.group(1)), size, frame, stores + loads))
    return result


def problems(found: list[Kernel]) -> list[str]:
    """What is wrong: spills, local memory, or more than lets ``kMinBlocks`` CTAs be resident."""
    registers = REGISTERS // (constant("kThreads") * constant("kMinBlocks"))
    wrong = []
    for k in found:
        if max(k.spills, k.stack) > (ADJUSTED if "Adjusted" in k.name else 0):
            wrong.append(f"{k.arch} {k.name}: {k.spills} bytes of spills, {k.stack} bytes of local memory")
        if k.registers > registers:
            wrong.append(f"{k.arch} {k.name}: {k.registers} registers; the launch assumes {registers}")
        if k.shared > STATIC_SHARED:
            wrong.append(f"{k.arch} {k.name}: {k.shared} bytes of shared memory; allowed: {STATIC_SHARED}")
    return wrong


def main(path: str) -> int:
    """Check a report file and print a table."""
    found = kernels(Path(path).read_text())
    for k in sorted(found, key=lambda k: (k.arch, k.name)):
        print(f"{k.arch:8} {k.registers:4} registers {k.shared:6} B shared {k.stack:4} B stack  {k.name}")
    wrong = problems(found)
    print(*wrong, f"{len(found)} kernels, {len(wrong)} problems", sep="\n")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
