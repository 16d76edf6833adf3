"""Token ids: rows of them padded to one length, and those that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int = 0,
    *,
    left: bool = True,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each int64 (B, T), of rows padded to the longest on one side."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        where = slice(width - len(tokens), width) if left else slice(len(tokens))
        ids[row, where] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


def id_list(ids: int | Sequence[int] | None) -> list[int]:
    """What configurations write as None, one id or several."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a text: the tokenizer's, then those of the model's generation config.

    Chat models often have one for the turn and one for the text.
    """
    config = getattr(model, "generation_config", None)
    own = id_list(tokenizer.eos_token_id) + id_list(getattr(config, "eos_token_id", None))
    return list(dict.fromkeys(own))
