"""``svdk serve`` as a client sees it: vLLM's OpenAI server over HTTP; run by ``make vllm-test``."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make vllm-test` has an environment", allow_module_level=True)

import httpx

from tests.vllm import folders
from tests.vllm.reference import TOKENS, Models, prompts

START = 240
"""Seconds; about 60 on two idle cores."""
LIMITS = {
    "dtype": "float32", "max-model-len": 256, "block-size": 32, "kv-cache-memory-bytes": 32 << 20,
    "max-num-batched-tokens": 64, "max-num-seqs": 16, "max-loras": 3, "max-cpu-loras": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address, folders and reference models of a server that ``svdk serve`` started."""
    root = tmp_path_factory.mktemp("server")
    model = folders.save_model(root / "model")
    task = folders.save_adapter(root / "task", model, seed=1)
    other = folders.save_adapter(root / "other", model, seed=2, strength=3.0, direction="kl_gradient")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "svdk", "serve", str(model), "--adapter", f"task={task}", "--"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += [word for name, value in LIMITS.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "HF_HUB_OFFLINE": "1"}
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + START
            while not _answers(f"{address}/health"):
                text = (root / "log").read_text()
                assert process.poll() is None and time.monotonic() < end, text[-3000:]
                time.sleep(1)
            yield address, {"task": task, "other": other}, Models(model)
        finally:
            process.terminate()
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def body(model, prompt, **more):
    asked = {"model": str(model), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    return asked | {"return_token_ids": True, "ignore_eos": True} | more


def complete(served, model, prompt, **more):
    return httpx.post(f"{served[0]}/v1/completions", json=body(model, prompt, **more), timeout=120)


def ids(response) -> list[int]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def expected(served, name, prompt):
    model = served[2]
    return (
        model.answer(served[1].get(name), prompt, eos_token_id=None) if name else model.answer(None, prompt)
    )


def test_an_adapters_name_is_steered_and_the_models_is_plain(served):
    for prompt in prompts(3, 40, 90):
        assert ids(complete(served, "task", prompt)) == expected(served, "task", prompt)
        plain = expected(served, None, prompt)
        assert ids(complete(served, served[2].folder, prompt))[: len(plain)] == plain


def test_eight_streams_at_once_one_of_them_cancelled(served):
    asked = prompts(*(5 + 9 * i for i in range(8)), seed=3)

    def stream(number: int) -> list[int]:
        found: list[int] = []
        request = body("task", asked[number], stream=True)
        with httpx.stream("POST", f"{served[0]}/v1/completions", json=request, timeout=120) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                found += json.loads(line[6:])["choices"][0]["token_ids"] or []
                if number == 3 and len(found) >= 4:
                    return found  # the client goes away
        return found

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(stream, range(8)))
    for number, answer in enumerate(answers):
        whole = expected(served, "task", asked[number])
        assert answer == whole if number != 3 else answer == whole[: len(answer)]


def test_the_dial_and_what_it_refuses(served):
    prompt = prompts(20, seed=4)[0]
    model, folder = served[2], served[1]["task"]
    warm = model.answer(folder, prompt, strength_scale=0.0, eos_token_id=None)
    dialled = complete(served, "task", prompt, vllm_xargs={"svdk_strength_scale": 0})
    assert ids(dialled) == warm != expected(served, "task", prompt)
    for bad in (1000, "much"):
        refused = complete(served, "task", prompt, vllm_xargs={"svdk_strength_scale": bad})
        assert refused.status_code == 400 and "svdk_strength_scale was" in refused.text
    assert ids(complete(served, "task", prompt)) == expected(served, "task", prompt)


def test_adapters_come_and_go_and_a_bad_one_is_refused(served, tmp_path):
    address, names, _ = served
    prompt = prompts(30, seed=5)[0]

    def post(path, **request):
        return httpx.post(f"{address}/v1/{path}", json=request, timeout=120)

    assert complete(served, "other", prompt).status_code == 404
    assert post("load_lora_adapter", lora_name="other", lora_path=str(names["other"])).status_code == 200
    assert ids(complete(served, "other", prompt)) == expected(served, "other", prompt)
    bad = tmp_path / "bad"
    bad.mkdir()
    refused = post("load_lora_adapter", lora_name="bad", lora_path=str(bad))
    assert refused.status_code == 400 and "it has no steering.json" in refused.text
    assert ids(complete(served, "other", prompt)) == expected(served, "other", prompt)
    assert post("unload_lora_adapter", lora_name="other").status_code == 200
    assert complete(served, "other", prompt).status_code == 404
    assert ids(complete(served, "task", prompt)) == expected(served, "task", prompt)
