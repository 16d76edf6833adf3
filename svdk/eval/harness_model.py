"""lm-evaluation-harness: the community's own harness scores the base, warm-started and steered model.

Importing this module registers the model ``svdk`` with lm-eval; :func:`svdk.eval.harness.evaluate_harness`
runs it for all three systems.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdk import __version__
from svdk.calibration.artifact import JSON_NAME, Steering
from svdk.calibration.sweep import MAX_OP
from svdk.errors import InputError, InvalidLogitsError
from svdk.generation.generate import decode
from svdk.generation.sampler import FIELDS, Sampler, make_sampler
from svdk.models.adapter_scale import adapter_scale
from svdk.models.loading import load_adapter, load_model
from svdk.models.pair import ModelPair
from svdk.utils.checks import check_choice
from svdk.utils.tokens import eos_ids
from svdk.utils.views import BASE, STEERED, VIEWS

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria
except ImportError as error:
    raise InputError(f"lm-eval cannot be imported ({error}); needed: pip install 'svdk[eval]'") from error

SYSTEMS = VIEWS
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed")
# What a task may say and what decoding does anyway.
_IMPLIED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


@register_model("svdk")
class SteeredLM(HFLM):
    """A model for lm-eval 0.4.13: ``simple_evaluate(model="svdk", model_args={...})``, or an instance.

    Scoring and generation see one steered distribution. Only the penalty outside the confidence set differs:
    scoring uses ``scoring_penalty`` (0, so that a label outside the set keeps a finite probability),
    generation the artifact's (-inf by default, so that such a token is never drawn). Log-probabilities are
    normalised over the whole vocabulary, in float32, for all three systems.

    Of a task's ``generation_kwargs``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p`` and
    ``seed`` apply, the same for every system; the model's own ``generation_config`` gives the EOS ids alone.

    Args:
        pretrained: what :func:`svdk.load_model` takes, or a loaded base or PEFT model (with ``tokenizer``).
        adapter: adapter folder; needed unless ``pretrained`` is a PEFT model.
        system: "base", "warm" or "steered".
        tokenizer: the tokenizer of a loaded model.
        steering: a :class:`svdk.Steering`; default: the artifact in the folder ``adapter``.
        strength, strength_mode, direction, alpha, penalty: override its fields one by one; with
            ``strength`` an artifact is not needed. ``penalty`` applies to generation.
        strength_scale: as in :func:`svdk.generate`.
        scoring_penalty: lambda outside the confidence set in scoring: finite, or -inf.
        dtype, device: of a model that is loaded here, as in :func:`svdk.load_model`.
        ops_backend: of the ops, as ``backend`` in :func:`svdk.steered_sample`.
        batch_size: rows in one forward; scoring holds up to four float32 (batch, length, vocabulary) tensors.
        max_batch_size: the bound for ``batch_size="auto"``.
        max_length: tokens of context and continuation; default: what the model takes beside virtual tokens.
        truncation, add_bos_token, prefix_token_id, logits_cache: as in lm-eval's ``hf`` model.

    Raises:
        InputError: a bad argument.
        ArtifactError: an adapter or artifact that does not fit, or no artifact and no ``strength``.

    """

    def __init__(
        self,
        pretrained: Any,
        adapter: str | Path | None = None,
        *,
        system: str = STEERED,
        tokenizer: Any = None,
        steering: Steering | None = None,
        strength: float | None = None,
        strength_mode: str | None = None,
        direction: str | None = None,
        alpha: float | None = None,
        penalty: float | None = None,
        strength_scale: float = 1.0,
        scoring_penalty: float = 0.0,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        ops_backend: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        truncation: bool = False,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        logits_cache: bool = True,
    ) -> None:
        """Load what is not loaded, check everything; nothing runs yet."""
        check_choice("system", system, SYSTEMS)
        model, tokenizer = _peft_model(pretrained, adapter, tokenizer, dtype, device)
        super().__init__(
            model, backend="causal", tokenizer=tokenizer, batch_size=batch_size,
            max_batch_size=max_batch_size, max_length=max_length, truncation=truncation,
            add_bos_token=add_bos_token, prefix_token_id=prefix_token_id, logits_cache=logits_cache,
        )  # fmt: skip
        self.system = system
        self.pair = ModelPair(model)
        self.adapter = None if adapter is None else str(adapter)
        overrides: dict[str, Any] = {
            "strength": strength,
            "strength_mode": strength_mode,
            "direction": direction,
            "alpha": alpha,
            "strength_scale": strength_scale,
        }
        self._generation: dict[str, Any] = {"view": system, "backend": ops_backend, "check": True}
        self._sampler: Sampler | None = None
        self._starts: dict[tuple[int, ...], int | None] | None = None
        if system == STEERED:
            if steering is None:
                steering = _artifact(adapter, strength, model, tokenizer)
            overrides |= {"steering": steering, "backend": ops_backend, "check": True}
            self._generation |= overrides | {"penalty": penalty}
            make_sampler(self.pair, 1, **self._generation)  # a bad penalty is refused here, not after an hour
            self._sampler = make_sampler(self.pair, 1, penalty=scoring_penalty, **overrides)

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        longest = HFLM.max_length.fget(self)
        return longest if self._max_length else longest - self.pair.num_virtual_tokens

    @torch.no_grad()
    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits float32 (B, T, V) at every position of right-padded rows ``inps`` (B, T).

        No mask is needed: a position sees nothing that comes after it, padding included.
        """
        if attn_mask is not None or labels is not None:
            raise InputError("attn_mask or labels was given; allowed: None (decoder-only models)")
        inps = inps.to(self.pair.device)
        length, sampler = inps.shape[1], self._sampler
        if sampler is not None and BASE in sampler.views:
            with adapter_scale(self.pair, sampler.steering.scale):
                warm, base = self.pair.teacher_forced(inps, None, length)
            return self._steered(self._at_positions(sampler, inps), warm, base)
        scale = 1.0 if sampler is None else sampler.steering.scale
        with self.pair.evaluating(), adapter_scale(self.pair, scale):
            view = self.pair.base if self.system == BASE else self.pair.warm
            logits = view(inps, keep=length)
        if sampler is not None and sampler.steering.steers:
            return self._steered(self._at_positions(sampler, inps), logits, None)
        logits = logits.float()
        highest = logits.amax(-1)  # NaN goes through a maximum
        if not bool(torch.isfinite(highest).all()):
            rows = (~torch.isfinite(highest)).any(1).nonzero()[:, 0].tolist()
            raise InvalidLogitsError(
                f"rows {rows}: the logits held NaN or +inf; allowed: finite values and -inf"
            )
        return logits

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """As lm-eval's, and :meth:`_model_call` learns where in a row its continuation begins."""
        starts: dict[tuple[int, ...], int | None] = {}
        for _, context, continuation in requests:
            row = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            start = len(row) - len(continuation)
            starts[row] = start if starts.get(row, start) == start else None
        self._starts = starts
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._starts = None

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """As lm-eval's, whose rows are no requests."""
        starts, self._starts = self._starts, None
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._starts = starts

    def _at_positions(self, sampler: Sampler, inps: Tensor) -> Sampler:
        """With the strength of each output position for each of the tokens (B, T), one after the other."""
        steering, starts = sampler.steering, self._starts
        if not len(steering.positions) or starts is None:
            return sampler
        strengths = [steering.strength_at(step) for step in range(len(steering.positions) + 1)]
        table = torch.tensor(strengths, device=inps.device)
        lengths = sorted({len(row) for row in starts}, reverse=True)
        firsts = [_start_of(row, starts, lengths) for row in inps.tolist()]
        # Of the context nothing is read: any strength will do.
        steps = torch.arange(inps.shape[1]) - torch.tensor(firsts)[:, None]
        mu = table[steps.clamp(0, len(strengths) - 1).to(inps.device)].flatten()
        return dataclasses.replace(sampler, steering=steering.with_one_strength(mu))

    def _steered(self, sampler: Sampler, warm: Tensor, base: Tensor | None) -> Tensor:
        """Steered logits float32 (B, T, V), some positions at a time: the op's own memory stays small."""
        shape = warm.shape
        warm = warm.reshape(-1, shape[-1])
        base = None if base is None else base.reshape(-1, shape[-1])
        out = warm if warm.dtype == torch.float32 else torch.empty_like(warm, dtype=torch.float32)
        step = max(1, MAX_OP // shape[-1])
        for start in range(0, len(warm), step):
            span = slice(start, start + step)
            part = sampler
            if isinstance(mu := sampler.steering.strength, Tensor):
                part = dataclasses.replace(sampler, steering=sampler.steering.override(strength=mu[span]))
            out[span] = part.steered(warm[span], None if base is None else base[span])
        return out.view(shape)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Token ids (B, up to ``max_length``) of left-padded rows ``context`` (B, T), prompt included."""
        options = {k: v for k, v in generation_kwargs.items() if _IMPLIED.get(k, ()) != v}
        mask = options.pop("attention_mask", None)
        unknown = sorted(set(options) - set(SAMPLING))
        if unknown:
            raise InputError(f"generation_kwargs held {', '.join(unknown)}; allowed: {', '.join(SAMPLING)}")
        stopping = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        output = decode(
            self.pair, context, mask, max_new_tokens=max_length - context.shape[1],
            eos_token_id=eos_ids(self.pair.module, self.tokenizer), pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=stopping, **self._generation, **options,
        )  # fmt: skip
        return output.sequences

    def get_model_info(self) -> dict[str, Any]:
        """What was scored, for the results; lm-eval's own asks the hub for the model's commit."""
        info = {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "svdk_version": __version__,
            "system": self.system,
            "adapter": self.adapter,
            "peft_type": self.pair.peft_type,
        }
        if self._sampler is None:
            return info
        generating = make_sampler(self.pair, 1, **self._generation)
        steering = {name: getattr(self._sampler.steering, name) for name in FIELDS}
        steering["positions"] = list(steering["positions"])
        steering["classes"] = steering["classes"] and dataclasses.asdict(steering["classes"])
        del steering["penalty"]
        steering["scoring_penalty"] = _finite(self._sampler.steering.penalty)
        steering["generation_penalty"] = _finite(generating.steering.penalty)
        return info | {"steering": steering}


def _start_of(row: list[int], starts: dict[tuple[int, ...], int | None], lengths: list[int]) -> int:
    """Where the continuation begins in a right-padded row of ids, counted in logits.

    ``lengths``: those of the rows in ``starts``, longest first.
    """
    for length in lengths:
        known = tuple(row[:length])
        if known in starts and not any(row[length:]):
            if (start := starts[known]) is None:
                break
            return start
    raise InputError(
        "two requests had the same tokens and different continuations; allowed with strengths by position: "
        "contexts and continuations that are told apart by their tokens"
    )


def _finite(penalty: float) -> float | None:
    """``penalty``, None for -inf: results go to strict JSON."""
    return penalty if math.isfinite(penalty) else None


def _peft_model(
    pretrained: Any,
    adapter: str | Path | None,
    tokenizer: Any,
    dtype: str | torch.dtype | None,
    device: str | None,
) -> tuple[Any, Any]:
    """The PEFT model and its tokenizer."""
    from peft import PeftModel

    if isinstance(pretrained, (str, Path)):
        if adapter is None:
            raise InputError(
                "adapter was None; allowed: a PEFT adapter folder (lm-eval's own 'hf' scores a model alone)"
            )
        if tokenizer is not None:
            raise InputError("tokenizer was given; allowed with the name of a model: None, it has its own")
        model, tokenizer = load_model(pretrained, dtype=dtype, device=device)
        return load_adapter(model, adapter), tokenizer
    if tokenizer is None:
        raise InputError("tokenizer was None; allowed with a loaded model: its tokenizer")
    if isinstance(pretrained, PeftModel):
        return pretrained, tokenizer
    if adapter is None:
        raise InputError("adapter was None; allowed with a base model: a PEFT adapter folder")
    return load_adapter(pretrained, adapter), tokenizer


def _artifact(
    adapter: str | Path | None, strength: float | None, model: Any, tokenizer: Any
) -> Steering | None:
    """The artifact beside the adapter; None when there is none and ``strength`` makes up for it."""
    calibrated = adapter is not None and (Path(adapter) / JSON_NAME).exists()
    if strength is not None and not calibrated:
        return None
    if adapter is None:
        raise InputError("adapter and strength were None; needed to steer: a calibrated folder or a strength")
    return Steering.load(adapter, model=model, tokenizer=tokenizer)
