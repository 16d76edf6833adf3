"""Long runs hold their memory; running out of it surfaces as itself and leaves the process usable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import svdk
from svdk.errors import ArtifactError, InputError, out_of_memory
from svdk.models import adapter_files, fingerprints
from svdk.warmstart.api import warm_start
from tests import ROOT
from tests.helpers import tiny

LONG = os.environ.get("SVDK_LONG") == "1"
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="it reads /proc")

MEASURE = """
import gc, os, sys, torch
torch.set_num_threads(1)
def measure():
    gc.collect()
    rss = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return rss, sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
def report(work, steps, warmup):
    work(warmup)
    rss, tensors = measure()
    work(steps)
    more, again = measure()
    print(more - rss, again - tensors, steps)
"""

OPS = """
import svdk
warm, base = torch.randn(2, 300), torch.randn(2, 300)
labels, grid, seeds = torch.tensor([3, 4]), torch.tensor([0.0, 1.0]), torch.tensor([1, 2])
def work(steps):
    for step in range(steps):
        token = svdk.steered_sample(warm, base, seed=seeds, offset=step, alpha=(0.1, 0.0)[step % 2])
        if step % 10 == 0:
            svdk.steered_sample(warm, base, offset=step, return_info=True, strength_mode="kl_budget")
            svdk.steered_logprob(warm, base, labels, strengths=grid)
            svdk.extract(warm, base)
            svdk.steered_sample(warm, top_k=20, top_p=0.9, offset=step)
            try:
                svdk.steered_sample(warm, base, alpha=2.0)
            except svdk.InputError:
                pass
report(work, int(sys.argv[1]), 3000)
"""

GENERATE = """
import svdk
from tests.helpers import tiny
model, ids = tiny.tiny_peft(sys.argv[2]), torch.arange(5, 13).reshape(2, 4)
def work(steps):
    for call in range(steps // 50):
        model.generate(input_ids=ids, custom_generate=svdk.generate, strength=1.5, do_sample=call % 2 == 0,
                       max_new_tokens=50, eos_token_id=None, seed=call)
report(work, int(sys.argv[1]), 300)
"""


def grown(code: str, *arguments: str) -> tuple[int, int, int]:
    """Bytes and tensors gained after the warm-up, and the number of steps."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE + code, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(map(int, done.stdout.split()))


@LINUX
def test_a_hundred_thousand_steps_of_the_ops_hold_their_memory():
    size, tensors, steps = grown(OPS, "100000")
    assert steps == 100_000
    assert size < 4 << 20, f"{size} bytes more after {steps} steps"
    assert tensors == 0


@LINUX
@pytest.mark.parametrize("kind", ["lora", "prefix_tuning"])
def test_generation_holds_its_memory(kind):
    """Whole calls of generate, model and all; SVDK_LONG=1 makes it 100,000 steps (some minutes)."""
    size, tensors, steps = grown(GENERATE, "100000" if LONG else "1500", kind)
    assert size < 8 << 20, f"{size} bytes more after {steps} steps"
    assert tensors == 0


@LINUX
def test_growth_is_noticed():
    size, tensors, _ = grown(
        "kept = []\nreport(lambda n: kept.extend(torch.ones(100) for _ in range(n)), 20000, 100)"
    )
    assert size > 4 << 20
    assert tensors == 20000


# --- out of memory


@LINUX
def test_an_op_without_memory_for_its_output_raises_and_the_next_call_works():
    code = """
import resource, torch, svdk
torch.set_num_threads(2)
small = torch.randn(2, 1000)
want = svdk.steered_sample(small, small * 0.9, seed=1)
warm = torch.randn(64, 151936)
svdk.extract(warm[:1], warm[:1])
for room in (1, 64):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), -1))
    try:
        svdk.extract(warm, warm, alpha=0.0)
    except (RuntimeError, MemoryError) as error:
        print(type(error).__name__, svdk.errors.out_of_memory(error), end=" ")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(torch.equal(svdk.steered_sample(small, small * 0.9, seed=1), want), end=" ")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RuntimeError", "True", "True"] * 2


def test_a_process_that_can_have_no_more_threads_samples_the_same():
    code = """
import resource, torch, svdk
torch.set_num_threads(2)
warm = torch.randn(8, 151936)
svdk.steered_sample(warm[:, :1000], seed=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))
alone = svdk.steered_sample(warm, seed=1)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(torch.equal(svdk.steered_sample(warm, seed=1), alone))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("unable to mmap 8 bytes from file: Cannot allocate memory (12)"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert out_of_memory(error) is expected


def raising(error: BaseException):
    def function(*_, **__):
        raise error

    return function


OOM = torch.OutOfMemoryError("CUDA out of memory.")


def test_loading_without_memory_is_no_misfit(monkeypatch, tmp_path, tiny_folder):
    adapter = tmp_path / "adapter"
    tiny.tiny_peft("lora").save_pretrained(adapter, save_embedding_layers=False)
    model = tiny.tiny_model()
    names = list(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr("peft.set_peft_model_state_dict", raising(OOM))
        with pytest.raises(torch.OutOfMemoryError):
            svdk.load_adapter(model, adapter)
    assert list(model.state_dict()) == names
    svdk.load_adapter(model, adapter)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", raising(OOM))
        with pytest.raises(torch.OutOfMemoryError):
            svdk.load_model(tiny_folder)
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained", raising(RuntimeError("size mismatch"))
        )
        with pytest.raises(InputError, match="cannot be loaded: size mismatch"):
            svdk.load_model(tiny_folder)
    monkeypatch.setattr(adapter_files, "read_weights", raising(RuntimeError("size mismatch")))
    with pytest.raises(ArtifactError, match="does not fit"):
        svdk.load_adapter(tiny.tiny_model(), adapter)


def test_generation_without_memory_raises_and_the_next_call_works():
    model, ids = tiny.tiny_peft("lora"), torch.arange(5, 13).reshape(2, 4)

    def generate():
        return model.generate(
            input_ids=ids, custom_generate=svdk.generate, strength=1.5, max_new_tokens=6, eos_token_id=None
        )

    want = generate()
    calls = []

    def fail(module, *_):
        calls.append(1)
        if len(calls) == 3:
            raise OOM

    hook = model.get_base_model().lm_head.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        generate()
    hook.remove()
    assert torch.equal(generate(), want)


def test_a_warm_start_without_memory_gives_the_model_back_and_resumes(tmp_path):
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise OOM

    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    options = {"max_steps": 4, "learning_rate": 1e-2, "progress": False}

    def run(name, **more):
        return warm_start(
            (model, tokenizer), tiny.tiny_examples(20), output_dir=tmp_path / name, **options, **more
        )

    with pytest.raises(torch.OutOfMemoryError):
        run("out", callbacks=[Full()])
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert fingerprints.adapter_fingerprint(run("out")) == fingerprints.adapter_fingerprint(run("whole"))
