"""The logits processors of transformers that run before steering, and what they do to the base row."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from svdk.errors import InputError

# In the kernel already; transformers appends one of each to the processors when sampling.
_IN_KERNEL = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
# These cut the distribution that is sampled from, which exists only inside the kernel.
_REFUSED = {
    TopHLogitsWarper: "top_h",
    TypicalLogitsWarper: "typical_p",
    EpsilonLogitsWarper: "epsilon_cutoff",
    EtaLogitsWarper: "eta_cutoff",
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
}


def split_processors(processors: LogitsProcessorList, config: GenerationConfig) -> LogitsProcessorList:
    """The processors that run before steering: all but those that the kernel does itself.

    Raises:
        InputError: a filter that has to see the steered distribution and is not in the kernel, or
            one of the kernel's given as an object.

    """
    kept, seen = LogitsProcessorList(), set()
    for processor in processors:
        kind = type(processor)
        if kind in _REFUSED:
            raise InputError(
                f"{_REFUSED[kind]} was set; allowed while steering: {', '.join(_IN_KERNEL.values())}"
            )
        if kind not in _IN_KERNEL:
            kept.append(processor)
        elif kind in seen or not config.do_sample:
            name = _IN_KERNEL[kind]
            raise InputError(
                f"logits_processor held a {kind.__name__}; allowed: {name}=... with do_sample=True instead"
            )
        else:
            seen.add(kind)
    return kept


def process(
    processors: LogitsProcessorList, input_ids: Tensor, warm: Tensor, base: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run the processors on the warm row and carry what they did over to the base row; float32.

    So the log-ratio stays what the warm start changed: a repetition penalty is not steered twice, and
    a token that a constraint bans is banned in both rows. They run once a step, since some keep state.
    """
    if not processors:
        return warm, base
    before = warm.float()
    after = processors(input_ids, before.clone())  # type: ignore[arg-type]
    if base is None:
        return after, None
    change = torch.where(after.isfinite() & before.isfinite(), after - before, 0.0)
    return after, torch.where(after == -math.inf, -math.inf, base.float() + change)
