"""Padded rows and the ids that end a text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from svdk.utils.tokens import eos_ids, id_list, pad


def test_padding_on_the_left():
    ids, mask = pad([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_padding_on_the_right_and_empty_rows():
    ids, mask = pad([[], [4, 5], (6,)], left=False, device="cpu")
    assert ids.tolist() == [[0, 0], [4, 5], [6, 0]]
    assert mask.tolist() == [[0, 0], [1, 1], [1, 0]]
    assert pad([[], [7]])[0].tolist() == [[0], [7]]


def test_one_id_or_several():
    assert (id_list(None), id_list(0), id_list([3, 2]), id_list((1,))) == ([], [0], [3, 2], [1])


@pytest.mark.parametrize(
    ("tokenizer", "model", "found"),
    [(2, None, [2]), (2, 2, [2]), (2, [7, 2], [2, 7]), (None, 7, [7]), (None, None, []), (0, [1], [0, 1])],
)
def test_every_id_that_ends_a_text_once_the_tokenizers_first(tokenizer, model, found):
    config = SimpleNamespace(eos_token_id=model)
    tokenizer = SimpleNamespace(eos_token_id=tokenizer)
    assert eos_ids(SimpleNamespace(generation_config=config), tokenizer) == found


def test_a_model_without_a_generation_config():
    assert eos_ids(object(), SimpleNamespace(eos_token_id=4)) == [4]
