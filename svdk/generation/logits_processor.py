"""Steering as a logits processor: for beam search and whatever else an unmodified ``generate`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.generation import LogitsProcessor

from svdk.errors import InputError
from svdk.generation.caller import assisted_by, decoding_call, mask_of, pair_of
from svdk.generation.options import check_positions, check_tokens_only
from svdk.generation.sampler import SteeringOptions, build_sampler
from svdk.models.pair import ModelPair
from svdk.models.rows import check_inputs
from svdk.models.stream import ViewCache
from svdk.utils.tokens import id_list

if TYPE_CHECKING:
    from svdk.ops.configs import SteeringConfig


class SteeringLogitsProcessor(LogitsProcessor):
    """Steers the scores of ``generate``; the base model runs beside it with its own cache.

    ``model.generate(..., logits_processor=[SteeringLogitsProcessor(model, steering=steering)])``, with
    greedy decoding, sampling or beam search, ``num_return_sequences`` and every other processor. Slower
    than ``custom_generate=svdk.generate`` (two forwards a step), which has no beam search. The
    scores become log-probabilities, so that beams are compared by the steered model's. One object
    serves one call of ``generate``; :meth:`reset` makes it new.

    Processors before it (repetition penalty and the like) change the warm scores only, so what they do is
    part of the direction. Temperature and filters come after it, as transformers orders them.

    Args:
        model: the PEFT model that generates.
        steering: a calibrated artifact or a :class:`svdk.SteeringConfig`; the next six override its fields.
        strength, strength_mode, direction, alpha, penalty, vector, strength_scale: as in
            :func:`svdk.generate`, numbers only (a (V,) tensor for ``vector``).
        attention_mask: (B, T) of the prompts. Needed only in a decoding loop of your own: inside
            ``generate``, its mask is used. Without either, prompts that may be padded are refused.
        check: raise on NaN or infinite logits; False lets such a row come out as NaN.
        backend: as in :func:`svdk.steered_sample`.

    Raises:
        InputError: a bad argument, or a model without a usable adapter.
        ArtifactError: ``steering`` was made for another kind of model.

    """

    def __init__(
        self,
        model: nn.Module,
        steering: SteeringConfig | None = None,
        *,
        strength: float | None = None,
        strength_mode: str | None = None,
        direction: str | None = None,
        alpha: float | None = None,
        penalty: float | None = None,
        vector: Tensor | None = None,
        strength_scale: float = 1.0,
        attention_mask: Tensor | None = None,
        check: bool = True,
        backend: str = "auto",
    ) -> None:
        """Check everything; nothing runs yet."""
        self._pair = pair_of(model)
        _check_own_generate(self._pair)
        given = SteeringOptions(
            steering,
            strength,
            strength_mode,
            direction,
            alpha,
            penalty,
            vector,
            strength_scale,
            check=check,
            backend=backend,
        )
        self._sampler = build_sampler(self._pair, 1, given)
        if (scale := self._sampler.steering.scale) != 1:
            raise InputError(
                f"scale of the steering was {scale:g}; allowed with SteeringLogitsProcessor: 1, inside "
                "svdk.adapter_scale (the model's own forward is not in its hands)"
            )
        self._given_mask = attention_mask
        self._eos = _token_ids(self._pair, "eos_token_id")
        self._pad = _token_ids(self._pair, "pad_token_id")
        self.reset()

    def reset(self) -> None:
        """Forget the last call of ``generate``."""
        self._start = self._length = -1  # of the prompts, and of the rows at the last step
        self._cache: ViewCache | None = None
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steered log-probabilities float32 (N, V) for rows (N, T) and their warm scores (N, V)."""
        base = None
        if "base" in self._sampler.views:
            base = self._base(input_ids.to(self._pair.device)).to(scores.device, torch.float32)
        length = input_ids.shape[1]
        if length != self._length + 1:
            self._start = length
        self._length = length
        return self._sampler.steered(scores.float(), base, length - self._start).log_softmax(-1)

    def _base(self, ids: Tensor) -> Tensor:
        """Base logits (N, V) at the last position."""
        if self._cache is None or self._ids is None:
            return self._prefill(ids)
        rows, length = self._ids.shape
        if ids.shape != (rows, length + 1):
            raise _not_a_step(f"shape {tuple(ids.shape)}", f"({rows}, {length + 1})")
        if not torch.equal(ids[:, :-1], self._ids):
            parents = self._parents(ids, self._ids)
            self._cache.reorder(parents)
        self._ids = ids
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], dim=1)
        return self._pair.base(ids[:, -1:], self._mask, cache=self._cache)[:, -1]

    def _prefill(self, ids: Tensor) -> Tensor:
        mask = self._prompt_mask(ids)
        cache = self._pair.new_cache("base")
        if mask is not None:
            _check_padding(self._pair)
        if self._pair.num_virtual_tokens:  # raises where PEFT's virtual tokens do not fit the model
            self._pair.warm(ids[:1, -1:])
        logits = self._pair.base(ids, mask, cache=cache)[:, -1]
        self._cache, self._ids, self._mask = cache, ids, mask
        return logits

    def _prompt_mask(self, ids: Tensor) -> Tensor | None:
        """(N, T), or None without padding: the one given, else that of the running ``generate``."""
        call = decoding_call(self._pair.module, self, ids)
        if call is None:
            return self._own_mask(ids)
        if (name := assisted_by(call)) is not None:
            raise InputError(
                f"{name} was given; allowed with SteeringLogitsProcessor: None (assisted decoding is not "
                "supported: its candidates are no steps of one token)"
            )
        given = call.get("kwargs", {})
        check_tokens_only(given, call["generation_config"])
        mask = mask_of(call, ids) if self._given_mask is None else self._own_mask(ids)
        if given.get("position_ids") is not None:
            check_positions(call["model_kwargs"].get("position_ids"), ids, mask)
        return mask

    def _own_mask(self, ids: Tensor) -> Tensor | None:
        """(N, T) from the mask that this object was given; None without, where nothing can be padding."""
        rows, length = ids.shape
        mask = self._given_mask
        if mask is not None:
            if mask.dim() != 2 or mask.shape[1] != length or rows % mask.shape[0]:
                found = tuple(mask.shape)
                raise InputError(
                    f"attention_mask had shape {found}; allowed: (B, {length}) with B a divisor of {rows}"
                )
            return check_inputs(ids, mask.to(ids.device).repeat_interleave(rows // mask.shape[0], 0))
        # transformers pads with the end of a sequence where there is no padding token.
        padding = torch.tensor(self._pad or self._eos, dtype=ids.dtype, device=ids.device)
        if bool(torch.isin(ids[:, 0], padding).any()):
            raise InputError(
                "attention_mask was None outside generate, and a prompt starts with what may be padding; "
                "allowed: the attention_mask of the prompts"
            )
        return None

    def _parents(self, ids: Tensor, last: Tensor) -> Tensor:
        """For each row (N,) the row of the ``last`` step that it continues."""
        same = torch.eq(ids[:, None, :-1], last).all(-1)
        if self._mask is not None:  # equal tokens behind different padding are different rows
            same &= torch.eq(self._mask[:, None], self._mask).all(-1)
        if not bool(same.any(1).all()):
            raise _not_a_step("rows that continue none of the last step's", "rows that do")
        return same.int().argmax(1)


def _check_own_generate(pair: ModelPair) -> None:
    """Refuse models for which a plain ``generate`` gives other warm logits than the row whole, alone."""
    traits, why = pair.traits, pair.traits.no_cache
    if traits.own_positions:
        why = "transformers' generate gives it positions that start at 0, and its own do not"
    elif pair.num_virtual_tokens and pair.is_recurrent:
        why = "PEFT's generate loses count of the virtual tokens where a layer has no keys to count"
    if why is not None:
        raise _not_in_generate(f"model was {type(pair.module).__name__}", why)


def _check_padding(pair: ModelPair) -> None:
    """Refuse padding that PEFT's ``generate`` puts between the virtual tokens and the row's own."""
    if not pair.num_virtual_tokens:
        return
    # The keys of a tuned prefix have no positions: padding behind them matters to windows, and where a model
    # counts columns for itself.
    if not pair.is_prefix or not pair.sees_whole_rows or not pair.traits.positions:
        raise _not_in_generate(
            f"attention_mask had padding with {pair.peft_type}",
            "PEFT's generate puts the padding between the virtual tokens and the row's own",
        )


def _not_in_generate(found: str, why: str) -> InputError:
    return InputError(
        f"{found}; allowed: custom_generate=svdk.generate instead of SteeringLogitsProcessor, because {why}"
    )


def _token_ids(pair: ModelPair, name: str) -> list[int]:
    for config in (getattr(pair.module, "generation_config", None), pair.config):
        value = getattr(config, name, None)
        if value is not None:
            return id_list(value)
    return []


def _not_a_step(found: str, wanted: str) -> InputError:
    return InputError(
        f"input_ids was {found}; allowed: {wanted}, the last step's rows with one more token each (assisted "
        "decoding is not supported; for another generate make a new SteeringLogitsProcessor or call reset())"
    )
