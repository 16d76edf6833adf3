"""Models on disk and their engines, for the tests that run where vLLM is installed."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("vllm") is not None:
    # Before vLLM is imported: one process, one thread, no network, no binding to cores that others use.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import gc

import pytest

from tests.vllm import folders
from tests.vllm.reference import Models

SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 32 << 20,
    "max_num_batched_tokens": 64,  # longer prompts come in chunks
    "max_num_seqs": 16,
    "disable_log_stats": False,
    "seed": 0,
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A model folder, and adapters on it by name."""
    root = tmp_path_factory.mktemp("vllm")
    model = folders.save_model(root / "model")
    made = {
        "a": {},
        "b": {"direction": "kl_gradient", "strength": 4.0, "alpha": 0.02},
        "positions": {"lever": "positions", "positions": (4.0, -3.0, 6.0, 0.0, 2.5), "strength": 1.0},
        "one": {"alpha": 1.0, "strength": 0.5},  # its confidence set is the likeliest token alone
        "budget": {"strength_mode": "kl_budget", "strength": 0.3, "direction": "kl_gradient", "alpha": 0.01},
        "scale": {"lever": "scale", "strength": 0.0, "alpha": 0.0, "scale": 1.7},
    }
    paths = {}
    for seed, (name, given) in enumerate(made.items(), 1):
        paths[name] = folders.save_adapter(root / name, model, seed=seed, **given)
    paths["vector"] = folders.save_vector(root / "vector", model, seed=9)
    return model, paths


@pytest.fixture(scope="session")
def models(llama):
    return Models(llama[0])


@pytest.fixture(scope="session")
def start():
    """``start(model, adapters, **options)``: an engine in this process."""

    def build(model, adapters=None, **options):
        from svdk.vllm import LLM

        gc.collect()
        return LLM(str(model), adapters, **SMALL | options)

    return build


@pytest.fixture(scope="module")
def engine(start, llama):
    """One engine with every adapter, each slot taken."""
    return start(*llama)
