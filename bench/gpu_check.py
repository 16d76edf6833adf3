"""Everything that needs a GPU, in one call under 8 minutes: tests, distributions, graphs, sanitizers, times.

``python -m svdk.bench.gpu_check`` loads the built CUDA module and writes ``bench/results/gpu_check.json``.
A step that fails or runs out of time is recorded and the rest goes on; the exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import svdk
from svdk.bench import cases, logits, machine, results, timing
from svdk.bench.goodness import chi_square_p_value

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "bench" / "results" / "gpu_check.json"
VOCAB = 151936
BATCHES = (1, 8, 64, 256)
DRAWS = 4_000_000
BUDGET = {"tests": 150, "memcheck": 60, "racecheck": 60, "times": 150}
"""Seconds a step may take; the others take a few."""

Step = Callable[[torch.device], dict[str, Any]]


def refusal() -> str | None:
    """Why this machine cannot run the check, or None."""
    reason = svdk.backends.status()["cuda"]
    return None if reason == "available" else reason


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"ok": False, "detail": f"not done after {seconds:g} s"}
    tail = (done.stdout + done.stderr).strip().splitlines()[-15:]
    return {"ok": done.returncode == 0, "detail": "\n".join(tail)}


def shared_tests(device: torch.device) -> dict[str, Any]:
    """The test body that all backends share."""
    files = ["tests/test_ops.py", "tests/test_dispatch.py", "tests/test_ops_errors.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return _run([*pytest, "-k", "cuda or dispatch or errors"], BUDGET["tests"])


def distributions(device: torch.device) -> dict[str, Any]:
    """Chi-square over 4 million draws a setting, and the rarest thousandth of the mass on its own."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(64, generator=generator)
    warm = (-0.2 * torch.arange(64)[order].float())[None]
    base = warm + 0.5 * torch.randn(1, 64, generator=generator)
    settings: dict[str, dict[str, Any]] = {
        "steered": {"alpha": 0.0, "strength": 2.0},
        "masked": {"alpha": 0.05, "strength": 2.0},
        "log_ratio": {"alpha": 0.0, "direction": "log_ratio", "strength": 0.7},
        "plain": {},
    }
    found, ok = {}, True
    for name, options in settings.items():
        pair = (warm,) if name == "plain" else (warm, base)
        # steered_logprob gives the exact probabilities of every token, independently of the sampler.
        rows = [x.expand(64, -1) for x in pair]
        penalty = -torch.inf if name == "masked" else 0.0
        exact = svdk.steered_logprob(
            *rows, labels=torch.arange(64), penalty=penalty, backend="reference", **options
        )
        expected = exact.logprob.double().exp()
        counts = torch.zeros(64, dtype=torch.float64)
        for part in range(8):
            keys = torch.arange(DRAWS // 8, device=device) + part * (DRAWS // 8)
            many = [x.to(device).expand(len(keys), -1) for x in pair]
            tokens = svdk.steered_sample(*many, seed=keys, backend="cuda", **options)
            counts += torch.bincount(tokens, minlength=64).cpu().double()
        p_value, tail = chi_square_p_value(counts, expected * DRAWS), _tail_deviation(counts, expected)
        never = float(counts[expected == 0].sum())
        found[name] = {"p_value": p_value, "tail_sigma": tail, "impossible": never, "draws": DRAWS}
        ok &= p_value > 1e-4 and abs(tail) < 4.5 and never == 0
    return {"ok": ok, "settings": found}


def _tail_deviation(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard deviations between the rarest thousandth's count and its expectation."""
    order = expected.argsort()
    tail = order[expected[order].cumsum(0) <= 1e-3]
    share = float(expected[tail].sum())
    if share * DRAWS < 20:
        return 0.0
    return (float(counts[tail].sum()) - share * DRAWS) / (share * (1 - share) * DRAWS) ** 0.5


def graphs(device: torch.device) -> dict[str, Any]:
    """Capture once, replay with new seeds and offsets; then the same on a side stream."""
    checked = 0
    for batch in (1, 8, 64):
        x = logits.make("zipf", batch, VOCAB, torch.bfloat16, device)
        seeds, offsets = x.seeds.clone(), torch.zeros_like(x.seeds)
        for options in ({}, {"alpha": 0.0}, {"top_k": 50, "top_p": 0.9}):

            def step(x=x, seeds=seeds, offsets=offsets, options=options):
                return svdk.steered_sample(
                    x.warm, x.base, seed=seeds, offset=offsets, backend="cuda", **options
                )

            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                on_side = step()
            torch.cuda.current_stream().wait_stream(side)
            if not torch.equal(on_side, step()):
                return {"ok": False, "detail": f"B={batch} {options}: a side stream draws other tokens"}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            for replay in range(20):
                seeds += 17
                offsets += 1
                graph.replay()
                checked += batch
                if not torch.equal(captured, step()):
                    return {"ok": False, "detail": f"B={batch} {options}: replay {replay} differs from eager"}
    return {"ok": True, "tokens": checked}


def exercise(device: torch.device) -> None:
    """Small shapes through every path, for the sanitizers."""
    for vocab, dtype in ((999, torch.float32), (32000, torch.bfloat16)):
        x = logits.make("zipf", 3, vocab, dtype, device)
        flat = logits.make("flat", 2, vocab, dtype, device)
        for rows in (x, flat):
            for options in ({}, {"alpha": 0.0}, {"penalty": -1.0, "top_p": 0.7}, {"top_k": vocab // 3}):
                svdk.steered_sample(rows.warm, rows.base, backend="cuda", return_info=True, **options)
            svdk.steered_sample(rows.warm, backend="cuda")
            svdk.steered_sample(rows.warm, backend="cuda", top_k=20, top_p=0.9)
            grid = torch.tensor([0.0, 1.0], device=device)
            for alpha in (0.1, 0.0):
                svdk.steered_logprob(
                    rows.warm, rows.base, rows.labels, strengths=grid, alpha=alpha, backend="cuda"
                )
            svdk.extract(rows.warm, rows.base, backend="cuda")
    torch.cuda.synchronize(device)


def sanitizer(tool: str) -> Step:
    """A step that runs :func:`exercise` under compute-sanitizer."""

    def step(device: torch.device) -> dict[str, Any]:
        program = shutil.which("compute-sanitizer")
        if program is None:
            return {"ok": None, "detail": "compute-sanitizer is not on PATH"}
        itself = [sys.executable, "-m", "svdk.bench.gpu_check", "--exercise"]
        return _run([program, "--tool", tool, "--error-exitcode", "3", *itself], BUDGET[tool])

    return step


def times(device: torch.device) -> dict[str, Any]:
    """Microseconds a step, cold and hot, beside copy bandwidth, eager PyTorch, torch.compile, FlashInfer."""
    copy = machine.bandwidth(device)["copy"]
    end = time.perf_counter() + BUDGET["times"]
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    plan = timing.Plan(seconds=0.2, rounds=3)
    for name in ("sample", "plain", "plain_top_k_top_p"):
        setting = cases.SETTINGS[name]
        for batch in BATCHES:
            x = logits.make("zipf", batch, VOCAB, torch.bfloat16, device)
            moved = cases.bytes_moved(setting, batch, VOCAB, torch.bfloat16)
            for cold in (True, False):
                if time.perf_counter() > end:
                    skipped.append(f"{name} B={batch} {'cold' if cold else 'hot'}: out of time")
                    continue
                free = machine.free_memory(device) // 8
                operands = logits.rotation(x, cold, machine.last_cache(device), free)
                contest = timing.Contest(operands, device, plan)
                for contestant, call in _contestants(setting, device, cold):
                    try:
                        contest.enter(contestant, call, capture=contestant != "eager")
                    except Exception as error:  # a baseline that cannot run here says so in the results
                        if contestant == "svdk":
                            raise
                        skipped.append(f"{name} B={batch} {contestant}: {str(error).splitlines()[0][:200]}")
                for contestant, t in contest.run().items():
                    rows.append(
                        {
                            "setting": name, "batch": batch, "cache": "cold" if cold else "hot",
                            "contestant": contestant, "median_us": t.median * 1e6, "noise_us": t.noise * 1e6,
                            "of_copy_bandwidth": moved / t.median / copy if contestant == "svdk" else None,
                        }
                    )  # fmt: skip
                del operands, contest
    return {"ok": True, "copy_bytes_per_s": copy, "vocab": VOCAB, "rows": rows, "skipped": skipped}


def _contestants(setting: cases.Setting, device: torch.device, cold: bool):
    yield "svdk", cases.svdk_call(setting, "cuda", device)
    if not cold:
        return
    for name in setting.baselines:
        if name == "compile":
            yield name, cases.compiled(setting, "default", device)
        elif name in ("eager", "softmax+multinomial", "flashinfer", "warpers"):
            yield name, cases.baseline_call(setting, name, device)


STEPS: dict[str, Step] = {
    "tests": shared_tests,
    "distributions": distributions,
    "graphs": graphs,
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck"),
    "times": times,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 0, 1 (a step failed) or 2 (this machine cannot run it)."""
    parser = argparse.ArgumentParser(prog="python -m svdk.bench.gpu_check", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="results file (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps to run")
    parser.add_argument("--exercise", action="store_true", help="only run the kernels once, for a sanitizer")
    options = parser.parse_args(arguments)
    if reason := refusal():
        print(f"gpu_check: the cuda backend cannot run here: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if options.exercise:
        exercise(device)
        return 0
    report: dict[str, Any] = {"machine": machine.describe(device), "steps": {}}
    for name in options.only:
        start = time.perf_counter()
        try:
            outcome = STEPS[name](device)
        except Exception:  # the other steps are still worth having; the exit code tells
            outcome = {"ok": False, "detail": traceback.format_exc()[-2000:]}
        outcome["seconds"] = round(time.perf_counter() - start, 1)
        report["steps"][name] = outcome
        print(f"{name}: {outcome['ok']} in {outcome['seconds']} s {outcome.get('detail', '')}", flush=True)
        results.save(report, options.output)
    return 1 if any(step["ok"] is False for step in report["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
