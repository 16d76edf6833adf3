"""Threads, forks, spawned processes and kills: the same tokens, the same adapter, never a hang."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import svdk
from svdk import Steering
from tests import ROOT
from tests.helpers import ops_cases as oc

THREADS = 64


def work(seed: int) -> list[torch.Tensor]:
    """Every op on inputs of its own; the results as tensors."""
    warm, base = oc.logits(1 + seed % 5, 997 + seed, seed=seed)
    token, info = svdk.steered_sample(warm, base, seed=seed, return_info=True)
    wide = svdk.steered_sample(warm, base, alpha=0.0, top_p=0.9, seed=seed)
    scored = svdk.steered_logprob(warm, base, token, strengths=torch.tensor([0.0, 1.0]))
    found = svdk.extract(warm, base)
    return [token, info.kl, wide, scored.logprob, found.row_ptr, found.token_ids, found.delta]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def program(code: str, *arguments: str, timeout: float = 120) -> str:
    """The output of a program of its own, run in the repository."""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("inner", [1, 2])
def test_many_threads_at_once_give_the_serial_results(inner):
    before = torch.get_num_threads()
    torch.set_num_threads(inner)
    try:
        serial = [work(seed) for seed in range(THREADS)]
        barrier = threading.Barrier(THREADS)

        def together(seed: int) -> list[list[torch.Tensor]]:
            barrier.wait(timeout=60)
            return [work(seed) for _ in range(3)]

        with ThreadPoolExecutor(THREADS) as pool:
            for want, rounds in zip(serial, pool.map(together, range(THREADS)), strict=True):
                assert all(equal(want, got) for got in rounds)
    finally:
        torch.set_num_threads(before)


def test_the_first_call_of_a_process_may_come_from_many_threads():
    code = f"""
import threading, torch, svdk
warm = torch.arange(50.0).repeat(2, 1)
barrier, found, errors = threading.Barrier({THREADS}), [], []
def first():
    barrier.wait()
    try:
        found.append(tuple(svdk.steered_sample(warm, warm * 0.9, seed=3).tolist()))
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=first) for _ in range({THREADS})]
[t.start() for t in threads]
[t.join() for t in threads]
print(errors, len(found), len(set(found)))
"""
    assert program(code) == f"[] {THREADS} 1\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_after_use_does_not_hang():
    """OpenMP's threads are not there in the child; svdk and PyTorch must not wait for them."""
    code = """
import os, signal, torch
from tests.system.test_processes import equal, work
torch.set_num_threads(4)
want = [work(seed) for seed in range(8)]
torch.randn(1 << 20).exp()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    ok = all(equal(work(seed), want[seed]) for seed in range(8))
    torch.randn(1 << 20).exp()
    os._exit(0 if ok else 1)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
again = all(equal(work(seed), want[seed]) for seed in range(8))
print("child", code, "parent", again, torch.get_num_threads())
"""
    assert program(code) == "child 0 parent True 4\n"


def test_a_spawned_process_gets_the_same_tokens_and_artifacts_travel():
    seeds, steering = list(range(4)), Steering(1.5, statistics={"p": torch.arange(3.0)})
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.map_async(work, seeds).get(timeout=120)
        (strength,) = pool.map_async(strength_of, [steering]).get(timeout=120)
    assert all(equal(got, work(seed)) for seed, got in zip(seeds, found, strict=True))
    assert strength == (1.5, [0.0, 1.0, 2.0])


def strength_of(steering: Steering) -> tuple[float, list[float]]:
    return steering.strength, steering.statistics["p"].tolist()


def warmstart_kills(folder: Path, *options: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.warmstart_kills", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_killed_warm_start_ends_with_the_same_adapter(tmp_path):
    """SIGKILL before and after writes, renames and steps; SVDK_LONG=1 takes every one of them."""
    stride = "1" if os.environ.get("SVDK_LONG") == "1" else "9"
    found = warmstart_kills(tmp_path, "new", stride)
    assert found["points"] > 20
    assert found["killed"] >= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_kill_while_an_adapter_is_replaced_loses_neither(tmp_path):
    found = warmstart_kills(tmp_path, "replace")
    assert found["killed"] >= 3
    assert "absent" in found["states"], "a kill between the two renames was among them"
    assert {"old", "new"} <= set(found["states"])
