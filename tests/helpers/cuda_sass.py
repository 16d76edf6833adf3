"""Counts the instructions of the CUDA kernels' hot loops in the machine code; holds them to recorded counts.

No GPU is needed: ``tests/sass/probe.cu`` is compiled for sm_90a and disassembled. The count is that of the
shortest way round a loop that does the work of an iteration (its loads, its exponentials), which ordinary
logits take. ``python tests/helpers/cuda_sass.py [--update]`` compares with (or records in)
``tests/sass/golden.json``, by version of nvcc.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.helpers import cuda_resources  # noqa: E402 - also run as a script

PROBE = ROOT / "tests" / "sass" / "probe.cu"
GOLDEN = ROOT / "tests" / "sass" / "golden.json"
ARCH = "sm_90a"
MORE_INSTRUCTIONS = 1.03
REGISTERS = cuda_resources.REGISTERS // (
    cuda_resources.constant("kThreads") * cuda_resources.constant("kMinBlocks")
)


@dataclass(frozen=True)
class Loop:
    """A hot loop of the probe: what an iteration of a thread does at least."""

    kernel: str
    items: int  # pairs of logits, or tokens
    loads: int  # of 16 bytes
    exponentials: int
    shared: int = 0  # reads of shared memory


LOOPS = {
    "steered": Loop("probe_first_sweep", items=16, loads=4, exponentials=32, shared=1),
    "plain": Loop("probe_draw_row", items=16, loads=2, exponentials=16),
}


@dataclass(frozen=True)
class Counts:
    """What the machine code of one loop says."""

    instructions: float  # an item, on the ordinary way
    in_flight: int  # 16-byte loads of a thread that have been issued before the first is waited for
    local: int  # accesses to local memory, anywhere in the loop
    double: int  # instructions in double precision, likewise
    registers: int
    stalls: int  # sum of the stall counts on the ordinary way: clocks of a warp alone
    branches: int  # on the ordinary way
    size: int  # of the loop, all ways together


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly, with what its control bits say."""

    address: int
    text: str
    stall: int
    sets: int  # scoreboard that it sets when its result is there; 7: none
    waits: int  # scoreboards that it waits for, a bit each

    @property
    def opcode(self) -> str:
        return self.text.split()[1 if self.text.startswith("@") else 0]

    @property
    def wide_load(self) -> bool:
        return self.opcode.startswith("LDG.E") and ".128" in self.opcode

    @property
    def in_double(self) -> bool:
        return bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", self.opcode)) or "64" in "".join(
            part for part in self.opcode.split(".")[1:] if part.startswith("F64") or part.endswith("64H")
        )

    @property
    def work(self) -> tuple[int, int, int]:
        return (
            int(self.wide_load),
            int(self.opcode.startswith("MUFU.EX2")),
            int(self.opcode.startswith("LDS")),
        )


@dataclass
class Code:
    """A kernel: its instructions, and where each label stands among them."""

    instructions: list[Instruction]
    labels: dict[str, int]


def _tool(name: str) -> str | None:
    """A program on the path, or of a package in this environment."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return shutil.which(name) or next((str(p) for p in sorted(packages.glob(f"*/bin/{name}"))), None)


def missing() -> str | None:
    """Why nothing can be counted here, if so."""
    absent = [name for name in ("nvcc", "nvdisasm") if _tool(name) is None]
    return f"no {' and no '.join(absent)} here" if absent else None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def nvcc_version() -> str:
    """Of the compiler, as ``13.0``."""
    found = re.search(r"release (\d+\.\d+)", _run(str(_tool("nvcc")), "--version"))
    assert found, "nvcc does not say its version"
    return found.group(1)


def disassembly(csrc: Path = cuda_resources.CSRC) -> tuple[str, str]:
    """Of the probe: the listing, and the compiler's resource report."""
    nvcc, nvdisasm = _tool("nvcc"), _tool("nvdisasm")
    assert nvcc and nvdisasm, missing()
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "probe.cubin")
        flags = ["-std=c++17", "-O3", "-cubin", f"-arch={ARCH}", "-Xptxas=-v", f"-I{csrc}"]
        report = _run(nvcc, *flags, "-o", cubin, str(PROBE))
        return _run(nvdisasm, "-hex", "-c", cubin), report


_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")


def parse(listing: str) -> dict[str, Code]:
    """The kernels of ``nvdisasm -hex -c``, by their names."""
    kernels: dict[str, Code] = {}
    code, half = Code([], {}), None
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            code = kernels.setdefault(section.group(1), Code([], {}))
        elif label := _LABEL.match(line):
            code.labels[label.group(1)] = len(code.instructions)
        elif first := _LINE.match(line):
            half = first
        elif half and (second := _CONTROL.match(line)):
            # The upper 23 bits: 4 of stall count, 1, 3 of the scoreboard that is set, 3, 6 to wait for.
            bits = int(second.group(1), 16) >> 41
            found = (bits & 15, bits >> 5 & 7, bits >> 11 & 63)
            code.instructions.append(Instruction(int(half.group(1), 16), half.group(2), *found))
            half = None
    return kernels


def _target(code: Code, text: str) -> int:
    return code.labels[re.findall(r"\.L_x_\d+", text)[-1]]


_PREDICATE = re.compile(r"!?(?:UP|P)\d\b")
_CONDITION = re.compile(r"@(!?)((?:UP|P)\d)\b")
Known = tuple[tuple[str, int], ...]


def _with(known: Known, name: str, value: int) -> Known:
    return (*(x for x in known if x[0] != name), (name, value))


def _without_written(x: Instruction, known: Known) -> Known:
    """What is still known after an instruction: no predicate among its first operands, where results go."""
    operands = x.text.split(x.opcode, 1)[1].split(",")[:3]
    written = {p for operand in operands for p in _PREDICATE.findall(operand)}
    return tuple(k for k in known if k[0] not in written) if written else known


def _next(code: Code, at: int, known: Known) -> Iterator[tuple[int, Known]]:
    """Where a warp may go on from an instruction.

    ``known``: where each convergence barrier lets go on, and which predicates are true (1) or false (0) by
    the branches that were taken, so that a way does not take one condition both ways.
    """
    x = code.instructions[at]
    kind = x.opcode.split(".")[0]
    conditions = [(c.group(2), int(not c.group(1))) for c in [_CONDITION.match(x.text)] if c]
    if kind == "BRA":
        operand = re.search(r"BRA\S*\s+(!?)((?:UP|P)\d)\b", x.text)
        if operand:
            conditions.append((operand.group(2), int(not operand.group(1))))
    falls = [(at + 1, _without_written(x, known))] if at + 1 < len(code.instructions) else []
    if kind == "BSSY":
        name = x.text.split()[-2].rstrip(",")
        return iter([(at + 1, _with(known, name, _target(code, x.text)))])
    if kind == "BSYNC":
        return iter([(target, known) for name, target in known if name == x.text.split()[-1]])
    if kind in ("EXIT", "RET", "CALL", "BRX", "JMP", "BPT"):
        return iter(falls if conditions else [])
    if kind != "BRA" or ".DIV" in x.opcode:  # the lanes of a warp stay together
        return iter(falls)
    taken, held = known, dict(known)
    ways = []
    if all(held.get(name, value) == value for name, value in conditions):
        for name, value in conditions:
            taken = _with(taken, name, value)
        ways.append((_target(code, x.text), taken))
    if len(conditions) == 1:
        ((name, value),) = conditions
        if held.get(name, 1 - value) != value:
            ways.append((at + 1, _with(known, name, 1 - value)))
    elif any(held.get(name, 1 - value) != value for name, value in conditions):
        ways.append((at + 1, known))
    return iter(ways)


def shortest_way(code: Code, start: int, loop: Loop) -> list[Instruction] | None:
    """The fewest instructions from ``start`` back to it that do the work of an iteration."""
    need = (loop.loads, loop.exponentials, loop.shared)
    done: tuple[int, ...] = (0, 0, 0)
    nothing: Known = ()
    first = (start, done, nothing)
    before: dict[tuple, tuple | None] = {first: None}
    front = [first]
    while front:
        following = []
        for state in front:
            at, done, waits = state
            done = tuple(
                min(n, d + w) for n, d, w in zip(need, done, code.instructions[at].work, strict=True)
            )
            for target, barriers in _next(code, at, waits):
                if target == start and done == need:
                    way: list[Instruction] = []
                    step: tuple | None = state
                    while step is not None:
                        way.append(code.instructions[step[0]])
                        step = before[step]
                    return way[::-1]
                reached = (target, done, barriers)
                if target != start and reached not in before:
                    before[reached] = state
                    following.append(reached)
        front = following
    return None


def loads_in_flight(way: list[Instruction]) -> int:
    """The most 16-byte loads that are under way at once; loads may be waited for an iteration later."""
    most, under_way = 0, Counter[int]()
    for x in way * 2:
        for board in [b for b in under_way if x.waits >> b & 1]:
            under_way[board] = 0
        if x.wide_load:
            under_way[x.sets] += 1
            most = max(most, sum(under_way.values()))
    return most


def _loops(code: Code) -> list[tuple[int, int]]:
    """First and last instruction of everything that is jumped back over, the shortest first."""
    found = []
    for at, x in enumerate(code.instructions):
        if x.opcode.startswith("BRA") and ".DIV" not in x.opcode and _target(code, x.text) < at:
            found.append((_target(code, x.text), at))
    return sorted(found, key=lambda x: x[1] - x[0])


def measure(code: Code, loop: Loop, registers: int) -> Counts | None:
    """Of the innermost loop that does the work."""
    for start, end in _loops(code):
        body = code.instructions[start : end + 1]
        if sum(x.wide_load for x in body) < loop.loads:
            continue
        way = shortest_way(code, start, loop)
        if way is None:
            continue
        return Counts(
            instructions=round(len(way) / loop.items, 2),
            in_flight=loads_in_flight(way),
            local=sum(bool(re.match(r"(LDL|STL)\b", x.opcode)) for x in body),
            double=sum(x.in_double for x in body),
            registers=registers,
            stalls=sum(x.stall for x in way),
            branches=sum(x.opcode.startswith("BRA") for x in way),
            size=len(body),
        )
    return None


def counts(csrc: Path = cuda_resources.CSRC) -> dict[str, Counts]:
    """Of every hot loop of a source tree."""
    listing, report = disassembly(csrc)
    kernels, resources = parse(listing), cuda_resources.kernels(report)
    found = {}
    for name, loop in LOOPS.items():
        (code,) = (c for kernel, c in kernels.items() if loop.kernel in kernel)
        (needs,) = (r for r in resources if loop.kernel in r.name)
        measured = measure(code, loop, needs.registers)
        assert measured, f"no loop of {loop.kernel} does the work of {name}"
        found[name] = measured
    return found


def problems(found: dict[str, Counts], golden: dict[str, dict]) -> list[str]:
    """What is worse than was recorded, or than may be at all."""
    wrong = []
    for name, got in found.items():
        for what, value, most in (
            ("accesses to local memory", got.local, 0),
            ("instructions in double precision", got.double, 0),
            ("registers", got.registers, REGISTERS),
        ):
            if value > most:
                wrong.append(f"{name}: {value} {what}; allowed: {most}")
        want = golden.get(name)
        if want is None:
            continue
        if got.instructions > want["instructions"] * MORE_INSTRUCTIONS:
            wrong.append(f"{name}: {got.instructions} instructions an item, was {want['instructions']}")
        if got.in_flight < want["in_flight"]:
            wrong.append(f"{name}: {got.in_flight} loads in flight, was {want['in_flight']}")
    return [*wrong, *(f"{name}: not found any more" for name in golden.keys() - found.keys())]


def main(*arguments: str) -> int:
    """Print the counts and what is wrong with them; with ``--update``, record them."""
    if why := missing():
        print(f"svdk: {why}: the instructions of the hot loops were not counted")
        return 0
    version, found = nvcc_version(), counts()
    for name, got in found.items():
        print(f"{name:8} {ARCH}", *(f"{what} {value}" for what, value in asdict(got).items()), sep="  ")
    recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if "--update" in arguments:
        recorded[version] = {name: asdict(got) for name, got in found.items()}
        GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
    if version not in recorded:
        print(f"svdk: no counts recorded for nvcc {version}; only what may not be at all was looked for")
    wrong = problems(found, recorded.get(version, {}))
    print(*wrong, f"{len(found)} hot loops, {len(wrong)} problems", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
