"""The filters grid's table, and measuring beside busy loops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from svdk.bench import busy, cases, filter_tables, micro, suite, tables, timing


@pytest.fixture(scope="module")
def found():
    block = micro.Block(cases.FILTERS, batches=(2,), vocabs=(300,), kinds=("zipf",))
    plan = timing.Plan(seconds=0.02, rounds=2, most=4)
    options = suite.Options(
        blocks=(block,), plan=plan, models=(), with_compile=False, bandwidth_seconds=0.01, busy=1
    )
    return suite.run(options, lambda _: None)


def test_every_point_is_measured_quiet_and_busy(found):
    points = [point for point, _ in tables.points(found["micro"])]
    assert [(p["setting"], p["busy"]) for p in points] == [(s, n) for s in cases.FILTERS for n in (0, 1)]
    assert "beside 1 busy loops" in tables.micro(found)
    assert len(tables.quiet(found["micro"])) * 2 == len(found["micro"])


def test_the_tables(found):
    title, table = filter_tables.filters(found | {"micro": tables.quiet(found["micro"])})
    lines = table.splitlines()[2:]
    assert "Filters" in title and len(lines) == len(cases.FILTERS)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[4] for row in cells][:3] == ["greedy", "temperature 1", "top-k 50"]
    assert cells[1][6] == "1.00" and all(float(row[6]) > 0 for row in cells)
    title, table = filter_tables.busy(found["micro"])
    assert "1 busy loops" in title and len(table.splitlines()) == 2 + len(cases.FILTERS)
    assert filter_tables.busy(tables.quiet(found["micro"])) == []
    assert filter_tables.filters({"micro": []}) == []


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_loops_end_with_the_body_and_with_an_error(monkeypatch):
    started = []
    real = subprocess.Popen

    def note(*args, **kwargs):
        started.append(real(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(busy.subprocess, "Popen", note)
    with pytest.raises(KeyboardInterrupt), busy.loaded(2):
        assert len(started) == 2 and all(p.poll() is None for p in started)
        raise KeyboardInterrupt
    assert all(p.returncode == -signal.SIGKILL for p in started)
    with busy.loaded(0):
        assert len(started) == 2


def test_loops_end_with_a_parent_that_was_killed():
    code = (
        "from svdk.bench import busy\nimport subprocess, time\nreal = subprocess.Popen\n"
        "def note(*a, **k):\n p = real(*a, **k)\n print(p.pid, flush=True)\n return p\n"
        "busy.subprocess.Popen = note\n"
        "with busy.loaded(1):\n time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    loop = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while alive(loop) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(loop)
