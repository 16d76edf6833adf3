"""Both views of a ModelPair in one forward: 2B rows, one read of the weights, one key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from svdk.errors import BackendError, InputError, first_line, out_of_memory
from svdk.models.cpu_linear import fast_linears, replaced
from svdk.models.pair import ModelPair
from svdk.models.paired_adapters import RowSpans, route
from svdk.models.stream import ViewCache
from svdk.utils.checks import check_choice
from svdk.utils.notices import warn_once
from svdk.utils.views import BASE, WARM

NO_ADAPTER = "__base__"
"""PEFT's name for rows without an adapter."""
FORWARDS = ("auto", "paired", "two_pass")
"""How the two views of a step are run: "auto" pairs them when it can."""

_probed: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = WeakKeyDictionary()


class PairedForward:
    """One forward over 2B rows of a :class:`svdk.ModelPair`: the warm rows, then the base rows.

    The base layers run over all rows, the adapter's arithmetic only over the warm ones; with virtual
    tokens, the base rows have padding for them. The layers' forwards are
    replaced for the length of one call. Reads the adapter's weights once, here: build a new one
    after changing the active adapter.

    Args:
        pair: the two views.
        row_adapters: the adapter's name for each of the B rows (LoRA only); None: the active one for all.

    Raises:
        InputError: the pair cannot be paired (the message says why), or an unknown adapter.

    """

    def __init__(self, pair: ModelPair, row_adapters: Sequence[str] | None = None) -> None:
        """Build the layers' forwards; nothing in the model is changed yet."""
        self.pair = pair
        self._rows = RowSpans()
        self._order: Tensor | None = None
        names = None
        if row_adapters is not None:
            names = _check_adapters(pair, row_adapters)
            # RowSpans of one adapter side by side, so that every layer works on slices.
            order = sorted(range(len(row_adapters)), key=lambda row: row_adapters[row])
            self._adapters = [row_adapters[row] for row in order]
            self._order = torch.tensor(order, device=pair.device)
        reason, self._forwards = _routes(pair, self._rows, names)
        if reason is not None:
            raise _not_paired(reason)

        self._forwards += fast_linears(pair.module)

    def new_cache(self, implementation: str | None = None, max_length: int | None = None) -> ViewCache:
        """An empty cache for the rows of both views; arguments as :meth:`ModelPair.new_cache`."""
        return self.pair.new_cache("paired", implementation, max_length)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: ViewCache | None = None,
        keep: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Warm and base logits (B, keep, V), views of one (2B, keep, V) tensor; arguments as ``warm``."""
        order = self._order
        if order is not None:
            if len(order) != len(input_ids):
                raise InputError(
                    f"row_adapters had {len(order)} names; allowed: one for each of {len(input_ids)} rows"
                )
            input_ids = input_ids[order]
            attention_mask = None if attention_mask is None else attention_mask[order]
        batch = len(input_ids)
        both = torch.cat([input_ids, input_ids])
        mask = None if attention_mask is None else torch.cat([attention_mask, attention_mask])
        with self._routed(batch):
            logits = self.pair.forward_rows(both, mask, cache, keep, warm=batch)
        warm, base = logits.chunk(2)
        if order is not None:
            back = order.argsort()
            warm, base = warm[back], base[back]
        return warm, base

    def verify(self, input_ids: Tensor, attention_mask: Tensor | None, logits: tuple[Tensor, Tensor]) -> None:
        """Compare the first step's ``logits`` with each model's own forward; a debugging aid.

        Raises:
            BackendError: a row differs by more than rounding.

        """
        for view, got in zip((WARM, BASE), logits, strict=True):
            if view == WARM and self._order is not None:
                continue  # the warm view knows one adapter at a time
            want = getattr(self.pair, view)(input_ids, attention_mask)[:, -1].float()
            worst = ((got[:, -1].float() - want).abs().amax(1) / want.abs().amax(1)).max().item()
            exact = got.dtype == torch.float32 and not torch.is_autocast_enabled(got.device.type)
            limit = 1e-3 if exact else 0.1
            if not worst <= limit:
                raise BackendError(
                    f"the paired forward's {view} rows differ from the {view} model's own by {worst:.2g} of "
                    f"the largest logit (limit {limit:g}); use forward='two_pass' and report this model"
                )

    @contextmanager
    def _routed(self, batch: int) -> Iterator[None]:
        self._rows.total, self._rows.stream = 2 * batch, self.pair.stream
        self._rows.spans = [(None, 0, batch)] if self._order is None else _spans(self._adapters)
        with replaced(self._forwards):
            yield


def why_not_paired(
    pair: ModelPair, input_ids: Tensor | None = None, row_adapters: Sequence[str] | None = None
) -> str | None:
    """Why the two views of ``pair`` cannot share a forward; None when they can.

    Two tiny rows decide, run both ways, once a model and its adapters; ``input_ids`` (B, T): where their
    tokens are from. ``row_adapters``: as in :class:`PairedForward`.
    """
    if pair.num_virtual_tokens and pair.traits.padding is not None:
        return f"base rows would have padding for virtual tokens, and {pair.traits.padding}"
    names = None if row_adapters is None else _check_adapters(pair, row_adapters)
    reason = _routes(pair, RowSpans(), names)[0]
    if reason is not None:
        return reason
    found = _probed.setdefault(pair.module, {})
    key = (_state(pair, names), torch.is_autocast_enabled(pair.device.type))
    if key not in found:
        found[key] = _probe(pair, input_ids, names)
    return found[key]


def _state(pair: ModelPair, names: list[str] | None) -> tuple[Any, ...]:
    """What a probe depends on: layers, active adapters or those of the rows, types."""
    layers = [(name, tuple(getattr(layer, "active_adapters", ()))) for name, layer in pair.layers.items()]
    return (pair.peft_type, pair.module.dtype, *layers, names and tuple(names))


def _probe(pair: ModelPair, input_ids: Tensor | None, names: list[str] | None) -> str | None:
    """Run two rows of three tokens, the last one as a step of its own, and compare with the two views."""
    if input_ids is None:
        input_ids = torch.arange(3, device=pair.device)[None] + pair.vocab_size // 3
    # The right end of a row is never padding; ids that are none must not be remembered as the model's fault.
    tokens = input_ids[0, -3:].repeat(3)[-3:] % pair.vocab_size
    ids = torch.stack([tokens, tokens.flip(0)])
    if names is not None:
        ids = ids.repeat(len(names), 1)[: len(names)]
    try:
        forward = PairedForward(pair, names)
        with pair.evaluating():
            cache = forward.new_cache()
            forward(ids[:, :2], cache=cache)
            logits = forward(ids[:, 2:], cache=cache)
            forward.verify(ids, None, logits)
    except Exception as error:  # whatever a model's code raises in a layout that it was not written for
        if out_of_memory(error):
            raise
        return f"one forward for both failed on this model ({type(error).__name__}: {first_line(error)})"
    return None


def choose_forward(
    pair: ModelPair,
    forward: str,
    row_adapters: Sequence[str] | None = None,
    input_ids: Tensor | None = None,
) -> PairedForward | None:
    """The paired forward, or None for two passes; "auto" says once why it fell back.

    Raises:
        InputError: an unknown name, or "paired" (or ``row_adapters``) for a pair that cannot be.

    """
    check_choice("forward", forward, FORWARDS)
    if row_adapters is not None and forward == "two_pass":
        raise InputError("forward was 'two_pass' with row_adapters; allowed: 'auto' or 'paired'")
    if forward == "two_pass":
        return None
    reason = why_not_paired(pair, input_ids, row_adapters)
    if reason is None:
        return PairedForward(pair, row_adapters)
    if forward == "paired" or row_adapters is not None:  # two passes know one adapter at a time
        raise _not_paired(reason)
    say_two_passes(reason)
    return None


def _not_paired(reason: str) -> InputError:
    return InputError(f"forward was 'paired'; allowed for this model: 'two_pass', because {reason}")


def say_two_passes(reason: str) -> None:
    """Warn, once a reason, that both models are run one after the other."""
    warn_once(f"svdk decodes with two forward passes a step, because {reason}")


def _routes(pair: ModelPair, rows: RowSpans, adapters: list[str] | None) -> tuple[str | None, list[Any]]:
    forwards = []
    for name, layer in pair.layers.items():
        if "experts" in name.split("."):  # tokens are regrouped there, row by row no more
            return f"layer {name}: rows are regrouped inside a mixture of experts", []
        forward = route(layer, rows, adapters)
        if isinstance(forward, str):
            return f"layer {name}: {forward}", []
        forwards.append((layer, forward))
    return None, forwards


def _check_adapters(pair: ModelPair, row_adapters: Sequence[str]) -> list[str]:
    names = sorted(set(row_adapters) - {NO_ADAPTER})
    loaded = sorted({name for layer in pair.layers.values() for name in getattr(layer, "lora_A", ())})
    unknown = [name for name in names if name not in loaded]
    if unknown or not row_adapters:
        raise InputError(f"row_adapters was {list(row_adapters)}; allowed: one a row, of {loaded}")
    pair.check_adapters(names)
    return [*names, NO_ADAPTER]


def _spans(adapters: list[str]) -> list[tuple[str | None, int, int]]:
    batch = len(adapters)
    starts = [row for row in range(batch) if row == 0 or adapters[row] != adapters[row - 1]]
    return [(adapters[first], first, end) for first, end in zip(starts, [*starts[1:], batch], strict=True)]
