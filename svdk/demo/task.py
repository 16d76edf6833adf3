"""The demo task: find the date in a sentence and write it as YYYY-MM-DD.

A made-up task has three merits here: it is generated from a seed (nothing to download), it has one right
answer (exact match needs no judge), and a small model knows the parts (month names, digits) but not the form,
so that a short warm start learns it only partly.
"""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from svdk.warmstart.data import Example

PROMPT = "Text: {text}\nDate (YYYY-MM-DD):"
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2029, 12, 31)
ISO = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CITIES = (
    "Athens", "Basel", "Bergen", "Bilbao", "Dublin", "Ghent", "Graz", "Krakow", "Leeds", "Lisbon", "Lyon",
    "Malmo", "Munich", "Oslo", "Porto", "Prague", "Turin", "Vienna",
)  # fmt: skip
NAMES = (
    "Anna", "Ben", "Clara", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karin", "Leo",
    "Maria", "Nora", "Oscar", "Paula", "Rosa", "Simon", "Tara", "Vera",
)  # fmt: skip
PLACES = ("library", "museum", "theatre", "market", "station", "school", "bakery", "cinema", "hospital")
SENTENCES = (
    "The meeting is on {day} {month} {year}.",
    "{name} moved to {city} on the {day}{th} of {month}, {year}.",
    "{name} was born {month} {day}, {year}.",
    "Dated {month} {day}{th}, {year}, in {city}.",
    "On {weekday}, {day} {month} {year}, the {place} in {city} opened.",
    "The {day}{th} {month} {year} edition sold out in {city}.",
    "{name} booked {count} seats for {weekday}, {month} {day}, {year}.",
    "It was {month} {day}, {year} when {city} got its {place}.",
    "The {place} of {city} has {count} rooms and dates from {day} {month} {year}.",
    "{count} people met at the {place} on the {day}{th} of {month} {year}.",
)


@dataclass(frozen=True)
class Task:
    """Three sets of examples without a date in common."""

    train: list[Example]
    calibration: list[Example]
    held_out: list[Example]


@dataclass(frozen=True)
class Score:
    """How good one answer is."""

    exact: bool
    valid: bool
    """It is a date of the calendar in the wanted form, whether or not the right one."""
    right: bool
    """It starts with the right date, whatever follows: exact match without the demand to stop there."""


def make_task(train: int, calibration: int, held_out: int, seed: int = 0) -> Task:
    """The task with these numbers of examples; the same numbers and seed give the same task."""
    stream = examples(seed)
    # Held-out first: the same examples are judged whatever the other two sizes are.
    judged, fitted, trained = (
        [next(stream) for _ in range(count)] for count in (held_out, calibration, train)
    )
    return Task(trained, fitted, judged)


def examples(seed: int) -> Iterator[Example]:
    """Examples drawn by ``seed``, no date twice (so it ends after some 29,000)."""
    rng = random.Random(seed)
    days = (LAST - FIRST).days + 1
    for offset in rng.sample(range(days), days):
        date = FIRST + datetime.timedelta(days=offset)
        yield Example(PROMPT.format(text=sentence(date, rng)), f" {date.isoformat()}")


def sentence(date: datetime.date, rng: random.Random) -> str:
    """A sentence that states ``date`` in words; some hold another number as well."""
    return rng.choice(SENTENCES).format(
        day=date.day,
        th=ordinal_suffix(date.day),
        month=MONTHS[date.month - 1],
        year=date.year,
        weekday=WEEKDAYS[date.weekday()],
        city=rng.choice(CITIES),
        name=rng.choice(NAMES),
        place=rng.choice(PLACES),
        count=rng.randint(2, 40),
    )


def ordinal_suffix(day: int) -> str:
    """What follows a day of the month in English: 1st, 2nd, 3rd, 11th."""
    return "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def score(answer: str, expected: str) -> Score:
    """Judge ``answer`` (all that the model wrote) against ``expected``; white space around is ignored."""
    answer, expected = answer.strip(), expected.strip()
    valid = ISO.fullmatch(answer) is not None
    if valid:
        try:
            datetime.date.fromisoformat(answer)
        except ValueError:
            valid = False
    return Score(answer == expected, valid, answer.startswith(expected))
