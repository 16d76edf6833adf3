"""Left-padded rows, with virtual tokens between the padding and the row's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.errors import InputError


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask of left-padded rows (B, T), or None when nothing is padded (attention is faster then).

    Raises:
        InputError: wrong shape or type, an empty row, or padding that is not on the left.

    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
        found = f"{tuple(input_ids.shape)} {input_ids.dtype}"
        raise InputError(f"input_ids was {found}; allowed: integers of shape (B, T), T at least 1")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        had, wanted = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise InputError(f"attention_mask had shape {had}; allowed: that of input_ids, {wanted}")
    mask = attention_mask != 0
    if bool(mask.all()):
        return None
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError(
            "attention_mask had a 0 after a 1 or an empty row; allowed: padding on the left only"
        )
    return mask.long()


def row_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position ids (B, T) of whole rows; padding, which has position 0, does not shift them."""
    pads = None if attention_mask is None else (attention_mask == 0).sum(1)
    return Layout(len(input_ids), pads, 0, 0, input_ids.device).positions(input_ids.shape[1])


@dataclass(frozen=True)
class Layout:
    """How the columns of a forward are used, row by row: ``[padding][virtual tokens][own tokens]``.

    Padding comes first, before the virtual tokens: what counts columns (attention windows) or runs through
    them (recurrent states) then finds in a padded row what it finds in the row alone.
    """

    rows: int
    pads: Tensor | None
    """(R,) padded columns, None: no row has any."""
    virtual: int
    """Virtual tokens of a row that has them."""
    warm: int
    """Rows that have them: the first ones. For the others these columns are padding."""
    device: torch.device

    @property
    def leads(self) -> Tensor | None:
        """(R,) columns to be masked, from the left; None: no row has any."""
        if self.pads is None and (not self.virtual or self.warm == self.rows):
            return None
        leads = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        leads[self.warm :] = self.virtual
        return leads if self.pads is None else leads + self.pads

    def mask(self, width: int) -> Tensor | None:
        """(R, width) 1 for real and virtual tokens; None: nothing is padded."""
        leads = self.leads
        if leads is None:
            return None
        return (torch.arange(width, device=self.device) >= leads[:, None]).long()

    def positions(self, width: int) -> Tensor:
        """(R, width) position ids, 0 at padding."""
        columns = torch.arange(width, device=self.device)
        leads = self.leads
        if leads is None:
            return columns.expand(self.rows, -1)
        return (columns - leads[:, None]).clamp(min=0)

    def spots(self) -> tuple[Tensor, Tensor]:
        """Row and column indices (W, 1) and (W, virtual) of the virtual tokens."""
        rows = torch.arange(self.warm, device=self.device)[:, None]
        columns = torch.arange(self.virtual, device=self.device).expand(self.warm, -1)
        return rows, columns if self.pads is None else columns + self.pads[: self.warm, None]

    def ids(self, input_ids: Tensor) -> Tensor:
        """(R, virtual + T): whole rows (R, T) with columns for the virtual tokens.

        What stands in these columns is replaced or masked; it is a token of the row, since some models
        give padding ids a meaning of their own.
        """
        return torch.cat([input_ids[:, -1:].expand(-1, self.virtual), input_ids], dim=1)
