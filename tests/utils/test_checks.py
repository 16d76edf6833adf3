"""Checks of arguments: what passes, and the one wording of what does not."""

from __future__ import annotations

import math
import re

import pytest

from svdk.errors import InputError
from svdk.utils.checks import check_choice, check_count, check_number, check_seed, fail, is_number

HUGE = 1 << 1024  # no float can hold it


def test_a_failure_names_the_argument_what_it_was_and_what_is_allowed():
    assert str(fail("name", "x", "a, b")) == "name was x; allowed: a, b"


def test_numbers():
    assert all(map(is_number, (0, -1, 1.5, math.nan, math.inf)))
    assert not any(map(is_number, (True, "1", None, 1j, [1], HUGE)))


def test_choices():
    check_choice("mode", "b", ("a", "b"))
    for value in ("c", "ab", None, 1, ["a"]):
        with pytest.raises(InputError, match=rf"mode was {re.escape(repr(value))}; allowed: a, b"):
            check_choice("mode", value, ("a", "b"))


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None, HUGE])
def test_counts(value):
    check_count("n", 1)
    check_count("n", 0, 0)
    with pytest.raises(InputError, match=f"n was {value!r}; allowed: an integer of at least 1"):
        check_count("n", value)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", (0, 1, 0.5), (-1e-9, 1.5, math.nan, "0.5", True, None)),
        ("[0, 1)", (0, 0.999), (1, math.inf)),
        ("(0, 1]", (1, 1e-300), (0, -0.0)),
        ("(0, inf)", (1e-300, 1e300), (0, math.inf, HUGE)),
        ("[-inf, inf)", (-math.inf, 0), (math.inf, math.nan)),
    ],
)
def test_intervals(interval, inside, outside):
    for value in inside:
        found = check_number("x", value, interval)
        assert found == value and isinstance(found, float)
    for value in outside:
        with pytest.raises(InputError, match=re.escape(f"allowed: a number in {interval}")):
            check_number("x", value, interval)


def test_seeds():
    for seed in (0, (1 << 32) - 1):
        check_seed(seed)
    for seed in (-1, 1 << 32, 1.0, True, None):
        with pytest.raises(InputError, match=rf"seed was {seed!r}; allowed: an integer in \[0, 2\*\*32\)"):
            check_seed(seed)
