"""What a decoding step costs, against the targets of one-forward decoding: ``python -m svdk.bench.decode``.

Contestants take turns in one process, step by step times come from the tokens' arrival (the prompt and
the first step are left out), and the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from svdk.bench import baselines, machine, models
from svdk.generation.generate import decode
from svdk.models import paired_forward
from svdk.models.pair import ModelPair

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROMPT_TOKENS = 16
Steps = list[float]
Contestant = Callable[[Tensor, int], Steps]

# (batch, what is divided, by what, the bound, whether the ratio must stay below it)
TARGETS = (
    (1, "svdk {}", "plain model, 2 rows", 1.1, True),
    (1, "svdk two_pass {}", "svdk {}", 1.25, False),
    (4, "svdk {}", "PEFT {}", 1.15, True),
    (4, "svdk two_pass {}", "svdk {}", 1.7, False),
    (4, "disable_adapter + eager {}", "svdk {}", 2.5, False),
)
MODES = ("greedy", "sampling")


class Clock(BaseStreamer):
    """Notes when tokens arrive."""

    def __init__(self) -> None:
        """Start with no token."""
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        """A prompt or a token for every row."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""

    def steps(self) -> Steps:
        """Seconds of each step after the one that read the prompt."""
        return [b - a for a, b in zip(self.stamps[1:], self.stamps[2:], strict=False)]


def forward_only(model: PreTrainedModel, rows: int) -> Contestant:
    """The model's own forward over ``rows`` rows, and an argmax."""

    @torch.inference_mode()
    def run(ids: Tensor, count: int) -> Steps:
        pending, cache, clock = ids[:1].expand(rows, -1), DynamicCache(config=model.config), Clock()
        clock.put(pending)
        for _ in range(count):
            logits = model(input_ids=pending, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            pending = logits[:, -1:].argmax(-1)
            clock.put(pending)
        return clock.steps()

    return run


def peft(model: PeftModel, sample: bool) -> Contestant:
    """The adapted model alone, by PEFT and transformers."""

    def run(ids: Tensor, count: int) -> Steps:
        clock = Clock()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=sample,
            top_k=0,
            max_new_tokens=count,
            streamer=clock,
        )
        return clock.steps()

    return run


def eager(model: PeftModel, sample: bool) -> Contestant:
    """SVDecode as first written: two forwards, PEFT's ``disable_adapter()``, PyTorch's own operations."""

    @torch.inference_mode()
    def run(ids: Tensor, count: int) -> Steps:
        pending, warm_cache, base_cache = ids, DynamicCache(), DynamicCache()
        clock = Clock()
        clock.put(ids)
        for _ in range(count):
            options = {"input_ids": pending, "use_cache": True, "logits_to_keep": 1}
            warm = model(past_key_values=warm_cache, **options).logits[:, -1]
            with model.disable_adapter():
                base = model(past_key_values=base_cache, **options).logits[:, -1]
            pending = baselines.eager(warm, base, temperature=1.0 if sample else 0.0)[:, None]
            clock.put(pending)
        return clock.steps()

    return run


def ours(pair: ModelPair, sample: bool, forward: str) -> Contestant:
    """svdk's decoding loop."""

    def run(ids: Tensor, count: int) -> Steps:
        clock = Clock()
        decode(
            pair, ids, max_new_tokens=count, do_sample=sample, seed=0, forward=forward, text_streamer=clock
        )
        return clock.steps()

    return run


def ablated(run: Contestant) -> Contestant:
    """The same with torch's own linear layers: what pairing alone gains."""

    def without(ids: Tensor, count: int) -> Steps:
        with mock.patch.object(paired_forward, "fast_linears", lambda module: []):
            return run(ids, count)

    return without


def contestants(adapted: PeftModel, plain: PreTrainedModel, batch: int) -> dict[str, Contestant]:
    """Name -> function of a prompt (B, T) and a number of steps."""
    pair = ModelPair(adapted)
    found = {f"plain model, {rows} rows": forward_only(plain, rows) for rows in (batch, 2 * batch)}
    for mode in MODES:
        sample = mode == "sampling"
        found |= {
            f"PEFT {mode}": peft(adapted, sample),
            f"disable_adapter + eager {mode}": eager(adapted, sample),
            f"svdk two_pass {mode}": ours(pair, sample, "two_pass"),
            f"svdk, torch's linear {mode}": ablated(ours(pair, sample, "auto")),
            f"svdk {mode}": ours(pair, sample, "auto"),
        }
    return found


def same_tokens(adapted: PeftModel, prompt: Tensor, count: int) -> bool:
    """Whether one forward and two decode to the same tokens, greedy and sampled."""
    pair = ModelPair(adapted)
    pairs = [
        [
            decode(
                pair, prompt, max_new_tokens=count, do_sample=sample, seed=1, forward=forward, strength=2.0
            ).sequences
            for forward in ("paired", "two_pass")
        ]
        for sample in (False, True)
    ]
    return all(torch.equal(*both) for both in pairs)


def targets(medians: dict[str, float], batch: int) -> list[dict[str, object]]:
    """Each target of this batch size with what was measured."""
    rows = []
    for at, over, under, bound, below in TARGETS:
        for mode in MODES if at == batch else ():
            over_name, under_name = over.format(mode), under.format(mode)
            ratio = medians[over_name] / medians[under_name]
            met = ratio <= bound if below else ratio >= bound
            rows.append(
                {
                    "what": f"{over_name} / {under_name}",
                    "ratio": round(ratio, 3),
                    "bound": bound,
                    "at_most": below,
                    "met": met,
                }
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=models.REAL)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=10, help="a turn (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="turns (default: 5)")
    args = parser.parse_args()
    from svdk.models.loading import load_model

    device = torch.device("cpu")
    adapted, plain = models.load(args.model, device), load_model(args.model)[0]
    results: dict[str, Any] = {"machine": machine.describe(device), "model": args.model, "batches": {}}
    for batch in args.batch:
        prompt = torch.randint(5, 40000, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
        runs = contestants(adapted, plain, batch)
        steps: dict[str, Steps] = {name: [] for name in runs}
        for run in runs.values():
            run(prompt, 3)
        for _ in range(args.rounds):
            for name, run in runs.items():
                steps[name] += run(prompt, args.steps + 1)
        medians = {name: statistics.median(found) for name, found in steps.items()}
        print(f"\n{batch} sequences: milliseconds a step, median (quartiles) of {len(steps['PEFT greedy'])}")
        for name, found in steps.items():
            low, _, high = statistics.quantiles(found, n=4)
            print(f"  {name:34} {1e3 * medians[name]:7.1f}  ({1e3 * low:.1f} to {1e3 * high:.1f})")
        met = targets(medians, batch)
        for row in met:
            sign = "<=" if row["at_most"] else ">="
            verdict = "met" if row["met"] else "MISSED"
            print(f"  {row['what']:60} {row['ratio']:5.2f}  {sign} {row['bound']}  {verdict}")
        same = same_tokens(adapted, prompt, args.steps)
        print(f"  same tokens as two passes: {'yes' if same else 'NO'}")
        results["batches"][batch] = {"median_s": medians, "targets": met, "same_tokens": same}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
