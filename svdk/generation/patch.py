"""svdk's sampler inside an unmodified ``generate``: ``svdk.patch_transformers()``."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from svdk.errors import BackendError
from svdk.generation.sampler import row_seeds
from svdk.ops import api, arguments, backends
from svdk.ops.configs import SamplingConfig, SteeringConfig

_FILTERS = (
    (TemperatureLogitsWarper, "temperature"),
    (TopKLogitsWarper, "top_k"),
    (TopPLogitsWarper, "top_p"),
    (MinPLogitsWarper, "min_p"),
)
"""What the kernel does itself, in transformers' order."""


class Patch:
    """The handle of :func:`patch_transformers`: a context manager, or :meth:`undo`."""

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """Put ``replacement`` in place."""
        self._original = original
        self._replacement = replacement
        _replace(replacement)

    def undo(self) -> None:
        """Put transformers' own sampling back; a second time does nothing.

        Raises:
            BackendError: something else has replaced the sampling loop since.

        """
        if GenerationMixin._sample is self._original:
            return
        if GenerationMixin._sample is not self._replacement:
            raise BackendError("GenerationMixin._sample was replaced by another patch since; undo that first")
        _replace(self._original)

    def __enter__(self) -> Patch:
        """The handle itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Undo."""
        self.undo()


def _replace(sample: Callable[..., Any]) -> None:
    setattr(GenerationMixin, "_sample", sample)  # noqa: B010 - to type checkers a method is not assigned to


def patch_transformers(backend: str = "auto") -> Patch:
    """Replace the sampling step of every ``model.generate(do_sample=True)`` by svdk's kernel.

    Temperature, top-k, top-p, min-p, softmax and the draw become one pass over the logits; everything
    else in ``generate`` stays transformers' own. The distribution is the same, the tokens for a seed are
    not; ``torch.manual_seed`` makes them repeatable. Left alone, and sampled as ever: beam sampling and
    assisted decoding, ``output_scores``, filters that the kernel has not got (typical_p, top_h,
    epsilon_cutoff, eta_cutoff), and processors placed behind the filters.

    A step raises where ``torch.multinomial`` would: scores that are NaN, +inf or all -inf once divided by the
    temperature. To know, it waits for the device once; plain sampling does so as well, twice.

    Patching twice replaces the backend; the older handle is then void.

    Returns:
        A handle with ``undo()``, also a context manager.

    Raises:
        BackendError: this version of transformers has another sampling loop, or the backend cannot run.

    """
    backends.resolve(backend, torch.empty(0))
    current = GenerationMixin._sample
    original = getattr(current, "_svdk_original", current)
    parameters = inspect.signature(original).parameters
    if not {"logits_processor", "generation_config"} <= set(parameters):
        raise BackendError(
            f"GenerationMixin._sample takes {', '.join(parameters)}; needed: logits_processor and "
            "generation_config (transformers 5)"
        )
    signature = inspect.signature(original)

    @functools.wraps(original)
    def sample(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        config = given["generation_config"]
        split = _split(given["logits_processor"], config)
        if split is not None:
            kept, filters = split
            given["logits_processor"] = LogitsProcessorList([*kept, _Drawn(filters, backend)])
            # The drawn token is the only finite score, so that taking the greatest takes it.
            given["generation_config"] = copy.copy(config)
            given["generation_config"].do_sample = False
        return original(*call.args, **call.kwargs)

    vars(sample)["_svdk_original"] = original
    return Patch(original, sample)


class _Drawn(LogitsProcessor):
    """Filters, draws, and returns scores that only the drawn token survives."""

    def __init__(self, filters: dict[str, Any], backend: str) -> None:
        self._sampling = SamplingConfig(**filters)
        self._backend = backend
        self._seeds: Tensor | None = None
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._seeds is None:
            self._seeds = row_seeds(None, scores.shape[0]).to(scores.device)
        rows = arguments.operands(scores)
        values = SteeringConfig().values() | self._sampling.values()
        values |= {"seed": self._seeds, "offset": self._step}
        token, _ = api.sample(rows, values, backend=self._backend)
        self._step += 1
        peaks = scores.amax(1) / self._sampling.temperature  # in float32, as TemperatureLogitsWarper divides
        if not peaks.isfinite().all():  # behind the draw, which runs while this waits
            raise _no_distribution(peaks)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def _no_distribution(peaks: Tensor) -> RuntimeError:
    """What ``torch.multinomial`` raises, and the rows beside it."""
    rows = ", ".join(map(str, peaks.isfinite().logical_not().nonzero()[:, 0].tolist()))
    return RuntimeError(
        "probability tensor contains either `inf`, `nan` or element < 0: the scores of these rows were NaN, "
        f"+inf or all -inf after processors and temperature: {rows}"
    )


def _split(
    processors: LogitsProcessorList, config: GenerationConfig
) -> tuple[list[LogitsProcessor], dict[str, Any]] | None:
    """What stays before the kernel and the kernel's filters; None to leave this call alone."""
    scores_wanted = config.return_dict_in_generate and config.output_scores
    if not config.do_sample or scores_wanted or config.is_assistant:
        return None
    kept: list[LogitsProcessor] = []
    filters: dict[str, Any] = {}
    reached = -1
    for processor in processors:
        found = [i for i, (kind, _) in enumerate(_FILTERS) if type(processor) is kind]
        if not found:
            if filters:  # it wants to see what the filters left
                return None
            kept.append(processor)
            continue
        if found[0] <= reached:  # twice, or in another order: not what the kernel does
            return None
        reached = found[0]
        name = _FILTERS[reached][1]
        filters[name] = getattr(processor, name)
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            return None
    return kept, filters
