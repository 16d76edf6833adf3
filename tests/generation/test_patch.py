"""``svdk.patch_transformers()``: the same distribution from an unmodified ``generate``, and back again."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import GenerationMixin, LogitsProcessor, TopKLogitsWarper

import svdk
from svdk.errors import BackendError
from svdk.generation import patch as patching
from tests.helpers import tiny

DRAWS = 4000
FILTERS = {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02}


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every draw that svdk made, by name."""
    seen = []
    draw = patching.api.sample

    def record(rows, values, **kwargs):
        seen.append(dict(values) | kwargs)
        return draw(rows, values, **kwargs)

    monkeypatch.setattr(patching.api, "sample", record)
    return seen


def sample(model, n=DRAWS, seed=0, **options):
    torch.manual_seed(seed)
    options = {"do_sample": True, "max_new_tokens": 1, "eos_token_id": None} | FILTERS | options
    return model.generate(torch.tensor([[9, 70, 33]]), num_return_sequences=n, **options)


def test_same_distribution_as_unpatched(model, calls):
    ours_start = len(calls)
    with svdk.patch_transformers():
        ours = sample(model)[:, -1]
    assert len(calls) == ours_start + 1
    want = model(torch.tensor([[9, 70, 33]])).logits[0, -1].detach().double()
    ones = torch.ones(1, dtype=torch.double)
    keep = svdk.reference.filter_row(want[None], ones * 0.7, ones * 12, ones * 0.9, ones * 0.02)[0]
    expected = torch.where(keep, want / 0.7, -torch.inf).softmax(0) * DRAWS
    count = torch.bincount(ours, minlength=tiny.VOCAB_SIZE).double()
    assert (count[~keep] == 0).all()
    chi2 = ((count - expected) ** 2 / expected)[keep].sum().item()
    degrees = int(keep.sum()) - 1
    assert degrees >= 3
    assert chi2 < degrees + 6 * (2 * degrees) ** 0.5
    theirs = torch.bincount(sample(model)[:, -1], minlength=tiny.VOCAB_SIZE)
    assert (theirs[~keep] == 0).all()  # the unpatched filters cut the same tokens


def test_repeatable_and_different_rows_and_steps(model):
    with svdk.patch_transformers():
        first = sample(model, 8, max_new_tokens=6, temperature=3.0, top_k=0)
        assert torch.equal(first, sample(model, 8, max_new_tokens=6, temperature=3.0, top_k=0))
        assert not torch.equal(first, sample(model, 8, seed=1, max_new_tokens=6, temperature=3.0, top_k=0))
    assert len({tuple(row.tolist()) for row in first}) == 8
    assert len(set(first[0, 3:].tolist())) > 1


def test_earlier_processors_still_run(model, calls):
    banned = sample(model, 200)[:, -1].unique().tolist()
    with svdk.patch_transformers():
        again = sample(model, 200, suppress_tokens=banned)[:, -1]
    assert calls and not set(again.tolist()) & set(banned)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "num_return_sequences": 1},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 0.01},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 3},
        {"logits_processor": [TopKLogitsWarper(3)]},  # a second top-k, in front of the temperature
    ],
)
def test_calls_that_are_left_alone(model, calls, options):
    options = {"num_return_sequences": 2} | options
    n = options.pop("num_return_sequences")
    want = sample(model, n, **options)
    with svdk.patch_transformers():
        got = sample(model, n, **options)
    assert not calls
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
    else:
        assert torch.equal(got.sequences, want.sequences)
        assert torch.equal(got.scores[0], want.scores[0])


class Changed(LogitsProcessor):
    """The scores after a function."""

    def __init__(self, change):
        self.change = change

    def __call__(self, input_ids, scores):
        return self.change(scores.clone())


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.index_fill_(1, torch.tensor([3]), float("nan")),
        lambda z: z.index_fill_(1, torch.tensor([3]), float("inf")),
        lambda z: z.index_fill_(1, torch.tensor([3]), -LOWEST),  # infinite over a temperature below 1
        lambda z: z.fill_(-float("inf")),
        lambda z: z.fill_(LOWEST),  # the same, and nothing left
        lambda z: z.fill_(LOWEST).index_fill_(1, torch.tensor([3, 5]), -1e30),
    ],
    ids=["nan", "inf", "greatest", "nothing", "lowest", "two left"],
)
def test_raises_where_plain_sampling_does(model, calls, change, temperature):
    options = FILTERS | {"temperature": temperature, "min_p": None, "logits_processor": [Changed(change)]}
    try:
        plain = sample(model, 3000, **options)[:, -1].unique()
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)) as raised, svdk.patch_transformers():
            sample(model, 2, **options)
        assert str(raised.value).endswith("temperature: 0, 1")
    else:
        with svdk.patch_transformers():
            ours = sample(model, 3000, **options)[:, -1].unique()
        assert calls and len(plain) == len(ours)  # of equal ones top-p leaves others there, but as many


def test_one_bad_row_is_named(model):
    def change(z):
        z[1, 4] = float("nan")
        return z

    with pytest.raises(RuntimeError, match=r"temperature: 1$"), svdk.patch_transformers():
        sample(model, 3, logits_processor=[Changed(change)])


def test_raw_logits_are_still_returned(model, calls):
    with svdk.patch_transformers():
        out = sample(model, 1, return_dict_in_generate=True, output_logits=True)
    assert calls and out.logits[0].isfinite().all()


def test_undo(model):
    original = GenerationMixin._sample
    handle = svdk.patch_transformers()
    assert GenerationMixin._sample is not original
    handle.undo()
    handle.undo()
    assert GenerationMixin._sample is original
    with pytest.raises(RuntimeError, match="inside"), svdk.patch_transformers():
        raise RuntimeError("inside")
    assert GenerationMixin._sample is original


def test_patching_twice(model, calls):
    original = GenerationMixin._sample
    first = svdk.patch_transformers()
    second = svdk.patch_transformers(backend="reference")
    sample(model, 1)
    assert [call["backend"] for call in calls] == ["reference"]
    with pytest.raises(BackendError, match="replaced by another patch"):
        first.undo()
    second.undo()
    assert GenerationMixin._sample is original
    first.undo()


def test_refusals(monkeypatch):
    with pytest.raises(svdk.InputError, match="backend was 'gpu'"):
        svdk.patch_transformers(backend="gpu")
    monkeypatch.setattr(GenerationMixin, "_sample", lambda self, input_ids: input_ids)
    with pytest.raises(BackendError, match=r"GenerationMixin\._sample takes self, input_ids; needed"):
        svdk.patch_transformers()
