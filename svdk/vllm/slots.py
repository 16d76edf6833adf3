"""Rows of logits steered by the rule of the adapter slot that each belongs to; plain tensors, no vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.ops.api import steered_logits
from svdk.vllm.rules import Rule

FLOOR = 1e4
"""How far below its warm logit a token outside the mask lies. With -inf, a ban that the engine adds later (a
grammar, ``min_tokens``) could leave a row with nothing to draw; so the banned row goes by the warm order."""


@dataclass(frozen=True)
class Kind:
    """What one call of ``steered_logits`` has in common; the rest goes by rows."""

    direction: str
    penalty: float
    strength_mode: str


def kind_of(rule: Rule) -> Kind:
    """The kind that rows of a rule are of."""
    return Kind(rule.config.direction, rule.config.penalty, rule.config.strength_mode)


@dataclass(frozen=True, eq=False)
class Rows:
    """Where rows of logits (n,) belong, as tensors on the logits' device."""

    slot: Tensor
    """int64 (n,): the adapter slot; ``slots`` for none."""
    position: Tensor
    """int64 (n,): the output position, 0 for the first token that is generated."""
    dial: Tensor
    """float32 (n,): all strengths times this."""


class SlotTable:
    """The rules of the adapters in an engine's slots, as device tensors of fixed addresses.

    Writing them (when an adapter moves into a slot) is the host's business; steering never reads them there.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        """Nothing is steered yet; one slot more than ``slots`` stands for rows without an adapter."""
        rows = slots + 1
        self.slots, self.vocab_size, self.device = slots, vocab_size, device
        self.kinds: list[Kind] = []
        self.present: set[Kind] = set()
        """Of these, what the rows that come next may be of; the host knows it from their adapters."""
        self.kind = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.strength = torch.zeros(rows, device=device)
        self.alpha = torch.zeros(rows, device=device)
        self.listed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, device=device)
        self.vectors: Tensor | None = None
        self.steered = torch.zeros((), dtype=torch.int64, device=device)
        self.fallen = torch.zeros((), dtype=torch.int64, device=device)

    def fill(self, ids: Sequence[int | None], rules: Mapping[int, Rule]) -> None:
        """Write the rules of the adapters ``ids`` (slots,); a slot without one steers nothing."""
        held = {slot: rules[i] for slot, i in enumerate(ids) if i is not None and i in rules}
        held = {slot: rule for slot, rule in held.items() if rule.steers}
        rows = self.slots + 1
        kind, listed = torch.full((rows,), -1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        strength, alpha = torch.zeros(rows), torch.zeros(rows)
        longest = max((len(rule.config.positions) for rule in held.values()), default=0)
        positions = torch.zeros(rows, max(longest, self.positions.shape[1]))
        self.kinds = list(dict.fromkeys(kind_of(rule) for rule in held.values()))
        self.present = set(self.kinds)
        for slot, rule in held.items():
            config = rule.config
            kind[slot], listed[slot] = self.kinds.index(kind_of(rule)), len(config.positions)
            strength[slot], alpha[slot] = config.strength, config.alpha
            positions[slot, : len(config.positions)] = torch.tensor(list(config.positions))
            if rule.vector is not None:
                if self.vectors is None:
                    self.vectors = torch.zeros(rows, self.vocab_size, device=self.device)
                self.vectors[slot].copy_(rule.vector)
        for name, value in (("kind", kind), ("listed", listed), ("strength", strength), ("alpha", alpha)):
            getattr(self, name).copy_(value)
        if positions.shape[1] > self.positions.shape[1]:
            self.positions = positions.to(self.device)
        else:
            self.positions.copy_(positions)

    def strengths(self, rows: Rows, number: int) -> Tensor:
        """float32 (n,): what each row is steered with; 0 for rows of another kind than ``number``."""
        last = self.positions.shape[1] - 1
        at = rows.position.clamp(0, last)
        listed = rows.position < self.listed[rows.slot]
        mu = torch.where(listed, self.positions[rows.slot, at], self.strength[rows.slot])
        # A KL budget goes with the square of a strength, and one row's may be out of range for another.
        budget = self.kinds[number].strength_mode == "kl_budget"
        mu = mu * (rows.dial * rows.dial if budget else rows.dial)
        return torch.where(self.kind[rows.slot] == number, mu, 0.0)

    def steer(self, warm: Tensor, base: Tensor | None, rows: Rows) -> Tensor:
        """Steered logits float32 (n, V) from warm and base ones (n, V); no host synchronisation.

        Rows without a rule are copied. Outside the confidence mask a token lies ``FLOOR`` below its warm
        logit. A row with NaN or +inf in either model is the warm row, and is counted in ``fallen``.
        ``base`` None: no row here needs one.
        """
        kind = self.kind[rows.slot]
        alpha = self.alpha[rows.slot]
        out: Tensor | None = None
        for number, one in enumerate(self.kinds):
            vector = None
            if one.direction == "vector":
                vector = None if self.vectors is None else self.vectors[rows.slot]
            if one not in self.present or (vector is None and base is None):
                continue
            source = warm if out is None else out
            out = steered_logits(
                source,
                None if vector is not None else base,
                vector=vector,
                strength=self.strengths(rows, number),
                strength_mode=one.strength_mode,
                direction="kl_gradient" if vector is not None else one.direction,
                alpha=alpha,
                penalty=one.penalty,
                skip=kind != number,
                out=out,
            )
        if out is None:
            return warm.float()
        plain = warm.float()
        mine = kind >= 0
        # A row that cannot be steered is NaN throughout.
        invalid = mine & out[:, 0].isnan()
        masked = (out == -math.inf) & (plain > -math.inf) & mine[:, None]
        out = torch.where(masked, plain - FLOOR, out)
        out = torch.where(invalid[:, None], plain, out)
        self.steered += mine.sum()
        self.fallen += invalid.sum()
        return out
