"""What a request says about steering: vLLM hands it to logits processors, never to models.

:class:`RequestDial` changes no logits. It checks ``svdk_strength_scale`` where a request is admitted (a bad
one is HTTP 400), and keeps each request's dial and prompt length where the steered model finds them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from svdk.errors import InputError
from svdk.utils.checks import is_number

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

SCALE = "svdk_strength_scale"
LARGEST = 100.0


def scale_of(params: SamplingParams) -> float:
    """The dial of a request, 1 without one; ``InputError`` when it is not a number in [-100, 100]."""
    given = params.extra_args or {}
    for name in given:
        if name.startswith("svdk_") and name != SCALE:
            raise InputError(f"{name} was given; allowed: {SCALE}")
    value = given.get(SCALE, 1.0)
    if not is_number(value) or not math.isfinite(value) or abs(value) > LARGEST:
        raise InputError(f"{SCALE} was {value!r}; allowed: a number in [-{LARGEST:g}, {LARGEST:g}]")
    return float(value)


class RequestDial(LogitsProcessor):
    """The dial and the prompt length of every request in the batch; logits pass through."""

    newest: ClassVar[RequestDial | None] = None
    """The one that this process made last: a runner makes its processors, then its model."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        """Tensors of one entry a request that a batch can hold."""
        size = vllm_config.scheduler_config.max_num_seqs
        self._dials, self._prompts = [1.0] * size, [0] * size
        self.dial: Tensor = torch.ones(size, device=device)
        """float32 (max_num_seqs,), by the request's place in the batch."""
        self.prompt: Tensor = torch.zeros(size, dtype=torch.int64, device=device)
        """int64 (max_num_seqs,): tokens of the prompt."""
        type(self).newest = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Runs when a request is admitted; a ``ValueError`` (which ``InputError`` is) becomes HTTP 400."""
        scale_of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """True: nothing is changed."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """The logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests as they come, go and move in the batch; before every forward."""
        if batch_update is None:
            return
        for index, params, prompt, _ in batch_update.added:
            self._dials[index] = scale_of(params)
            self._prompts[index] = 0 if prompt is None else len(prompt)
        for kept in (self._dials, self._prompts):
            _move(kept, batch_update.moved)
        self.dial.copy_(torch.tensor(self._dials))
        self.prompt.copy_(torch.tensor(self._prompts))


def _move(values: list[Any], moves: Any) -> None:
    for source, target, how in moves:
        if how == MoveDirectionality.SWAP:
            values[source], values[target] = values[target], values[source]
        else:
            values[target] = values[source]
