"""What a steered model keeps between ``forward`` and ``compute_logits``: which rows are whose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from svdk.errors import InputError
from svdk.vllm.requests import RequestDial
from svdk.vllm.slots import Rows, SlotTable, kind_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from svdk.vllm.rules import Rule

DIGITS = 3
"""Columns that number the rows of a forward, in base 128: exact in every floating-point type."""
BASE = 128


class Pairing:
    """The state of one steered model: its slots, and the rows of the forward that ran last.

    A hidden state leaves ``forward`` with the number of its row beside it, so that the runner may pick rows
    as it likes; ``compute_logits`` looks up by that number whose row it is. Rows are numbered over the tokens
    of one forward; the tables are overwritten by the next, which the same stream runs later.
    """

    def __init__(self, vllm_config: VllmConfig, hidden_size: int, vocab_size: int) -> None:
        """Buffers for ``max_num_batched_tokens`` rows, on the engine's device."""
        lora = vllm_config.lora_config
        if lora is None:
            raise InputError("enable_lora was False; allowed for a steered model: True (--enable-lora)")
        device = torch.get_default_device()
        dtype = torch.get_default_dtype()
        most = vllm_config.scheduler_config.max_num_batched_tokens
        most = -(-most // 8) * 8
        if most > BASE**DIGITS:
            raise InputError(
                f"max_num_batched_tokens was {most}; allowed when steering: at most {BASE**DIGITS}"
            )
        self.hidden_size, self.rules, self.ids = hidden_size, dict[int, "Rule"](), list[int | None]()
        self.table = SlotTable(lora.max_loras, vocab_size, device)
        self.requests = RequestDial.newest
        self.on_cpu = device.type == "cpu"
        self.runs_base = self.steers = False
        """Whether the forward that runs has base rows, and whether its logits are steered."""
        self._batch_base = self._batch_steers = False
        self._tokens = torch.zeros(2 * most, dtype=torch.int32, device=device)
        self._places = torch.zeros(2 * most, dtype=torch.int64, device=device)
        self._slot = torch.full((most,), lora.max_loras, dtype=torch.int64, device=device)
        self._position = torch.zeros(most, dtype=torch.int64, device=device)
        self._request = torch.zeros(most, dtype=torch.int64, device=device)
        self._number = torch.arange(most, device=device)
        digits = [self._number // BASE**k % BASE for k in range(DIGITS)]
        self._digits = torch.stack(digits, 1).to(dtype)

    def refresh(self) -> None:
        """Write the rules of the adapters that are in slots now."""
        self.table.fill(self.ids, self.rules)

    def plan(self, mapping: Any, ids: list[int | None], token_slots: Tensor) -> None:
        """Decide what the next forward runs from the adapters of its tokens; on the host, before it.

        ``mapping``: vLLM's, an adapter id a token (0: none). An adapter without a rule is one of vLLM's
        dummies for profiling: it runs what costs most.
        """
        if ids != self.ids:
            self.ids = list(ids)
            self.refresh()
        used = [self.rules.get(i) for i in set(mapping.index_mapping) if i > 0]
        self.table.present = {kind_of(rule) for rule in used if rule is not None and rule.steers}
        self._batch_base = any(rule is None or rule.needs_base for rule in used)
        self._batch_steers = any(rule is None or rule.steers for rule in used)
        count = token_slots.shape[0]
        self._slot[:count] = torch.where(token_slots < 0, self.table.slots, token_slots)
        self._slot[count:] = self.table.slots

    def open(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and positions (n,) or, with base rows, (2n,): the warm rows, then the same again."""
        self.runs_base, self.steers = self._batch_base, self._batch_steers
        n = positions.shape[0]
        if not self.steers:
            return tokens, positions
        self._position[:n] = positions
        self._request[:n] = self._requests_of(n)
        if not self.runs_base:
            return tokens, positions
        for buffer, value in ((self._tokens, tokens), (self._places, positions)):
            buffer[:n] = value
            buffer[n : 2 * n] = value
        return self._tokens[: 2 * n], self._places[: 2 * n]

    def close(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, H), or (n, 2H + 3) and (n, H + 3) with a row's partner and its number."""
        if not self.steers:
            return hidden
        if not self.runs_base:
            return torch.cat([hidden, self._digits[: hidden.shape[0]]], 1)
        n = hidden.shape[0] // 2
        return torch.cat([hidden[:n], hidden[n:], self._digits[:n]], 1)

    def rows(self, digits: Tensor) -> Rows:
        """Whose rows these are, from the columns (n, 3) that number them."""
        weights = BASE ** torch.arange(DIGITS, device=digits.device)
        number = (digits.round().long() * weights).sum(1).clamp(0, self._slot.shape[0] - 1)
        position, slot = self._position[number], self._slot[number]
        if self.requests is None:
            return Rows(slot, position, torch.ones(len(number), device=digits.device))
        request = self._request[number].clamp(max=self.requests.dial.shape[0] - 1)
        # The row of token t says what comes after it: the last of the prompt is output position 0.
        at = (position + 1 - self.requests.prompt[request]).clamp(min=0)
        return Rows(slot, at, self.requests.dial[request])

    def _requests_of(self, n: int) -> Tensor | int:
        """int64 (n,): the place of each token's request in the batch."""
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):
            metadata = metadata[0]
        if isinstance(metadata, dict):
            metadata = next(iter(metadata.values()), None)
        if metadata is None:  # a profiling run
            return 0
        starts = getattr(metadata, "query_start_loc", None)
        if starts is None:
            name = type(metadata).__name__
            raise InputError(
                f"attention metadata was {name}; allowed when steering: one with query_start_loc"
            )
        return torch.searchsorted(starts[1:].long(), self._number[:n], right=True)
