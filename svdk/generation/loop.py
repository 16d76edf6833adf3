"""The decoding loop: the views that a step needs, processors, the draw, until every row has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from svdk.errors import BackendError, InputError, first_line
from svdk.generation.processors import process
from svdk.generation.sampler import Sampler
from svdk.models.adapter_scale import adapter_scale
from svdk.models.pair import ModelPair
from svdk.models.paired_forward import FORWARDS, PairedForward, choose_forward, say_two_passes
from svdk.models.two_pass import TwoPass
from svdk.ops.results import SampleInfo
from svdk.utils.checks import check_choice

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass
class SteeredOutput(GenerateDecoderOnlyOutput):
    """transformers' output with one more field; ``past_key_values`` stays None (there are two caches).

    ``scores``: steered logits after temperature and filters, (B, V) a step. ``logits``: the warm
    model's, unprocessed.
    """

    steering_info: tuple[SampleInfo, ...] | None = None
    """A :class:`svdk.SampleInfo` a step; rows that had already ended have meaningless entries."""


@dataclass(frozen=True)
class ForwardOptions:
    """How the two views of a step are run; see :func:`generate`."""

    forward: str = "auto"
    row_adapters: Sequence[str] | None = None
    verify: bool = False


@dataclass(frozen=True)
class Call:
    """What the loop needs of a call beside models and sampler; lengths in tokens."""

    criteria: StoppingCriteriaList
    processors: LogitsProcessorList
    pad_token_id: int | None
    streamer: BaseStreamer | None
    cache_implementation: str | None
    use_cache: bool
    max_length: int
    scores: bool
    logits: bool
    steering: bool
    """What to return beside the tokens, a step."""


@torch.no_grad()
def run(
    pair: ModelPair,
    input_ids: Tensor,
    mask: Tensor | None,
    sampler: Sampler,
    call: Call,
    paths: ForwardOptions,
) -> SteeredOutput:
    """Decode until every row of ``input_ids`` (B, T), with ``mask`` (B, T) or None, has ended."""
    batch = input_ids.shape[0]
    ends = any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)
    if ends and call.pad_token_id is None:
        raise InputError("pad_token_id was None; allowed with an EOS criterion: the id that fills ended rows")
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    cache: Any = None  # one for both views, or one each
    scores: list[Tensor] = []
    logits: list[Tensor] = []
    infos: list[SampleInfo] = []
    pending, step = input_ids, 0
    with pair.evaluating(), adapter_scale(pair, sampler.steering.scale):
        step_forward = choose_step(pair, sampler, paths, input_ids)
        if call.streamer is not None:
            call.streamer.put(input_ids.cpu())
        if call.use_cache:
            cache = step_forward.new_cache(call.cache_implementation, call.max_length)
        while True:
            try:
                rows = step_forward(pending, mask, cache=cache)
            except BackendError as error:
                if paths.forward != "auto" or paths.row_adapters or isinstance(step_forward, TwoPass):
                    raise
                say_two_passes(first_line(error))
                step_forward, pending = TwoPass(pair, sampler.views), input_ids
                if cache is not None:
                    cache = step_forward.new_cache(call.cache_implementation, call.max_length)
                rows = step_forward(pending, mask, cache=cache)
            if paths.verify and step == 0 and isinstance(step_forward, PairedForward):
                step_forward.verify(input_ids, mask, (rows[0], rows[1]))
            first, *second = (view[:, -1] for view in rows)
            if call.logits:
                logits.append(first.float().clone())
            warm, base = process(call.processors, input_ids, first, *second)
            token, info = sampler.draw(warm, base, step, call.steering or call.scores)
            if info is not None and call.scores:
                scores.append(sampler.scores(warm, base, info))
            if info is not None and call.steering:
                infos.append(info)
            if ends and call.pad_token_id is not None:
                token = torch.where(unfinished, token, call.pad_token_id)
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
            done = call.criteria(input_ids, tuple(scores) if call.scores else None)
            unfinished = unfinished & ~done
            if call.streamer is not None:
                call.streamer.put(token.cpu())
            if not unfinished.any():
                break
            pending, step = token[:, None] if call.use_cache else input_ids, step + 1
    if call.streamer is not None:
        call.streamer.end()
    return SteeredOutput(  # transformers says tuple[Tensor] of a tuple of any length
        sequences=input_ids,  # type: ignore[arg-type]
        scores=tuple(scores) if call.scores else None,  # type: ignore[arg-type]
        logits=tuple(logits) if call.logits else None,  # type: ignore[arg-type]
        steering_info=tuple(infos) if call.steering else None,
    )


def choose_step(
    pair: ModelPair, sampler: Sampler, paths: ForwardOptions, input_ids: Tensor
) -> PairedForward | TwoPass:
    """The forward of a step: both views at once where that is possible and wanted."""
    if len(sampler.views) != 2:
        check_choice("forward", paths.forward, FORWARDS)
        if paths.row_adapters is not None:
            raise InputError("row_adapters was given; allowed: None where a single model is run")
        return TwoPass(pair, sampler.views)
    paired = choose_forward(pair, paths.forward, paths.row_adapters, input_ids)
    return TwoPass(pair, sampler.views) if paired is None else paired
