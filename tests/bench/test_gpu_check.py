"""The GPU check where there is no GPU: it says so, loses no step, and its verdicts can be bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import svdk
from svdk.bench import cases, gpu_check, gpu_steps, logits, machine, placement, timing
from svdk.bench.goodness import PER_TEST, fit_p_values
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
    names = list(steps)
    assert all(steps[name].alone for name in names[:3]) and names[:3] == ["variants", "times", "tuning"]
    assert sum(steps[name].seconds for name in names[:2]) <= gpu_check.LIMIT, "a call that measures"
    rest = [step.seconds for name, step in steps.items() if name not in names[:3]]
    assert not any(steps[name].alone for name in names[3:])
    assert max(rest) + sorted(rest)[-7] <= gpu_check.LIMIT, "a call for the rest, six side by side"
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
        first=python("print('before all')", alone=True),
    )
    assert {name: one["ok"] for name, one in found.items()} == {
        "good": True, "silent": True, "bad": False, "raises": False, "dies": False, "hangs": False,
        "absent": None, "first": True,
    }  # fmt: skip
    assert found["good"]["n"] == 3
    assert found["bad"]["detail"] == "row 3 differs"
    assert found["raises"]["rows"] == [1, 2]
    assert "launch failed" in found["raises"]["detail"]
    assert found["hangs"]["rows"] == [1], "what was found before the end of its time is kept"
    assert "not done after 3 s\nat 2" in found["hangs"]["detail"]
    assert next(iter(found)) == "first"


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


def test_the_limit_holds_and_what_measures_comes_first():
    start = time.monotonic()
    steps = {f"slow{i}": python("import time; time.sleep(30)") for i in range(3)}
    found = outcomes(jobs=1, limit=6, **steps, times=python("print(1)", seconds=4, alone=True))
    assert time.monotonic() - start < 12
    assert [one["ok"] for one in found.values()] == [True, False, None, None]
    assert "no time was left" in found["slow1"]["detail"]


def test_every_outcome_is_in_the_folder_as_soon_as_it_is_there(tmp_path):
    """Also that of a step which another one's end does not wait for, and of one that never ran."""
    seen = {}

    def done(name, outcome):
        seen[name] = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert seen[name] == outcome

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "silent.json").write_text('{"ok": true, "of": "an earlier run"}')
    steps = {
        "times": python(REPORT.format({"ok": True, "rows": [1]}), alone=True),
        "silent": python("print('said')"),
        "raises": python(REPORT.format({"ok": True, "n": 2}) + "raise RuntimeError('lost')"),
        "absent": gpu_check.Step(lambda _: ["none"], 5, why_not="ncu is not on PATH"),
    }
    gpu_check.run_steps(steps, 2, 60, done, tmp_path / "out")
    assert set(seen) == set(steps)
    assert (seen["times"]["rows"], seen["raises"]["n"], seen["raises"]["ok"]) == ([1], 2, False)
    assert "of" not in seen["silent"]
    assert seen["absent"] == {"ok": None, "detail": "ncu is not on PATH"}
    assert "said" in (tmp_path / "out" / "silent.log").read_text()


def test_the_rest_can_be_a_run_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "refusals", lambda _: {})
    steps = {name: python("print(1)") for name in ("times", "tests", "graphs")}
    monkeypatch.setattr(gpu_check, "steps", lambda *_: steps)
    wanted = ["--output", str(tmp_path / "gpu.json"), "--device", "cpu", "--folder", str(tmp_path / "steps")]
    assert gpu_check.main([*wanted, "--skip", "times"]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["steps"]) == {"tests", "graphs"}
    assert {path.name for path in (tmp_path / "steps").glob("*.json")} == {"tests.json", "graphs.json"}
    assert gpu_check.main([*wanted, "--skip", "time"]) == 2
    assert "--skip was ['time']; allowed: times, tests, graphs" in capsys.readouterr().err


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


@NO_GPU
@pytest.mark.parametrize("step", gpu_steps.STEPS)
def test_without_a_gpu_a_step_starts_refuses_and_writes_its_file(step, tmp_path):
    output = tmp_path / "step.json"
    done = run(
        "--step", step, "triton" if step in ("variants", "tuning") else "cuda", "--output", str(output)
    )
    assert done.returncode == 1, done.stderr
    outcome = json.loads(output.read_text())
    assert outcome["ok"] is False
    assert any(word in outcome["detail"] for word in ("CUDA", "NVIDIA", "GPU", "cuda")), outcome


def test_what_was_found_before_an_error_is_kept(tmp_path, monkeypatch):
    def breaks(device, backend):
        yield {"ok": True, "rows": [1, 2]}
        raise RuntimeError("the device is lost\nmore")

    monkeypatch.setitem(gpu_steps.STEPS, "times", breaks)
    output = tmp_path / "step.json"
    assert gpu_check.main(["--device", "cpu", "--step", "times", "cpu", "--output", str(output)]) == 1
    want = {"ok": False, "rows": [1, 2], "detail": "RuntimeError: the device is lost"}
    assert json.loads(output.read_text()) == want


def test_two_ctas_of_a_cluster_on_one_processor_are_counted():
    found = placement.shared_processors([0, 1, 2, 3, 4, 4, 5, 6], 4)
    assert found == {"size": 4, "clusters": [[0, 1, 2, 3], [4, 4, 5, 6]], "doubled": 1}


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
    monkeypatch.setattr(gpu_steps, "TUNED", (2, 1))
    monkeypatch.setattr(gpu_steps, "PLAN", timing.Plan(seconds=0.002, rounds=2))
    monkeypatch.setattr(gpu_steps, "BASELINES", ("eager", "softmax+multinomial", "flashinfer"))
    monkeypatch.setattr(machine, "bandwidth", lambda device, seconds: {"copy": 1e9, "read": 2e9})
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
    for kind in ("zipf", "masked", "wide"):
        for setting in ("sample", "plain"):
            some = [r for r in outcome["rows"] if (r["logits"], r["setting"]) == (kind, setting)]
            assert {(r["batch"], r["cache"]) for r in some} == {
                (b, c) for b in (1, 2) for c in ("cold", "hot")
            }
    assert all(r["of_copy_bandwidth"] == pytest.approx(2 * r["of_read_bandwidth"]) for r in outcome["rows"])
    assert any("two-stage Gumbel" in str(x) for x in (measured, outcome["skipped"]))
    assert any("compile race: RuntimeError: no compiler" in line for line in outcome["skipped"])
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


@pytest.mark.skipif("triton" not in oc.kernels(), reason="triton is not installed")
@NO_GPU
def test_the_variants_that_are_timed_are_launched_before(small, monkeypatch):
    from svdk.kernels import tuning

    triton_interpreter.enable()
    ran = []
    monkeypatch.setattr(cases, "svdk_call", lambda s, *_: lambda x: ran.append((s.name, len(x.warm))))
    for worker in range(3):
        gpu_steps.compile_some(CPU, "triton", worker, 3)
    timed = {(name, batch) for name in ("sample", "plain", "plain_top_k_top_p") for batch in (1, 2)}
    assert set(ran) == timed
    assert len(ran) == len(timed) + 2 * len(tuning.CANDIDATES)


def test_flashinfer_gets_seeds_and_offsets_of_the_device(monkeypatch):
    got = {}

    def sampler(x, *_, **options):
        got.update(options)
        return torch.zeros(len(x), dtype=torch.int32)

    names = "sampling_from_probs sampling_from_logits top_k_top_p_sampling_from_probs "
    names += "top_k_top_p_sampling_from_logits"
    sampling = types.SimpleNamespace(**dict.fromkeys(names.split(), sampler))
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(sampling=sampling))
    x = logits.make("zipf", 3, 100, torch.float32, CPU)
    for name in ("plain", "plain_top_k_top_p"):
        setting = cases.SETTINGS[name]
        for call in (cases.baseline_call(setting, "flashinfer", CPU), gpu_steps._flashinfer_logits(setting)):
            got.clear()
            call(x)
            assert got["seed"] is x.seeds
            assert torch.equal(got["offset"], torch.zeros(3, dtype=torch.int64))


def test_masked_and_wide_logits_are_what_they_say():
    masked = logits.make("masked", 4, 5000, torch.float32, CPU)
    assert 0.88 < float((masked.warm == -torch.inf).float().mean()) < 0.92
    assert torch.equal(masked.warm == -torch.inf, masked.base == -torch.inf)
    wide = logits.make("wide", 4, 5000, torch.float32, CPU).warm
    assert wide.max(1).values.tolist() == [25.0] * 4
    assert 2.3 < float(wide.std()) < 2.7


@pytest.mark.skipif("triton" not in oc.kernels(), reason="triton is not installed")
@NO_GPU
def test_the_two_stage_baseline_draws_from_the_distribution(monkeypatch):
    triton_interpreter.enable()
    from svdk.bench import gumbel

    monkeypatch.setattr(gumbel, "BLOCK", 8)  # several blocks
    row = torch.tensor([0.0, 1.0, -1.0, 0.5, -torch.inf, 2.0, 0.0, 1.5, -0.5, 1.0])
    draws = 6000
    seeds, step = torch.arange(draws) * 7919, torch.zeros(1, dtype=torch.int64)
    counts = torch.bincount(gumbel.two_stage(row.expand(draws, -1), seeds, step), minlength=10).double()
    p_values = fit_p_values(counts, row.double().softmax(0))
    assert min(p_values.values()) > PER_TEST
    assert counts[4] == 0


# --- the verdicts


def test_targets_are_met_missed_or_open():
    def row(who, batch, us, setting="sample", share=0.85):
        return {
            "setting": setting, "logits": "zipf", "batch": batch, "cache": "cold", "contestant": who,
            "median_us": us, "of_copy_bandwidth": share,
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
