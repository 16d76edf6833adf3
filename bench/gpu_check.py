"""Everything that needs a GPU, in two calls under 8 minutes: times; tests, distributions, graphs, sanitizers.

``python -m svdk.bench.gpu_check`` checks the CUDA and the Triton backend and writes
``bench/results/gpu_check.json`` (outside a checkout ``gpu_check.json``). Every step is a process of its own
with its own time: one that fails, hangs or takes the device down with it is recorded, with what it had found
so far, and the rest goes on. ``--folder`` keeps what every step wrote, also if this process is ended.
``--only variants times`` measures, ``--skip variants times tuning`` does the rest with room to finish;
without either, what measures comes first. The tests are those of a checkout, run on the svdk that is asked,
which may be an installed one; without them their steps fail. Exit code: 0; 1 if a step failed; 2 where
nothing can be checked. Missed speed targets are recorded, not failures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import svdk
from svdk.bench import gpu_steps, machine, results

LIMIT = 465
"""Seconds for everything; a step that would begin later is not run, and the results say so."""
BACKENDS = ("cuda", "triton")
START = 20
"""Seconds on top of a step's own: the process, the imports, the CUDA context."""
SHARED_TESTS = ("tests/ops/test_ops.py", "tests/ops/test_dispatch.py", "tests/ops/test_ops_errors.py")


@dataclass(frozen=True)
class Step:
    """One process. ``command`` is given the file for its outcome."""

    command: Callable[[Path], list[str]]
    seconds: float
    alone: bool = False
    """Nothing else may run beside it: it measures time, or makes ready for that. These come first."""
    why_not: str | None = None
    folder: Path | None = None
    """Where it runs; None: where this runs."""


def _on_device(name: str, backend: str, device: str = "cuda") -> Callable[[Path], list[str]]:
    itself = [sys.executable, "-m", "svdk.bench.gpu_check", "--device", device]
    return lambda outcome: [*itself, "--step", name, backend, "--output", str(outcome)]


def _pytest(root: Path, files: Sequence[str], choice: str, seconds: float) -> Step:
    # Triton compiles hundreds of variants for the tests; several processes share its cache on disk.
    workers = min(8, (os.cpu_count() or 1) // 2)
    parallel = workers > 1 and importlib.util.find_spec("xdist") is not None
    options = ["-n", str(workers), "--dist", "worksteal"] if parallel else []
    # What is tested is the svdk that runs this, not the one beside the tests.
    paths = shlex.join([str(Path(svdk.__file__).resolve().parent.parent), str(root)])
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={paths}"]
    return Step(lambda _: [*pytest, *options, *files, "-k", choice], seconds, folder=root)


def _sanitizer(tool: str, backend: str) -> Step:
    program = shutil.which("compute-sanitizer")
    run = _on_device("exercise", backend)
    options = ["--tool", tool, "--error-exitcode", "3"]
    missing = None if program else "compute-sanitizer is not on PATH"
    return Step(lambda outcome: [program or "", *options, *run(outcome)], 150, why_not=missing)


def _profiler(backend: str) -> Step:
    program = shutil.which("ncu")
    run = _on_device("profiled", backend)
    options = ["--set", "full", "-k", "regex:steered_sample", "-c", str(len(gpu_steps.PROFILED))]
    missing = None if program else "ncu is not on PATH"
    return Step(lambda outcome: [program or "", *options, *run(outcome)], 120, why_not=missing)


def steps(backends: Sequence[str], root: Path) -> dict[str, Step]:
    """The steps for these backends: those that measure first, then those that may run side by side.

    ``root`` is the checkout whose tests are run.
    """
    found: dict[str, Step] = {}
    seconds = gpu_steps.SECONDS
    if "triton" in backends:
        found["variants"] = Step(_on_device("variants", "triton"), seconds["variants"], alone=True)
    found["times"] = Step(_on_device("times", ",".join(backends)), seconds["times"] + START, alone=True)
    if "triton" in backends:
        found["tuning"] = Step(_on_device("tuning", "triton"), seconds["tuning"] + START, alone=True)
    if "cuda" in backends:
        found["placement"] = Step(_on_device("placement", "cuda"), 30)
        found["profile"] = _profiler("cuda")
    for backend in backends:
        for name in ("distributions", "agreement", "graphs"):
            found[f"{name}_{backend}"] = Step(_on_device(name, backend), 60)
    if "cuda" in backends:
        found["tests_cuda"] = _pytest(root, SHARED_TESTS, "cuda or dispatch or errors", 150)
        for tool in ("memcheck", "racecheck"):
            found[f"{tool}_cuda"] = _sanitizer(tool, "cuda")
    if "triton" in backends:
        files = (*SHARED_TESTS, "tests/kernels/test_triton.py")
        found["tests_triton"] = _pytest(root, files, "triton and not gpus_that_are_not_here", 170)
        found["memcheck_triton"] = _sanitizer("memcheck", "triton")
    return found


def run_steps(
    todo: dict[str, Step],
    jobs: int,
    limit: float,
    done: Callable[[str, dict[str, Any]], None],
    folder: Path | None = None,
) -> None:
    """Run the steps, ``jobs`` side by side but for those alone, within ``limit`` seconds together.

    ``done`` is called with the name and outcome of each as it ends. What is alone comes first. In ``folder``
    each step's outcome is in ``<name>.json`` as it grows, its output in ``<name>.log``.
    """
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory(prefix="svdk-gpu-check-") as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)

        def ended(name: str, outcome: dict[str, Any]) -> None:
            results.save(outcome, place / f"{name}.json")
            done(name, outcome)

        for alone in (True, False):
            waiting = {name: step for name, step in todo.items() if step.alone is alone}
            running: dict[str, _Running] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < (1 if alone else jobs):
                        name = next(iter(waiting))
                        step = waiting.pop(name)
                        left = end - time.monotonic()
                        if step.why_not or left < 1:
                            reason = step.why_not or f"no time was left of {limit:g} s"
                            ended(name, {"ok": None, "detail": reason})
                            continue
                        running[name] = _Running(step, min(step.seconds, left), place / name, temporary)
                    for name in [name for name, one in running.items() if one.over()]:
                        ended(name, running.pop(name).outcome())
                    time.sleep(0.05)
            finally:  # an interrupt must leave nothing on the device
                for one in running.values():
                    one.kill()


class _Running:
    """A step's process, in a session of its own so that all it started can be ended with it."""

    def __init__(self, step: Step, seconds: float, path: Path, temporary: str) -> None:
        self.seconds, self.result, self.log = seconds, path.with_suffix(".json"), path.with_suffix(".log")
        self.result.unlink(missing_ok=True)  # of an earlier run
        # The tests must not interpret Triton here, nor may this machine's own tuning results count.
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SVDK_AUTOTUNE")}
        environment |= {"XDG_CACHE_HOME": str(Path(temporary) / "cache"), "PYTHONUNBUFFERED": "1"}
        self.start = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                step.command(self.result),
                cwd=step.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.late = False

    def over(self) -> bool:
        """Whether it ended; past its time it is made to."""
        if self.process.poll() is None and time.monotonic() - self.start > self.seconds:
            self.late = True
            self.kill()
        return self.process.poll() is not None

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself just now
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> dict[str, Any]:
        """What it reported last, whether it came to its end, and the end of its output."""
        found: dict[str, Any] = json.loads(self.result.read_text()) if self.result.exists() else {}
        code = self.process.returncode
        found["ok"] = not self.late and code == 0 and found.get("ok", True)
        found["seconds"] = round(time.monotonic() - self.start, 1)
        if not found["ok"]:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-15:]
            what = f"not done after {self.seconds:.0f} s" if self.late else f"exit code {code}"
            found["detail"] = "\n".join([found.get("detail", what), *tail])[-3000:]
        return found


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the times are to reach, and whether they do (``met`` None: not measured)."""
    ordinary = [r for r in rows if r["logits"] == gpu_steps.ORDINARY]
    found = {(r["setting"], r["batch"], r["cache"], r["contestant"]): r for r in ordinary}

    def value(setting: str, batch: int, who: str, what: str = "median_us") -> float | None:
        return found.get((setting, batch, "cold", who), {}).get(what)

    def ratio(setting: str, batch: int, over: str, under: str) -> float | None:
        a, b = value(setting, batch, over), value(setting, batch, under)
        return None if a is None or b is None else a / b

    wanted: list[tuple[str, float | None, str, float]] = []
    for batch in (64, 256):
        share = value("sample", batch, "cuda", "of_copy_bandwidth")
        wanted.append((f"cuda sample B={batch}: share of the copy bandwidth", share, ">=", 0.8))
    wanted.append(("cuda sample B=1: microseconds", value("sample", 1, "cuda"), "<=", 8.0))
    for batch in sorted(gpu_steps.BATCHES[:4]):
        at = f"B={batch}: times"
        wanted += [
            (f"cuda sample {at} faster than eager", ratio("sample", batch, "eager", "cuda"), ">=", 20),
            (f"cuda sample {at} faster than compile", ratio("sample", batch, "compile", "cuda"), ">=", 5),
            (f"triton sample {at} faster than compile", ratio("sample", batch, "compile", "triton"), ">=", 1),
            (
                f"triton sample {at} cuda's time",
                ratio("sample", batch, "triton", "cuda"),
                "<=",
                1.3 if batch >= 64 else 2,
            ),
        ]
        for setting in ("plain", "plain_top_k_top_p"):
            faster = ratio(setting, batch, "flashinfer_logits", "cuda")
            wanted.append((f"cuda {setting} {at} faster than FlashInfer on logits", faster, ">=", 1))
    return [
        {"what": what, "value": got, "wanted": f"{sign} {limit:g}",
         "met": None if got is None else (got >= limit if sign == ">=" else got <= limit)}
        for what, got, sign, limit in wanted
    ]  # fmt: skip


def refusals(backends: Sequence[str]) -> dict[str, str]:
    """Backend -> why this machine cannot check it, for those that it cannot."""
    status = svdk.backends.status()
    reasons = {name: status[name] for name in backends if status[name] != "available"}
    if "triton" in backends and "triton" not in reasons and not torch.cuda.is_available():
        reasons["triton"] = "no GPU is visible (only Triton's interpreter is)"
    return reasons


def untestable(todo: dict[str, Step]) -> dict[str, str]:
    """Step -> why it cannot run, for those whose tests are not there."""
    return {
        name: f"--root was {step.folder}, which has no {SHARED_TESTS[0]}; allowed: a checkout of svdk"
        for name, step in todo.items()
        if step.folder is not None and not (step.folder / SHARED_TESTS[0]).is_file()
    }


def _check(options: argparse.Namespace) -> int:
    reasons = refusals(options.backends)
    for name, reason in reasons.items():
        print(f"gpu_check: the {name} backend cannot run here: {reason}", file=sys.stderr)
    backends = [name for name in options.backends if name not in reasons]
    if not backends:
        return 2
    report: dict[str, Any] = {
        "machine": machine.describe(torch.device(options.device)),
        "backends": svdk.backends.status(),
        "steps": {f"backend_{name}": {"ok": False, "detail": reason} for name, reason in reasons.items()},
    }
    todo = steps(backends, options.root.resolve())
    for option, named in (("--only", options.only), ("--skip", options.skip)):
        if unknown := set(named or ()) - set(todo):
            print(f"gpu_check: {option} was {sorted(unknown)}; allowed: {', '.join(todo)}", file=sys.stderr)
            return 2
    todo = {name: step for name, step in todo.items() if not options.only or name in options.only}
    todo = {name: step for name, step in todo.items() if name not in (options.skip or ())}
    absent = untestable(todo)
    for name, reason in absent.items():
        print(f"gpu_check: the step {name} cannot run: {reason}", file=sys.stderr)
        report["steps"][name] = {"ok": False, "detail": reason}
    todo = {name: step for name, step in todo.items() if name not in absent}
    if not todo:
        return 2

    def done(name: str, outcome: dict[str, Any]) -> None:
        report["steps"][name] = outcome
        if name == "times":
            report["targets"] = targets(outcome.get("rows", ()))
        results.save(report, options.output)
        verdict = {True: "ok", False: "FAILED", None: "not run"}[outcome["ok"]]
        print(f"{name}: {verdict}, {outcome.get('seconds', 0)} s {outcome.get('detail', '')}", flush=True)

    run_steps(todo, options.jobs, options.limit, done, options.folder)
    for target in report.get("targets", ()):
        got = "not measured" if target["value"] is None else f"{target['value']:.3g}"
        verdict = {True: "met", False: "MISSED", None: "open"}[target["met"]]
        print(f"{verdict:6} {target['what']}: {got}, wanted {target['wanted']}")
    return 1 if any(step["ok"] is False for step in report["steps"].values()) else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module for the exit codes."""
    parser = argparse.ArgumentParser(prog="python -m svdk.bench.gpu_check", description=__doc__)
    here = machine.checkout()
    parser.add_argument(
        "--root",
        type=Path,
        default=here or Path.cwd(),
        help="the checkout whose tests are run (default: the one that svdk runs from, else this folder)",
    )
    output = here / "bench" / "results" / "gpu_check.json" if here else Path("gpu_check.json")
    parser.add_argument("--output", type=Path, default=output, help="results file (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where each step's outcome and output are kept, from its start on"
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--only", nargs="+", metavar="STEP", help=f"of: {', '.join(steps(BACKENDS, Path()))}")
    parser.add_argument("--skip", nargs="+", metavar="STEP", help="steps to leave out, as for --only")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all (default: %(default)s)")
    jobs = max(1, min(6, (os.cpu_count() or 1) // 2))
    parser.add_argument("--jobs", type=int, default=jobs, help="steps side by side (default: %(default)s)")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # one step, in this process
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step is None:
        return _check(options)
    name, backend = options.step
    outcome: dict[str, Any] = {"ok": False, "detail": "nothing was found"}
    try:
        for outcome in gpu_steps.STEPS[name](torch.device(options.device), backend):
            results.save(outcome, options.output)
    except Exception as error:  # what was found so far stays, and the file says why there is no more
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found = {} if outcome.get("detail") == "nothing was found" else outcome
        outcome = found | {"ok": False, "detail": reason}
        results.save(outcome, options.output)
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
