"""The gate on the machine code of the CUDA kernels' hot loops: what costs fails it, a comment does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import pytest

from tests import ROOT
from tests.helpers import cuda_sass
from tests.helpers.cuda_sass import Counts, Loop

GOOD = Counts(20.0, 4, 0, 0, 100, 500, 10, 900)
GOLDEN = {"steered": asdict(GOOD)}
NEEDS_TOOLS = pytest.mark.skipif(cuda_sass.missing() is not None, reason=str(cuda_sass.missing()))


@pytest.mark.parametrize(
    "doctored",
    [{"instructions": 20.7}, {"in_flight": 3}, {"local": 1}, {"double": 1}, {"registers": 129}],
    ids=lambda x: next(iter(x)),
)
def test_what_costs_fails(doctored):
    (problem,) = cuda_sass.problems({"steered": replace(GOOD, **doctored)}, GOLDEN)
    assert problem.startswith(f"steered: {next(iter(doctored.values()))} ")


@pytest.mark.parametrize(
    "harmless", [{}, {"instructions": 20.6}, {"in_flight": 5}, {"size": 2000}, {"registers": 128}]
)
def test_what_costs_nothing_passes(harmless):
    assert cuda_sass.problems({"steered": replace(GOOD, **harmless)}, GOLDEN) == []


def test_a_loop_that_is_gone_fails():
    assert cuda_sass.problems({}, GOLDEN) == ["steered: not found any more"]


@pytest.mark.parametrize("doctored", [{"local": 1}, {"double": 1}, {"registers": 129}])
def test_limits_hold_without_recorded_counts(doctored):
    assert cuda_sass.problems({"steered": GOOD}, {}) == []
    assert len(cuda_sass.problems({"steered": replace(GOOD, **doctored)}, {})) == 1


def test_main_fails_and_says_why_nothing_was_counted(monkeypatch, capsys, tmp_path):
    golden = tmp_path / "golden.json"
    golden.write_text(json.dumps({"1.0": GOLDEN}))
    monkeypatch.setattr(cuda_sass, "GOLDEN", golden)
    monkeypatch.setattr(cuda_sass, "missing", lambda: None)
    monkeypatch.setattr(cuda_sass, "nvcc_version", lambda: "1.0")
    monkeypatch.setattr(cuda_sass, "counts", lambda: {"steered": replace(GOOD, in_flight=1)})
    assert cuda_sass.main() == 1
    assert cuda_sass.main("--update") == 0
    assert cuda_sass.main() == 0
    monkeypatch.setattr(cuda_sass, "nvcc_version", lambda: "2.0")
    assert cuda_sass.main() == 0
    assert "no counts recorded for nvcc 2.0" in capsys.readouterr().out
    monkeypatch.setattr(cuda_sass, "missing", lambda: "no nvcc here")
    assert cuda_sass.main() == 0
    assert "no nvcc here" in capsys.readouterr().out


def line(address: int, text: str, stall: int = 1, sets: int = 7, waits: int = 0) -> str:
    control = (stall | sets << 5 | waits << 11) << 41
    return f"        /*{address:04x}*/    {text} ;   /* 0x{0:016x} */\n      /* 0x{control:016x} */\n"


def listing(*lines: str) -> str:
    head = "//--------------------- .text.kernel --------------------------\n"
    body, address = "", 0
    for text in lines:
        if text.startswith("."):
            body += f"{text}:\n"
        elif text.startswith(" "):  # given with its control bits
            body += text
        else:
            body += line(address, text)
        address += 16
    return head + body


LOOP = (
    ".L_x_1",
    line(0x10, "LDG.E.NA.128.CONSTANT R4, [R2]", sets=1),
    line(0x20, "LDG.E.NA.128.CONSTANT R8, [R2]", sets=1),
    "@!P0 BRA `(.L_x_2)",
    *["FADD R1, R1, R2"] * 5,  # where P0 holds
    ".L_x_2",
    line(0xA0, "MUFU.EX2 R4, R4", waits=0b10),
    "@P0 BRA `(.L_x_3)",
    *["FMUL R1, R1, R2"] * 3,  # where it does not
    ".L_x_3",
    "@P1 BRA `(.L_x_1)",
    "EXIT",
)


def counted(*lines: str, **changes: int) -> Counts:
    code = cuda_sass.parse(listing(*lines))["kernel"]
    found = cuda_sass.measure(code, replace(Loop("kernel", 1, 2, 1), **changes), 40)
    assert found
    return found


def test_the_shortest_way_takes_no_condition_both_ways():
    """Without P0: 3 loads and branches, the exponential and its branch, 3 products, the branch back."""
    got = counted(*LOOP)
    assert (got.instructions, got.in_flight, got.registers, got.branches) == (9, 2, 40, 3)
    rewritten = [*LOOP[:10], "ISETP.NE.AND P0, PT, R1, RZ, PT", *LOOP[10:]]
    assert counted(*rewritten).instructions == 7  # P0 is another one by then


def test_a_wait_between_loads_and_slow_instructions_show():
    waits = [*LOOP[:2], line(0x18, "FADD R5, R4, R4", waits=0b10), *LOOP[2:]]
    assert counted(*waits).in_flight == 1
    slow = [*LOOP[:4], "DADD R2, R2, R4", "F2F.F32.F64 R1, R2", "STL [R1], R2", *LOOP[4:]]
    got = counted(*slow)
    assert (got.double, got.local) == (2, 1)


def test_loads_for_the_next_iteration_are_in_flight_over_its_start():
    ahead = (
        ".L_x_1",
        line(0x10, "FADD R1, R4, R4", waits=0b10),
        line(0x20, "LDG.E.128 R4, [R2]", sets=1),
        line(0x30, "FADD R1, R8, R8", waits=0b100),
        line(0x40, "LDG.E.128 R8, [R2]", sets=2),
        "@P1 BRA `(.L_x_1)",
    )
    assert counted(*ahead, exponentials=0).in_flight == 2


def test_a_barrier_lets_go_on_where_it_was_set_up():
    way = (
        ".L_x_1",
        line(0x10, "LDG.E.128 R4, [R2]", sets=1),
        line(0x20, "LDG.E.128 R8, [R2]", sets=1),
        "BSSY B0, `(.L_x_2)",
        "MUFU.EX2 R4, R4",
        "BSYNC B0",
        *["FADD R1, R1, R2"] * 9,
        ".L_x_2",
        "@P1 BRA `(.L_x_1)",
    )
    assert counted(*way).instructions == 6


@NEEDS_TOOLS
def test_the_hot_loops_are_as_recorded():
    recorded = json.loads(cuda_sass.GOLDEN.read_text())
    assert cuda_sass.problems(cuda_sass.counts(), recorded.get(cuda_sass.nvcc_version(), {})) == []


@NEEDS_TOOLS
def test_a_comment_costs_nothing_and_a_load_that_is_used_at_once_does(tmp_path):
    before = cuda_sass.counts()
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    sweep = csrc / "cuda" / "sweep.cuh"
    sweep.write_text("// A comment.\n" + sweep.read_text().replace("SVDK_UNROLL\n", "SVDK_UNROLL  // here\n"))
    assert cuda_sass.counts(csrc / "cuda") == before
    read = csrc / "cuda" / "read.cuh"
    text = read.read_text()
    assert "kInFlight = 2;" in text
    read.write_text(text.replace("kInFlight = 2;", "kInFlight = 1;", 1))
    loops = {
        name: replace(x, loads=x.loads // 2, exponentials=x.exponentials // 2, items=x.items // 2)
        for name, x in cuda_sass.LOOPS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_sass, "LOOPS", loops)
        worse = cuda_sass.counts(csrc / "cuda")
    recorded = {name: asdict(x) for name, x in before.items()}
    assert any("loads in flight" in problem for problem in cuda_sass.problems(worse, recorded))
