"""Speculative sampling: exactly the target's distribution, and FlashInfer's counts and padding."""

from __future__ import annotations

import pytest
import torch

from svdk import sampling
from svdk.errors import InputError
from svdk.ops.philox import row_uniforms

VOCAB = 12
ROWS = 30000


def distributions(seed, *shape):
    """Probabilities with some zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    p = (1.5 * torch.randn(*shape, VOCAB, generator=generator)).softmax(-1)
    p = p.where(torch.rand(*shape, VOCAB, generator=generator) < 0.8, 0.0)
    return p / p.sum(-1, keepdim=True)


def spread(p, rows=ROWS):
    return p.expand(rows, *p.shape[1:]).contiguous()


def assert_drawn_from(tokens, p):
    """Support first, then chi-square at six standard deviations."""
    count = torch.bincount(tokens.long(), minlength=VOCAB).double()
    want = p.double() / p.double().sum() * len(tokens)
    assert (count[p == 0] == 0).all()
    seen = want > 5
    degrees = int(seen.sum()) - 1
    assert degrees >= 3
    chi2 = ((count - want) ** 2 / want)[seen].sum().item()
    assert chi2 < degrees + 6 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("same", [True, False], ids=["one seed for all", "other seeds"])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_distributed_as_the_target(seed, same):
    """Whatever the draft is, and with drafts drawn by the very seed and offset that check them too."""
    draft, target = distributions(seed, 1, 2), distributions(seed + 50, 1, 3)
    # Drafts of position 0 draw with offset 4 and so does the check.
    offsets = (4, 5) if same else (400, 500)
    ids = torch.stack(
        [sampling.sampling_from_probs(spread(draft[:, i]), seed=7, offset=offsets[i]) for i in range(2)], 1
    )
    tokens, accepted, emitted = sampling.chain_speculative_sampling(
        spread(draft), ids, spread(target), seed=7, offset=4
    )
    assert tokens.dtype == accepted.dtype == emitted.dtype == torch.int32
    assert_drawn_from(tokens[:, 0], target[0, 0])
    for first in tokens[:, 0].unique().tolist():  # what follows does not depend on what went before
        after = tokens[(tokens[:, 0] == first) & (emitted >= 1)]
        if len(after) > 2000:
            assert_drawn_from(after[:, 1], target[0, 1])
    assert_drawn_from(tokens[emitted == 2][:, 2], target[0, 2])
    # A position takes its draft with probability sum min(p, q), each by itself.
    rates = torch.minimum(draft[0], target[0, :2]).double().sum(-1)
    for got, want in ((emitted >= 1, rates[0]), (emitted == 2, rates.prod())):
        assert abs(got.double().mean() - want) < 6 * (want * (1 - want) / ROWS).sqrt()
    assert abs(accepted.double().mean() - rates.sum()) < 6 * (0.5 / ROWS) ** 0.5
    assert (accepted >= emitted).all() and (accepted > emitted).any()


def test_shape_of_what_comes_out():
    batch, steps = 400, 4
    draft, target = distributions(1, batch, steps), distributions(2, batch, steps + 1)
    ids = torch.stack([sampling.sampling_from_probs(draft[:, i], seed=i, offset=0) for i in range(steps)], 1)
    tokens, accepted, emitted = sampling.chain_speculative_sampling(draft, ids, target, seed=3, offset=0)
    assert set(emitted.tolist()) == set(range(steps + 1))
    for row, draft_ids, n in zip(tokens.tolist(), ids.tolist(), emitted.tolist(), strict=True):
        assert row[:n] == draft_ids[:n] and 0 <= row[n] < VOCAB and row[n + 1 :] == [-1] * (steps - n)
    again = sampling.chain_speculative_sampling(draft, ids, target, seed=3, offset=0)
    assert all(torch.equal(a, b) for a, b in zip(again, (tokens, accepted, emitted), strict=True))
    assert not torch.equal(
        sampling.chain_speculative_sampling(draft, ids, target, seed=3, offset=1)[0], tokens
    )
    # A row is its own seed's, whatever is around it.
    seeds = torch.arange(batch) * 31
    whole = sampling.chain_speculative_sampling(draft, ids, target, seed=seeds, offset=torch.tensor([2]))[0]
    part = sampling.chain_speculative_sampling(
        draft[50:60], ids[50:60].int(), target[50:60], seed=seeds[50:60].to(torch.uint64), offset=2
    )[0]
    assert torch.equal(whole[50:60], part)


def test_the_example_of_flashinfers_documentation():
    draft = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    target = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    tokens, accepted, emitted = sampling.chain_speculative_sampling(draft, torch.tensor([[2, 1]]), target)
    assert tokens.tolist() == [[2, 0, -1]] and accepted.tolist() == emitted.tolist() == [1]


def test_target_equal_to_draft_takes_everything():
    target = distributions(5, 300, 4)
    ids = torch.stack([sampling.sampling_from_probs(target[:, i], seed=i, offset=0) for i in range(3)], 1)
    tokens, accepted, emitted = sampling.chain_speculative_sampling(target[:, :3], ids, target)
    assert torch.equal(tokens[:, :3], ids) and (accepted == 3).all() and (emitted == 3).all()
    assert (tokens[:, 3] >= 0).all()


def test_rows_at_the_edge():
    nan = float("nan")
    one, other = [1.0, 0, 0], [0, 0.5, 0.5]
    cases = [  # draft, its token, target, the row after it, tokens
        (other, 0, one, one, [0, 0]),  # a token that the draft never gives, and the target always
        (one, 0, other, one, None),  # the reverse: the target's own
        (one, 1, one, one, [0, -1]),  # neither gives it, nothing is left of target - draft
        (one, 0, [nan, 1, 0], one, [-1, -1]),
        (one, 0, [1, nan, 0], one, [-1, -1]),  # NaN elsewhere in the row
        ([1, nan, 0], 0, one, one, [-1, -1]),
        (one, 0, [0.0, 0, 0], one, [-1, -1]),
        ([0.0, 0, 0], 2, other, other, None),
        (one, 0, one, [0.0, 0, 0], [0, -1]),
        (one, 0, one, [-1.0, 1, 1], [0, -1]),
    ]
    draft = torch.tensor([[c[0]] for c in cases])
    target = torch.tensor([[c[2], c[3]] for c in cases])
    tokens, _, emitted = sampling.chain_speculative_sampling(
        draft, torch.tensor([[c[1]] for c in cases]), target
    )
    for row, case in zip(tokens.tolist(), cases, strict=True):
        assert case[4] is None or row == case[4]
    assert tokens[1, 0] in (1, 2) and emitted[1] == 0
    assert tokens[7, 0] == 2 and emitted[7] == 1


def test_no_drafts_is_plain_sampling():
    target = distributions(8, 1, 1)
    tokens, accepted, emitted = sampling.chain_speculative_sampling(
        torch.empty(ROWS, 0, VOCAB), torch.empty(ROWS, 0, dtype=torch.int64), spread(target), seed=1, offset=0
    )
    assert tokens.shape == (ROWS, 1) and not accepted.any() and not emitted.any()
    assert_drawn_from(tokens[:, 0], target[0, 0])


def test_counts_are_added_in_place():
    draft, target = distributions(1, 5, 2), distributions(2, 5, 3)
    ids = torch.zeros(5, 2, dtype=torch.int32)
    _, accepted, emitted = sampling.chain_speculative_sampling(draft, ids, target, seed=1, offset=0)
    for dtype in (torch.int32, torch.int64):
        first, second = torch.full((5,), 10, dtype=dtype), torch.full((5,), 20, dtype=dtype)
        _, a, e = sampling.chain_speculative_sampling(draft, ids, target, first, second, seed=1, offset=0)
        assert a is first and e is second
        assert torch.equal(a, accepted + 10) and torch.equal(e, emitted + 20)


def test_streams_have_their_own_uniforms():
    seeds, offsets = torch.arange(1000) * 77, torch.full((1000,), 5)
    streams = torch.arange(3)
    u = row_uniforms(seeds[:, None], offsets[:, None], streams)
    for i in range(3):
        assert torch.equal(u[:, i], row_uniforms(seeds, offsets, i))
    assert abs(torch.corrcoef(u.T) - torch.eye(3, dtype=torch.double)).max() < 6 / 1000**0.5


D, T, IDS = distributions(1, 2, 3), distributions(2, 2, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f([[1.0]], IDS, T), r"draft_probs was \[\[1\.0\]\]"),
        (lambda f: f(D[0], IDS, T), "draft_probs was a tensor of shape"),
        (lambda f: f(D.long(), IDS, T), "draft_probs was torch.int64"),
        (lambda f: f(D, IDS, T[:, :3]), r"target_probs was .*allowed: \(2, 4, 12\)"),
        (lambda f: f(D, IDS[:, :2], T), r"draft_token_ids was .*\(2, 3\)"),
        (lambda f: f(D, IDS + VOCAB, T), r"draft_token_ids was 12\.\.12"),
        (lambda f: f(D, IDS - 1, T), r"draft_token_ids was -1\.\.-1"),
        (lambda f: f(D, IDS.float(), T), "draft_token_ids was .*torch.float32"),
        (lambda f: f(D, IDS, T, torch.zeros(3, dtype=torch.int32)), "maybe_output_accepted_token_num was"),
        (lambda f: f(D, IDS, T, None, torch.zeros(2)), "maybe_output_emitted_draft_token_num was .*float32"),
        (lambda f: f(D, IDS, T, [0, 0]), r"maybe_output_accepted_token_num was \[0, 0\]"),
        (lambda f: f(D, IDS, T, seed=torch.arange(5), offset=0), "seed was a tensor of shape"),
        (lambda f: f(D, IDS, T, generator=5), "generator was 5"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(sampling.chain_speculative_sampling)


class Counter(torch.Generator):
    """What a GPU's generator is to its user: a seed and an offset."""

    device = torch.device("cuda")
    at = 8

    def get_offset(self):
        return self.at

    def set_offset(self, offset):
        self.at = offset

    def initial_seed(self):
        return 1234


def test_seed_and_offset_of_generators():
    counter = Counter()
    steps = (5, 1, 0, 4, 8)
    assert [sampling.get_seed_and_offset(n, counter) for n in steps] == [
        (1234, n) for n in (8, 16, 20, 20, 24)
    ]
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = [sampling.get_seed_and_offset(4, one) for _ in range(20)]
    assert len(set(drawn)) == 20 and {offset for _, offset in drawn} == {0}
    assert drawn == [sampling.get_seed_and_offset(400, two) for _ in range(20)]
    torch.manual_seed(9)
    own = sampling.get_seed_and_offset(1)
    torch.manual_seed(9)
    assert sampling.get_seed_and_offset(1, device="cpu") == own
    logits = torch.randn(50, 30)
    seed, offset = own
    assert sampling.sampling_from_logits(logits, seed=seed, offset=offset).shape == (50,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(-1), "increment was -1"),
        (lambda f: f(1.5), r"increment was 1\.5"),
        (lambda f: f(1, generator=7), "generator was 7"),
        (lambda f: f(1, device="nowhere"), "device was 'nowhere'"),
        (lambda f: f(1, device="meta"), "device was meta"),
    ],
)
def test_bad_arguments_of_get_seed_and_offset(call, message):
    with pytest.raises(InputError, match=message):
        call(sampling.get_seed_and_offset)
