"""Checks of arguments, with one wording of their errors; those of tensors are in ``svdk.ops.arguments``."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeGuard

from svdk.errors import InputError


def fail(name: str, was: object, allowed: str) -> InputError:
    """The one wording of an argument error."""
    return InputError(f"{name} was {was}; allowed: {allowed}")


def is_number(value: object) -> TypeGuard[float]:
    """True for a real int or float (NaN included), not for a bool or an int that no float can hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() < 1024
    return isinstance(value, float)


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """``InputError`` unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise fail(name, repr(value), ", ".join(allowed))


def check_count(name: str, value: object, least: int = 1) -> None:
    """``InputError`` unless ``value`` is an integer of at least ``least``."""
    if not is_number(value) or not isinstance(value, int) or value < least:
        raise fail(name, repr(value), f"an integer of at least {least}")


def check_number(name: str, value: object, interval: str) -> float:
    """``value`` as a float; ``InputError`` unless it is a number in ``interval``, such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    if is_number(value):
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        if above and below:
            return float(value)
    raise fail(name, repr(value), f"a number in {interval}")


def check_seed(seed: object) -> None:
    """``InputError`` unless ``seed`` is one that Python, NumPy and torch all take."""
    if not is_number(seed) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise fail("seed", repr(seed), "an integer in [0, 2**32)")
