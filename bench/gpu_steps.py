"""What ``gpu_check`` does on the device: distributions, agreement, graphs, times, and the launch candidates.

Every step is a generator of ever fuller outcomes (JSON values, ``ok`` among them); the last one counts, and
what was yielded before a crash or a timeout is kept.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import svdk
from svdk.bench import cases, logits, machine, timing
from svdk.bench.goodness import PER_TEST, fit_p_values

VOCAB = 151936
ORDINARY = "zipf"
"""Logits like a model's, made without one; the others are in ``logits.GPU_KINDS``."""
BATCHES = (1, 64, 256, 8, 32, 33, 132, 133, 265)
"""In the order of measurement: what is out of time at the end matters least. 33, 133 and 265 are one row
more than fills an H100 once, by clusters of 8, by one or by two CTAs a processor."""
TUNED = (1, 64, 256)
PROFILED = (("sample", 1), ("sample", 64), ("sample", 256), ("plain", 256))
DRAWS = 4_000_000
AGREEING = 4096
"""Rows compared token by token."""
BASELINES = ("eager", "softmax+multinomial", "race", "warpers", "flashinfer")
COMPILED = {"compile": False, "compile race": True}
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Which compile Triton's variants side by side."""
SECONDS = {"variants": 60, "times": 240, "tuning": 50}
PLAN = timing.Plan(seconds=0.2, rounds=3)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"alpha": 0.0}, {"top_k": 50, "top_p": 0.9})

Outcome = dict[str, Any]
Step = Callable[[torch.device, str], Iterator[Outcome]]


def distributions(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Chi-square over ``DRAWS`` draws a setting, and the rarest thousandth of the mass on its own."""
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
    found: dict[str, Any] = {}
    ok = True
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
            tokens = svdk.steered_sample(*many, seed=keys, backend=backend, **options)
            counts += torch.bincount(tokens, minlength=64).cpu().double()
        p_values, never = fit_p_values(counts, expected), float(counts[expected == 0].sum())
        found[name] = {"p_values": p_values, "impossible": never, "draws": DRAWS}
        ok &= min(p_values.values()) > PER_TEST and never == 0
        yield {"ok": ok, "settings": found}


def agreement(device: torch.device, backend: str) -> Iterator[Outcome]:
    """The tokens of the CPU kernels, row by row: all backends draw the same uniforms."""
    found: dict[str, int] = {}
    host = logits.make("zipf", AGREEING, 4096, torch.bfloat16, torch.device("cpu"))
    warm, base, seeds = (x.to(device) for x in (host.warm, host.base, host.seeds))
    for options in (*OPTIONS, {"alpha": 0.0, "direction": "log_ratio"}, {"strength_mode": "kl_budget"}):
        want = svdk.steered_sample(host.warm, host.base, seed=host.seeds, **options)
        got = svdk.steered_sample(warm, base, seed=seeds, backend=backend, **options)
        found[str(options)] = int((got.cpu() != want).sum())
        # A uniform within rounding of a boundary may land on either side: one row in some hundred thousand.
        yield {"ok": max(found.values()) <= 2, "rows": AGREEING, "different": found}


def graphs(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Capture once, replay with new seeds and offsets; before that the same on a side stream."""
    checked = 0
    for batch in (1, 8, 64):
        x = logits.make("zipf", batch, VOCAB, torch.bfloat16, device)
        seeds, offsets = x.seeds.clone(), torch.zeros_like(x.seeds)
        for options in OPTIONS:

            def step(x=x, seeds=seeds, offsets=offsets, options=options) -> Tensor:
                return svdk.steered_sample(
                    x.warm, x.base, seed=seeds, offset=offsets, backend=backend, **options
                )

            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                on_side = step()
            torch.cuda.current_stream().wait_stream(side)
            if not torch.equal(on_side, step()):
                yield {"ok": False, "detail": f"B={batch} {options}: a side stream draws other tokens"}
                return
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            for replay in range(20):
                seeds += 17
                offsets += 1
                graph.replay()
                checked += batch
                if not torch.equal(captured, step()):
                    detail = f"B={batch} {options}: replay {replay} differs from an eager call"
                    yield {"ok": False, "detail": detail}
                    return
    yield {"ok": True, "tokens": checked}


def exercise(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Small shapes through every path, for the sanitizers."""
    for vocab, dtype in ((999, torch.float32), (32000, torch.bfloat16)):
        for kind in ("zipf", "flat"):
            x = logits.make(kind, 3, vocab, dtype, device)
            for options in ({}, {"alpha": 0.0}, {"penalty": -1.0, "top_p": 0.7}, {"top_k": vocab // 3}):
                svdk.steered_sample(x.warm, x.base, backend=backend, return_info=True, **options)
            svdk.steered_sample(x.warm, backend=backend)
            svdk.steered_sample(x.warm, backend=backend, top_k=20, top_p=0.9)
            grid = torch.tensor([0.0, 1.0], device=device)
            for alpha in (0.1, 0.0):
                svdk.steered_logprob(x.warm, x.base, x.labels, strengths=grid, alpha=alpha, backend=backend)
            svdk.extract(x.warm, x.base, backend=backend)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    yield {"ok": True}


def times(device: torch.device, backends: str) -> Iterator[Outcome]:
    """Microseconds a step beside the roofs of memory, eager PyTorch, FlashInfer, Gumbel and torch.compile.

    ``backends`` are names joined by commas. Cold before hot, steered before plain, ordinary logits before
    masked and wide ones, and torch.compile, whose compilation is what takes long, last.
    """
    end = time.perf_counter() + SECONDS["times"]
    roofs = machine.bandwidth(device, seconds=0.2)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    outcome = {"ok": True, "copy_bytes_per_s": roofs["copy"], "read_bytes_per_s": roofs["read"]}
    outcome |= {"vocab": VOCAB, "rows": rows, "skipped": skipped}
    operands_of = functools.cache(lambda kind: _operands(max(BATCHES), device, kind))
    for kind, name, cold, batch, part in _plan():
        setting = cases.SETTINGS[name]
        if part == "compile" and part not in setting.baselines:
            continue
        where = f"{name} {kind} B={batch} {'cold' if cold else 'hot'}"
        if time.perf_counter() > end:
            skipped.append(f"{where} {part}: out of time")
            continue
        operands = _rotated(operands_of(kind), batch, cold, device)
        contest = timing.Contest(operands, device, PLAN)
        if part == "kernels":
            named = list(_contestants(setting, backends.split(","), device, cold and kind == ORDINARY))
        else:
            named = [(who, cases.compiled(setting, "default", device, x)) for who, x in COMPILED.items()]
        for contestant, call in named:
            if problem := _enter(contest, contestant, call):
                skipped.append(f"{where} {contestant}: {problem}")
                outcome["ok"] &= contestant not in backends.split(",")
        moved = cases.bytes_moved(setting, batch, VOCAB, torch.bfloat16)
        for contestant, t in contest.run().items():
            rows.append(
                {
                    "setting": name,
                    "logits": kind,
                    "batch": batch,
                    "cache": "cold" if cold else "hot",
                    "contestant": contestant,
                    "median_us": t.median * 1e6,
                    "noise_us": t.noise * 1e6,
                    "of_copy_bandwidth": moved / t.median / roofs["copy"],
                    "of_read_bandwidth": moved / t.median / roofs["read"],
                }
            )
        del operands, contest
        yield outcome


def _plan() -> list[tuple[str, str, bool, int, str]]:
    """What is timed, in order: logits, setting, cold, batch, and "kernels" or "compile"."""
    settings = ("sample", "plain", "plain_top_k_top_p")
    first = [
        (ORDINARY, name, cold, batch, "kernels")
        for cold, name, batch in itertools.product((True, False), settings, BATCHES)
    ]
    odd = itertools.product(logits.GPU_KINDS, settings[:2], (True, False), BATCHES)
    compiled = itertools.product((ORDINARY,), settings, (True,), BATCHES[:4])
    return [*first, *((*point, "kernels") for point in odd), *((*point, "compile") for point in compiled)]


def _operands(batch: int, device: torch.device, kind: str = ORDINARY) -> logits.Operands:
    return logits.make(kind, batch, VOCAB, torch.bfloat16, device)


def _rotated(most: logits.Operands, batch: int, cold: bool, device: torch.device) -> list[logits.Operands]:
    """The first ``batch`` rows: making 256 of them anew at every point would take longer than the timing."""
    parts = (most.warm, most.base, most.labels, most.seeds)
    x = logits.Operands(*(part[:batch].clone() for part in parts))
    return logits.rotation(x, cold, machine.last_cache(device), machine.free_memory(device) // 8)


def _enter(contest: timing.Contest, name: str, call: timing.Call) -> str | None:
    """Let a contestant in, under a graph where it can be captured; else say why it cannot run."""
    # Eager PyTorch is what its name says; replaying it from a graph would be another baseline.
    for capture in (True, False) if name != "eager" else (False,):
        try:
            contest.enter(name, call, capture=capture)
        except Exception as error:  # whatever a baseline raises, the others are still worth measuring
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            return None
    return problem


def _contestants(
    setting: cases.Setting, backends: list[str], device: torch.device, all_of_them: bool
) -> Iterator[tuple[str, timing.Call]]:
    for backend in backends:
        yield backend, cases.svdk_call(setting, backend, device)
    if not all_of_them:
        return
    for name in setting.baselines:
        if name in BASELINES:
            yield name, cases.baseline_call(setting, name, device)
    if setting.name == "plain":
        yield "two-stage Gumbel", _two_stage(device)
    if "flashinfer" in setting.baselines and "flashinfer" in BASELINES:
        yield "flashinfer_logits", _flashinfer_logits(setting)


def _two_stage(device: torch.device) -> timing.Call:
    step = torch.zeros(1, dtype=torch.int64, device=device)

    def call(x: logits.Operands) -> Tensor:
        from svdk.bench import gumbel

        return gumbel.two_stage(x.warm, x.seeds, step)

    return call


def _flashinfer_logits(setting: cases.Setting) -> timing.Call:
    """FlashInfer's samplers that take logits, float32 as they want them; the conversion is not timed."""

    @functools.cache
    def converted(x: logits.Operands) -> Tensor:
        return x.warm.float()

    @functools.cache
    def zeros(x: logits.Operands) -> Tensor:
        return torch.zeros_like(x.seeds)

    def call(x: logits.Operands) -> Tensor:
        from flashinfer import sampling

        # On the device, or it would ask the CPU's generator, which cannot be captured.
        draws = {"seed": x.seeds, "offset": zeros(x)}
        if not setting.options:
            return sampling.sampling_from_logits(converted(x), **draws)
        k, p = setting.options["top_k"], setting.options["top_p"]
        order = {"filter_apply_order": "top_k_first"}
        return sampling.top_k_top_p_sampling_from_logits(converted(x), k, p, **order, **draws)

    return call


def tuning(device: torch.device, backend: str) -> Iterator[Outcome]:
    """The Triton kernel with every candidate of its launch configuration, cold: is the default still best?"""
    from svdk.kernels import tuning as configurations

    end = time.perf_counter() + SECONDS["tuning"]
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    most, setting = _operands(max(TUNED), device), cases.SETTINGS["sample"]
    for batch in TUNED:
        operands = _rotated(most, batch, True, device)
        for config in configurations.CANDIDATES:
            if time.perf_counter() > end:
                skipped.append(f"B={batch} {config}: out of time")
                continue
            contest = timing.Contest(operands, device, PLAN)
            with mock.patch.object(configurations, "config_for", lambda *_, config=config: config):
                if problem := _enter(contest, "triton", cases.svdk_call(setting, backend, device)):
                    skipped.append(f"B={batch} {config}: {problem}")
                    continue
                median = contest.run()["triton"].median
            rows.append({"batch": batch, "config": str(config), "median_us": median * 1e6})
        mine = [row for row in rows if row["batch"] == batch]
        if mine:
            min(mine, key=lambda row: row["median_us"])["best"] = True
        yield {"ok": True, "rows": rows, "skipped": skipped}


def variants(device: torch.device, backend: str) -> Iterator[Outcome]:
    """Compile in ``PROCESSES`` processes what times and tuning launch; Triton keeps it on disk for them."""
    itself = [sys.executable, "-m", "svdk.bench.gpu_steps", str(device), backend]
    workers = [
        subprocess.Popen([*itself, str(i), str(PROCESSES)], stderr=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    said = [worker.communicate()[1].strip() for worker in workers]
    failed = [text[-1000:] for text, worker in zip(said, workers, strict=True) if worker.returncode]
    yield {"ok": not failed, "variants": len(_launches())} | ({"detail": "\n".join(failed)} if failed else {})


def _launches() -> list[tuple[str, int, Any]]:
    """Setting, batch and configuration of all Triton launches that are timed; None: the default."""
    from svdk.kernels import tuning as configurations

    timed = itertools.product(("sample", "plain", "plain_top_k_top_p"), BATCHES, (None,))
    tried = itertools.product(("sample",), TUNED, configurations.CANDIDATES)
    return [*timed, *tried]


def compile_some(device: torch.device, backend: str, worker: int, workers: int) -> None:
    """Launch this worker's share of :func:`_launches` once."""
    from svdk.kernels import tuning as configurations

    for name, batch, config in _launches()[worker::workers]:
        x = logits.Operands(
            *(torch.zeros(batch, VOCAB, dtype=torch.bfloat16, device=device) for _ in range(2)),
            *(torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2)),
        )
        call = cases.svdk_call(cases.SETTINGS[name], backend, device)
        if config is None:
            call(x)
            continue
        with mock.patch.object(configurations, "config_for", lambda *_, config=config: config):
            call(x)


def placement(device: torch.device, backend: str) -> Iterator[Outcome]:
    """On which processors the CTAs of a cluster run; two on one would share what a row was split for."""
    from svdk.bench import placement as clusters

    found = []
    for size in (2, 4, 8):
        found.append(clusters.measure(device, size))
        yield {"ok": True, "sizes": found}


def profiled(device: torch.device, backend: str) -> Iterator[Outcome]:
    """The four launches that ``ncu`` is asked about, once each and in the order of ``PROFILED``."""
    for name, batch in PROFILED:
        x = _operands(batch, device)
        cases.svdk_call(cases.SETTINGS[name], backend, device)(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    yield {"ok": True, "launches": [list(point) for point in PROFILED]}


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (distributions, agreement, graphs, exercise, variants, times, tuning, placement, profiled)
}

if __name__ == "__main__":
    device_name, backend_name, worker_number, worker_count = sys.argv[1:]
    compile_some(torch.device(device_name), backend_name, int(worker_number), int(worker_count))
