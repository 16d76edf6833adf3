"""Which drafted tokens a target model takes over, and the token that follows them.

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv 2211.17192) and
Chen et al., "Accelerating large language model decoding with speculative sampling" (arXiv 2302.01318).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdk.ops import api, arguments
from svdk.ops.configs import SamplingConfig, SteeringConfig
from svdk.ops.philox import SAMPLE_STREAM, row_uniforms
from svdk.ops.probabilities import log_of, probabilities
from svdk.ops.results import Status
from svdk.ops.seeds import row_words
from svdk.utils.checks import fail

FAR = -(1 << 63)
"""Flips an offset's top bit: the last token's draw is none that a sampler makes of the same numbers."""


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check a chain of drafted tokens a row against a target model: what comes out is distributed as its own.

    Position i takes its draft if ``u * draft(id) < target(id)``, u uniform. The first one that does not ends
    the chain with a token of ``max(target - draft, 0)`` (of the target itself where nothing of that is left);
    a chain that is taken whole ends with a token of the last target row. Seeds and offsets as for the
    samplers; none of their draws with the same seed and offset is used, so drafts may have been drawn by it.

    Args:
        draft_probs: (B, n, V), what each draft was drawn from.
        draft_token_ids: integers (B, n) in [0, V); on a device unchecked, and never taken if outside.
        target_probs: (B, n + 1, V), on the same device.
        maybe_output_accepted_token_num: integers (B,), to which the second output is added in place.
        maybe_output_emitted_draft_token_num: the same for the third.
        deterministic: changes nothing, everything is.
        generator, seed, offset: as in :mod:`svdk.sampling`, one a row of the batch.

    Returns:
        - tokens int32 (B, n + 1): the drafts taken, the token after them, then -1. That token is -1 as well
          if its row has no distribution (NaN, a negative number, all zero);
        - int32 (B,): how many positions would take their draft, each by itself;
        - int32 (B,): how many drafts were taken: the chain's length without the token after it.

    Raises:
        InputError: an argument of the wrong shape, dtype, device or value.

    """
    draft, target = _chain("draft_probs", draft_probs), _chain("target_probs", target_probs)
    batch, steps, vocab = draft.shape
    if target.shape != (batch, steps + 1, vocab) or target.device != draft.device:
        was = f"{arguments.shape(target_probs)} on {target.device}"
        raise fail("target_probs", was, f"({batch}, {steps + 1}, {vocab}) on {draft.device}, as draft_probs")
    ids = _draft_ids(draft_token_ids, draft)
    _check_output("maybe_output_accepted_token_num", maybe_output_accepted_token_num, draft)
    _check_output("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num, draft)
    seeds, offset = row_words(seed, offset, batch, generator, draft)
    offsets = seeds.new_full((batch,), offset) if isinstance(offset, int) else offset

    streams = torch.arange(1, steps + 1, device=draft.device) + SAMPLE_STREAM
    u = row_uniforms(seeds[:, None], offsets[:, None], streams)
    at = ids.clamp(0, vocab - 1)[..., None]
    p, q = (x.gather(2, at)[..., 0].double() for x in (draft, target[:, :steps]))
    sound = (draft.sum(2) + target[:, :steps].sum(2)).isfinite()
    takes = (u * p < q) & (ids == at[..., 0]) & sound
    accepted, emitted = takes.sum(1), takes.long().cumprod(1).sum(1)

    token = _last_token(draft, target, emitted, seeds, offsets ^ FAR)[:, None]
    place = torch.arange(steps + 1, device=draft.device)
    ended = token.where(place == emitted[:, None], -1)
    tokens = torch.nn.functional.pad(ids, (0, 1), value=-1).where(place < emitted[:, None], ended)
    accepted = _added(maybe_output_accepted_token_num, accepted)
    return tokens.int(), accepted, _added(maybe_output_emitted_draft_token_num, emitted)


def _last_token(draft: Tensor, target: Tensor, emitted: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """The token int64 (B,) after ``emitted`` drafts; -1 where its row has no distribution."""
    rows, steps = torch.arange(len(emitted), device=emitted.device), draft.shape[1]
    wanted = target[rows, emitted]
    rest = wanted
    if steps:
        rejected = draft[rows, emitted.clamp(max=steps - 1)].where(emitted[:, None] < steps, 0.0)
        rest = (wanted - rejected).clamp(min=0)
        rest = rest.where(rest.sum(1, keepdim=True) != 0, wanted)
    values = SteeringConfig().values() | SamplingConfig().values() | {"seed": seeds, "offset": offsets}
    token, info = api.sample(arguments.operands(log_of(rest)), values, return_info=True)
    assert info is not None
    return token.where((info.status & int(Status.INVALID)) == 0, -1)


def _chain(name: str, x: Any) -> Tensor:
    """Float32 (B, n, V) of probabilities, as :func:`probabilities` has them."""
    if not arguments.dense(x) or x.dim() != 3 or x.shape[2] == 0:
        raise fail(name, arguments.shape(x), "a tensor of shape (B, n, V) with V >= 1")
    return probabilities(name, x.reshape(-1, x.shape[2])).view(x.shape)


def _draft_ids(ids: Any, draft: Tensor) -> Tensor:
    """int64 (B, n) token ids."""
    batch, steps, vocab = draft.shape
    if not arguments.dense(ids) or ids.shape != (batch, steps):
        raise fail("draft_token_ids", arguments.shape(ids), f"an integer tensor of shape ({batch}, {steps})")
    return arguments.index_rows("draft_token_ids", ids.reshape(-1), vocab, draft).view(batch, steps)


def _check_output(name: str, given: Any, draft: Tensor) -> None:
    """``InputError`` unless this is None or can take a count a row."""
    if given is None:
        return
    fits = arguments.dense(given) and given.shape == draft.shape[:1] and given.device == draft.device
    if not fits or given.dtype not in (torch.int32, torch.int64):
        was = f"{arguments.shape(given)}, {given.dtype}" if isinstance(given, Tensor) else repr(given)
        raise fail(name, was, f"None, or an int32 or int64 tensor of shape ({len(draft)},) on {draft.device}")


def _added(output: Tensor | None, count: Tensor) -> Tensor:
    """A count as int32, or added to ``output`` in place."""
    return count.int() if output is None else output.add_(count)
