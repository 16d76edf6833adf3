"""The lever ``vector`` of a calibration: a static vector beside the others, against plain forwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from svdk import Steering, calibrate, generate, recalibrate
from svdk.calibration.estimators import split_folds
from svdk.calibration.kept_statistics import GridSums, Statistics
from svdk.calibration.report import make_report
from svdk.calibration.static_vector import static_vector
from svdk.errors import ArtifactError, InputError
from svdk.models.pair import ModelPair
from tests.calibration.test_levers import CalibrationConfig, problem
from tests.calibration.test_static_vector import ROWS, nll
from tests.helpers import tiny

FOLDS, SEED = 3, 1


@pytest.fixture(scope="module")
def many():
    return problem(400)


def unit(vector):
    vector = vector - vector.median()
    return vector / vector.abs().max()


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_curves_are_those_of_vectors_that_have_not_seen_the_example(
    folder,
    tiny_tokenizer,
    monkeypatch,
    chunk,
):
    if chunk:
        monkeypatch.setattr("svdk.calibration.alone.MAX_OP", chunk * tiny.VOCAB_SIZE)
    steering = calibrate(
        tiny.tiny_model(), folder, ROWS, tokenizer=tiny_tokenizer, lever="vector", folds=FOLDS, seed=SEED,
        batch_size=4, resamples=20,
    )  # fmt: skip
    model, fold = tiny.tiny_peft("lora"), split_folds(len(ROWS), FOLDS, SEED).tolist()
    view = Statistics.from_tensors(steering.statistics).vector_view()
    for k in range(FOLDS):
        others = [row for row, f in zip(ROWS, fold, strict=True) if f != k]
        vector = unit(static_vector(model, others, tokenizer=tiny_tokenizer))
        for mu in (0.0, float(view.grid[30])):
            found = view.evaluate(mu).nll
            for i in (i for i, f in enumerate(fold) if f == k):
                assert float(found[i]) == pytest.approx(
                    nll(model, tiny_tokenizer, vector, mu, [ROWS[i]])[0], abs=1e-3
                )
    everything = unit(static_vector(model, ROWS, tokenizer=tiny_tokenizer))
    torch.testing.assert_close(steering.vector, everything, rtol=1e-4, atol=1e-5)
    at = [float(view.evaluate(steering.strength + d).nll.sum()) for d in (-0.05, 0.0, 0.05)]
    assert at[1] <= min(at[0], at[2])


def test_the_artifact_decodes_without_the_base_model(folder, tiny_tokenizer, monkeypatch):
    steering = calibrate(
        tiny.tiny_model(), folder, ROWS, tokenizer=tiny_tokenizer, lever="vector", resamples=20
    )
    assert (steering.lever, steering.direction, steering.alpha) == ("vector", "vector", 0.0)
    assert "vector" in steering.report().table() and steering.report().lever.rows == 1
    steering.save(folder)
    again = Steering.load(folder)
    assert again.report().lever.gain == pytest.approx(steering.gain)
    assert recalibrate(folder).strength == pytest.approx(steering.strength)
    constant = recalibrate(folder, lever="constant")
    assert (constant.lever, constant.direction, constant.vector) == ("constant", "kl_gradient", None)
    monkeypatch.setattr(ModelPair, "base", lambda *_, **__: pytest.fail("the base model ran"))
    model = tiny.tiny_peft("lora")
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(
        input_ids=ids, custom_generate=generate, steering=again, max_new_tokens=1, do_sample=False
    )
    with torch.no_grad():
        steered = model(input_ids=ids).logits[0, -1] + again.strength * again.vector
    assert int(out[0, -1]) == int(steered.argmax())


def along(statistics, gain: float):
    """``statistics`` as if a static vector saved up to ``gain`` nats a token, at strength 2."""
    grid = statistics.grid
    tokens, mu = int(statistics.tokens.sum()), grid.float()
    curves = torch.stack([gain / 4 * ((mu - 2) ** 2 - 4), gain / 2 * (mu - 2), torch.full_like(mu, gain / 2)])
    curves = curves[:, None].expand(3, tokens, -1).clone()
    curves[0] -= statistics.logprob_warm[:, None]
    hits = torch.zeros(tokens, len(grid), dtype=torch.bool)
    sums = GridSums(torch.zeros(3, tokens), curves, hits)
    return dataclasses.replace(statistics, vector=torch.ones(4), along_vector=sums)


def test_it_stands_in_the_table_and_is_taken_where_it_wins(many):
    config = CalibrationConfig("log_ratio", 0.0, lever="auto", resamples=100)
    report = make_report(along(many, 3.0), config)
    assert [row.fitted.lever for row in report.levers] == [
        "none", "vector", "constant", "classes", "positions",
    ]  # fmt: skip
    assert report.lever.fitted.lever == "vector"
    assert report.lever.fitted.strength == pytest.approx(2.0, abs=1e-6)
    assert report.lever.gain == pytest.approx(3.0, rel=1e-6)
    steering = report.steering()
    assert (steering.direction, steering.strength) == ("vector", pytest.approx(2.0, abs=1e-6))
    assert CalibrationConfig.of(steering).direction == "log_ratio"
    worse = make_report(along(many, 0.001), config)
    assert worse.lever.fitted.lever == "positions"


def test_it_was_tried_or_it_is_refused(many):
    with pytest.raises(InputError, match="a static vector was not tried; allowed: lever='vector'"):
        make_report(many, CalibrationConfig("log_ratio", 0.0, lever="vector"))
    tensors = along(many, 1.0).tensors()
    assert torch.equal(Statistics.from_tensors(tensors).vector, torch.ones(4))
    for name, bad in (("vector", torch.tensor([float("nan")])), ("along_vector.hits", torch.zeros(3))):
        with pytest.raises(ArtifactError, match="inconsistent"):
            Statistics.from_tensors(tensors | {name: bad})
    del tensors["along_vector.curves"]
    with pytest.raises(ArtifactError, match="incomplete"):
        Statistics.from_tensors(tensors)
    with pytest.raises(InputError, match="objective 'choice'"):
        CalibrationConfig(objective="choice", lever="vector")
    assert problem(6).vector is None
