"""What an engine must answer: ``svdk.generate``, or a slow loop where it has no word for what is asked."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import svdk
from svdk.calibration.artifact import Steering
from tests.vllm.folders import load

TOKENS = 16


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 261, (n,), generator=generator).tolist() for n in lengths]


class Models:
    """A base model folder and the PEFT models on it, loaded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded = {}

    def peft(self, adapter: Path | None):
        if adapter not in self._loaded:
            self._loaded[adapter] = load(self.folder, *([adapter] if adapter else []))
        return self._loaded[adapter]

    def answer(self, adapter: Path | None, prompt: list[int], tokens: int = TOKENS, **options) -> list[int]:
        """Greedy, by ``svdk.generate`` (the model's own ``generate`` without an adapter)."""
        model, ids = self.peft(adapter), torch.tensor([prompt])
        with torch.no_grad():
            if adapter is None:
                out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
            else:
                steering = options.pop("steering", None) or Steering.load(adapter)
                out = svdk.generate(
                    model, input_ids=ids, steering=steering, max_new_tokens=tokens, do_sample=False, **options
                )
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def logits(self, adapter: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Warm and base logits (1, V) behind ``ids``, without a cache."""
        model, row = self.peft(adapter), torch.tensor([ids])
        warm = model(row).logits[:, -1]
        with model.disable_adapter():
            return warm, model(row).logits[:, -1]

    def banned(self, adapter: Path, prompt: list[int], ban, tokens: int = TOKENS) -> list[int]:
        """Greedy from steered logits with a floor outside the mask; ``ban(step)``: ids banned after it."""
        steering, ids = Steering.load(adapter), list(prompt)
        for step in range(tokens):
            warm, base = self.logits(adapter, ids)
            z = svdk.steered_logits(warm, base, **steering.values(step))[0]
            z = torch.where(z == -math.inf, warm[0] - 1e4, z)
            z[ban(step)] = -math.inf
            ids.append(int(z.argmax()))
        return ids[len(prompt) :]

    def warm_greedy(self, adapter: Path, prompt: list[int], tokens: int = TOKENS) -> list[int]:
        """The adapter's own answer, unsteered."""
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self.logits(adapter, ids)[0].argmax()))
        return ids[len(prompt) :]
