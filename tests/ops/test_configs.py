"""The two configurations that decoding carries from call to call."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import svdk
from svdk.errors import InputError
from tests.helpers import ops_cases as oc


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": math.nan}, "strength was nan; allowed: a finite number"),
        ({"strength": True}, "strength was True; allowed: a finite number"),
        ({"strength": -1.0, "strength_mode": "kl_budget"}, "allowed for kl_budget: a number >= 0"),
        ({"strength_mode": "label"}, "strength_mode was 'label'; allowed: 'constant' | 'kl_budget'"),
        ({"direction": "up"}, "direction was 'up'; allowed: 'kl_gradient' | 'log_ratio' | 'vector'"),
        ({"alpha": 1.5}, r"alpha was 1.5; allowed: a number in \[0, 1\]"),
        ({"penalty": math.inf}, "penalty was inf; allowed: a finite number or -inf"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        svdk.SteeringConfig(**values)
    with pytest.raises(InputError, match=message):
        svdk.Steering(**values)


def test_an_artifact_is_a_config_of_numbers():
    artifact = svdk.Steering(strength=2.0, direction="log_ratio")
    assert isinstance(artifact, svdk.SteeringConfig)
    with pytest.raises(InputError, match="strength was a tensor; allowed in an artifact: a number"):
        svdk.Steering(strength=torch.ones(2))
    assert svdk.SteeringConfig(strength=torch.ones(2)).strength.shape == (2,)


def test_what_is_none_stays_as_it_is():
    saved = svdk.Steering(strength=2.0, direction="log_ratio", alpha=0.3, gain=0.5)
    changed = saved.override(strength=1.0, alpha=None, penalty=-3.0)
    assert type(changed) is svdk.SteeringConfig
    assert (changed.strength, changed.direction, changed.alpha, changed.penalty) == (
        1.0,
        "log_ratio",
        0.3,
        -3.0,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.strength = 3.0


def test_values_are_arguments_of_the_op():
    warm, base = oc.logits(4, 50)
    steering, sampling = (
        svdk.SteeringConfig(strength=1.5),
        svdk.SamplingConfig(temperature=0.7, top_k=9, seed=3),
    )
    got = svdk.steered_sample(warm, base, **steering.values(), **sampling.values())
    assert torch.equal(got, svdk.steered_sample(warm, base, strength=1.5, temperature=0.7, top_k=9, seed=3))


def test_filters_that_may_cut():
    assert not svdk.SamplingConfig(temperature=0.5, seed=4).filters
    for name, value in (("top_k", 3), ("top_p", 0.9), ("min_p", 0.1), ("top_p", torch.ones(2))):
        assert svdk.SamplingConfig(**{name: value}).filters
