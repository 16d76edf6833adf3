"""The GPU check where there is no GPU: it says so, loses no step, and its verdicts can be bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import svdk
from svdk.bench import cases, gpu_check, gpu_steps, machine, timing
from tests import ROOT
from tests.helpers import ops_cases as oc
from tests.helpers import triton_interpreter

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run it")
COMMAND = [sys.executable, "-m", "svdk.bench.gpu_check"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@NO_GPU
def test_it_refuses_clearly_without_a_gpu(tmp_path):
    output = tmp_path / "gpu.json"
    done = run("--output", str(output))
    assert done.returncode == 2
    for name in gpu_check.BACKENDS:
        assert f"the {name} backend cannot run here: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_help_names_every_step(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(step in shown for step in gpu_check.steps(gpu_check.BACKENDS, ROOT))


def test_both_backends_go_through_every_step_within_the_limit():
    steps = gpu_check.steps(gpu_check.BACKENDS, ROOT)
    for name in ("distributions", "agreement", "graphs", "tests", "memcheck"):
        assert {f"{name}_cuda", f"{name}_triton"} <= set(steps)
    assert gpu_check.LIMIT < 480
    alone = sum(step.seconds for step in steps.values() if step.alone)
    longest = max(step.seconds for step in steps.values() if not step.alone)
    assert alone + longest <= gpu_check.LIMIT, "the longest step must fit beside those that measure"
    assert set(gpu_check.steps(["triton"], ROOT)) < set(steps)


# --- the runner


def python(code: str, seconds: float = 20, alone: bool = False) -> gpu_check.Step:
    return gpu_check.Step(lambda outcome: [sys.executable, "-c", code, str(outcome)], seconds, alone)


def outcomes(jobs: int = 4, limit: float = 60, **steps: gpu_check.Step) -> dict[str, dict]:
    found = {}
    gpu_check.run_steps(steps, jobs, limit, lambda name, outcome: found.update({name: outcome}))
    return found


REPORT = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({}))\n"


def test_a_step_that_fails_in_any_way_loses_no_other():
    found = outcomes(
        good=python(REPORT.format({"ok": True, "n": 3})),
        silent=python("print('a test')"),
        bad=python(REPORT.format({"ok": False, "detail": "row 3 differs"})),
        raises=python(REPORT.format({"ok": True, "rows": [1, 2]}) + "raise RuntimeError('launch failed')"),
        dies=python("import os; os.abort()"),
        hangs=python(
            REPORT.format({"ok": True, "rows": [1]})
            + "import time; print('at 2', flush=True); time.sleep(99)",
            seconds=3,
        ),
        absent=gpu_check.Step(lambda _: ["no-such-program"], 5, why_not="no-such-program is not on PATH"),
        last=python("print('after all')", alone=True),
    )
    assert {name: one["ok"] for name, one in found.items()} == {
        "good": True, "silent": True, "bad": False, "raises": False, "dies": False, "hangs": False,
        "absent": None, "last": True,
    }  # fmt: skip
    assert found["good"]["n"] == 3
    assert found["bad"]["detail"] == "row 3 differs"
    assert found["raises"]["rows"] == [1, 2]
    assert "launch failed" in found["raises"]["detail"]
    assert found["hangs"]["rows"] == [1], "what was found before the end of its time is kept"
    assert "not done after 3 s\nat 2" in found["hangs"]["detail"]
    assert list(found)[-1] == "last"


def test_a_hanging_step_takes_its_children_with_it(tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcomes(hangs=python(code, seconds=3))
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    raise AssertionError("the child of a step that was ended lives on")


def test_the_limit_holds_and_what_measures_keeps_its_time():
    start = time.monotonic()
    steps = {f"slow{i}": python("import time; time.sleep(30)") for i in range(3)}
    found = outcomes(jobs=1, limit=6, **steps, times=python("print(1)", seconds=4, alone=True))
    assert time.monotonic() - start < 12
    assert [one["ok"] for one in found.values()] == [False, None, None, True]
    assert "no time was left" in found["slow1"]["detail"]


def test_what_measures_runs_alone(tmp_path):
    busy = f"import os, time; p = {str(tmp_path / 'busy')!r}; open(p, 'w'); time.sleep(1); os.remove(p)"
    free = f"import os, sys; sys.exit(os.path.exists({str(tmp_path / 'busy')!r}))"
    assert all(one["ok"] for one in outcomes(times=python(free, alone=True), tests=python(busy)).values())


def test_an_unavailable_backend_is_a_failure_and_the_other_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "refusals", lambda _: {"cuda": "it was not built"})
    steps = {"times": python(REPORT.format({"ok": True, "rows": []})), "tests": python("print(1)")}
    monkeypatch.setattr(gpu_check, "steps", lambda *_: steps)
    output = tmp_path / "gpu.json"
    assert gpu_check.main(["--output", str(output), "--device", "cpu"]) == 1
    report = json.loads(output.read_text())
    assert report["steps"]["backend_cuda"] == {"ok": False, "detail": "it was not built"}
    assert report["steps"]["tests"]["ok"] is True
    assert {target["met"] for target in report["targets"]} == {None}
    assert "it was not built" in capsys.readouterr().err


def test_tests_that_are_not_there_are_a_failure_and_the_rest_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "refusals", lambda _: {})
    every = gpu_check.steps

    def few(backends, root):
        tests = {name: step for name, step in every(backends, root).items() if name.startswith("tests_")}
        return {**tests, "times": python(REPORT.format({"ok": True, "rows": []}))}

    monkeypatch.setattr(gpu_check, "steps", few)
    output = tmp_path / "gpu.json"
    wanted = ["--output", str(output), "--device", "cpu", "--root", str(tmp_path)]
    said = f"--root was {tmp_path}, which has no tests/ops/test_ops.py; allowed: a checkout of svdk"
    assert gpu_check.main([*wanted, "--only", "tests_cuda", "tests_triton"]) == 2
    assert not output.exists()
    assert capsys.readouterr().err.count(said) == 2
    assert gpu_check.main(wanted) == 1
    steps = json.loads(output.read_text())["steps"]
    assert steps["tests_cuda"] == steps["tests_triton"] == {"ok": False, "detail": said}
    assert steps["times"]["ok"] is True
    assert gpu_check.main([*wanted, "--only", "times"]) == 0
    assert {name: step.folder for name, step in every(gpu_check.BACKENDS, ROOT).items() if step.folder} == {
        "tests_cuda": ROOT, "tests_triton": ROOT,
    }  # fmt: skip
    assert not gpu_check.untestable(every(gpu_check.BACKENDS, ROOT))


# --- the steps, on the CPU


def test_a_step_as_its_own_process(tmp_path):
    output = tmp_path / "step.json"
    done = run("--device", "cpu", "--step", "exercise", "cpu", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text()) == {"ok": True}


def last(step, *arguments):
    *_, outcome = step(*arguments)
    return outcome


def test_distributions_and_agreement_hold_for_the_cpu_and_notice_a_biased_sampler(monkeypatch):
    monkeypatch.setattr(gpu_steps, "DRAWS", 400_000)
    monkeypatch.setattr(gpu_steps, "AGREEING", 256)
    assert last(gpu_steps.distributions, CPU, "cpu")["ok"]
    assert last(gpu_steps.agreement, CPU, "cpu")["ok"]
    right = svdk.steered_sample

    def biased(*args, temperature=1.0, **kwargs):
        return right(*args, temperature=temperature * 1.05, **kwargs)

    monkeypatch.setattr(svdk, "steered_sample", biased)
    assert not last(gpu_steps.distributions, CPU, "cpu")["ok"]

    def off_by_one(*args, **kwargs):
        return right(*args, **kwargs) + (kwargs.get("backend") == "cpu")

    monkeypatch.setattr(svdk, "steered_sample", off_by_one)
    assert not last(gpu_steps.agreement, CPU, "cpu")["ok"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gpu_steps, "VOCAB", 999)
    monkeypatch.setattr(gpu_steps, "BATCHES", (2, 1))
    monkeypatch.setattr(gpu_steps, "PLAN", timing.Plan(seconds=0.002, rounds=2))
    monkeypatch.setattr(gpu_steps, "BASELINES", ("eager", "softmax+multinomial", "flashinfer"))
    monkeypatch.setattr(machine, "bandwidth", lambda device: {"copy": 1e9})
    monkeypatch.setattr(machine, "last_cache", lambda device: 1 << 16)


def test_times_keep_going_when_a_contestant_cannot(small, monkeypatch):
    def broken(*_):
        def call(x):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(cases, "compiled", broken)
    outcome = last(gpu_steps.times, CPU, "cpu,reference")
    assert outcome["ok"]
    measured = {(r["setting"], r["batch"], r["cache"], r["contestant"]) for r in outcome["rows"]}
    for setting in ("sample", "plain", "plain_top_k_top_p"):
        for batch in (1, 2):
            for cache in ("cold", "hot"):
                assert {(setting, batch, cache, who) for who in ("cpu", "reference")} <= measured
    assert ("sample", 2, "cold", "eager") in measured
    assert any("compile: RuntimeError: no compiler" in line for line in outcome["skipped"])
    assert any("flashinfer_logits: ModuleNotFoundError" in line for line in outcome["skipped"])
    monkeypatch.setitem(gpu_steps.SECONDS, "times", 0)
    outcome = last(lambda *a: [{"rows": []}, *gpu_steps.times(*a)], CPU, "cpu")
    assert outcome["rows"] == []


def test_a_backend_that_cannot_be_timed_fails_the_step(small, monkeypatch):
    monkeypatch.setattr(cases, "compiled", lambda *_: lambda x: x.warm)
    outcome = last(gpu_steps.times, CPU, "cpu,cuda")
    assert not outcome["ok"]
    assert any("cuda: BackendError" in line for line in outcome["skipped"])
    assert any(row["contestant"] == "cpu" for row in outcome["rows"])


@pytest.mark.skipif("triton" not in oc.kernels(), reason="triton is not installed")
@NO_GPU
def test_tuning_measures_every_candidate(small, monkeypatch):
    from svdk.kernels import tuning

    triton_interpreter.enable()
    few = (tuning.INTERPRETED, tuning.Config(block=256, cap=64, programs=2))
    monkeypatch.setattr(tuning, "CANDIDATES", few)
    outcome = last(gpu_steps.tuning, CPU, "triton")
    assert [row["batch"] for row in outcome["rows"]] == [2, 2, 1, 1]
    assert {row["config"] for row in outcome["rows"]} == set(map(str, few))
    assert sum(row.get("best", False) for row in outcome["rows"]) == 2
    assert not outcome["skipped"]


# --- the verdicts


def test_targets_are_met_missed_or_open():
    def row(who, batch, us, setting="sample", share=0.85):
        return {
            "setting": setting, "batch": batch, "cache": "cold", "contestant": who, "median_us": us,
            "of_copy_bandwidth": share,
        }  # fmt: skip

    rows = [
        row("cuda", 64, 13.0), row("triton", 64, 16.0), row("eager", 64, 400.0), row("compile", 64, 50.0),
        row("cuda", 1, 9.0), row("triton", 1, 19.0), row("compile", 1, 18.0),
        row("cuda", 8, 10.0, "plain"), row("flashinfer_logits", 8, 11.0, "plain"),
    ]  # fmt: skip
    met = {target["what"]: target["met"] for target in gpu_check.targets(rows)}
    assert met["cuda sample B=64: share of the copy bandwidth"] is True
    assert met["cuda sample B=1: microseconds"] is False
    assert met["cuda sample B=64: times faster than eager"] is True
    assert met["cuda sample B=64: times faster than compile"] is False
    assert met["triton sample B=64: times cuda's time"] is True
    assert met["triton sample B=1: times cuda's time"] is False
    assert met["triton sample B=1: times faster than compile"] is False
    assert met["triton sample B=64: times faster than compile"] is True
    assert met["cuda plain B=8: times faster than FlashInfer on logits"] is True
    assert met["cuda sample B=256: share of the copy bandwidth"] is None
