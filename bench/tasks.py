"""Tasks for measurements of adaptation: dates and records (generated), sentiment (a choice, from files).

Every task has training, calibration and test examples without a text in common; the same seed gives the same
ones, and the test examples are the same whatever the seed, so that seeds can be compared on them.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdk.demo.task import CITIES, NAMES
from svdk.demo.task import examples as dates
from svdk.errors import DataError
from svdk.models.loading import detach, load_adapter
from svdk.warmstart.api import warm_start
from svdk.warmstart.data import Example

if TYPE_CHECKING:
    from peft import PeftModel

SIZES = {"train": 128, "calibration": 96, "test": 160}
BATCH = 8
TEST_SEED = 1_000_003
"""Of the test examples; seeds of the warm start are small numbers."""
OPTIONS = (" negative", " positive")
ITEMS = (
    "lamps", "chairs", "tables", "bicycles", "pianos", "carpets", "mirrors", "kettles", "candles", "blankets",
    "clocks", "baskets", "shelves", "drums", "lanterns", "umbrellas",
)  # fmt: skip
ORDERS = (
    "{name} ordered {count} {item} from a shop in {city}.",
    "A shop in {city} sent {count} {item} to {name}.",
    "{count} {item} left {city} on Monday; {name} had paid for them.",
    "When {name} was in {city}, the {count} {item} were already packed.",
    "The {item} that {name} bought in {city} were {count} in number.",
    "For the hall in {city}, {name} rented {count} {item}.",
)


@dataclass(frozen=True)
class Data:
    """The examples of one task and seed."""

    train: list[Example]
    calibration: list[Example]
    test: dict[str, list[Example]] = field(default_factory=dict)
    """By name; the first is in domain."""
    choice: bool = False


def records(seed: int) -> Iterator[Example]:
    """Sentences about an order, and its four fields in a fixed form; endless, drawn by ``seed``."""
    rng = random.Random(seed)
    while True:
        name, item, city = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(CITIES)
        count = rng.randint(2, 99)
        text = rng.choice(ORDERS).format(name=name, item=item, city=city, count=count)
        yield Example(
            f"Text: {text}\nRecord (name | item | number | city):", f" {name} | {item} | {count} | {city}"
        )


def make(task: str, seed: int, folder: Path | None = None, sizes: dict[str, int] = SIZES) -> Data:
    """The data of ``dates``, ``records`` or ``sentiment``.

    ``folder`` holds ``movie_train.jsonl``, ``movie_test.jsonl`` and ``amazon_test.jsonl`` (rows with ``text``
    and ``label``, negative or positive) for the last one. ``DataError`` where it does not.
    """
    if task == "sentiment":
        return _sentiment(seed, folder, sizes)
    source: Callable[[int], Iterator[Example]] = {"dates": dates, "records": records}[task]
    test = _take(source(TEST_SEED), sizes["test"], set())
    seen = {example.prompt for example in test}
    stream = source(seed)
    calibration = _take(stream, sizes["calibration"], seen)
    return Data(_take(stream, sizes["train"], seen), calibration, {task: test})


@contextmanager
def warm_started(
    base: Any, tokenizer: Any, data: Data, steps: int, seed: int, **settings: Any
) -> Iterator[tuple[PeftModel, Path, float]]:
    """The model after a warm start of ``steps`` steps of 8 examples, its folder, and the seconds it took.

    ``settings``: more arguments of :func:`svdk.warm_start`. Afterwards ``base`` is as before.
    """
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        folder = warm_start(
            base,
            data.train[: steps * BATCH],
            tokenizer=tokenizer,
            calibration=data.calibration,
            output_dir=Path(place) / "adapter",
            batch_size=BATCH,
            seed=seed,
            progress=False,
            **settings,
        )
        seconds = time.perf_counter() - start
        model = load_adapter(base, folder)
        try:
            yield model, folder, seconds
        finally:
            detach(model)


def _take(stream: Iterator[Example], count: int, seen: set[str]) -> list[Example]:
    """The next examples whose prompts are new; ``seen`` grows."""
    found: list[Example] = []
    while len(found) < count:
        example = next(stream)
        if example.prompt not in seen:
            seen.add(example.prompt)
            found.append(example)
    return found


def _sentiment(seed: int, folder: Path | None, sizes: dict[str, int]) -> Data:
    def rows(name: str, seed: int) -> Iterator[Example]:
        path = None if folder is None else folder / f"{name}.jsonl"
        if path is None or not path.is_file():
            raise DataError(f"the sentiment task needs {name}.jsonl; {folder} does not have it")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        # Long reviews cost time and teach nothing about levers.
        lines = [line for line in lines if len(line["text"]) <= 400]
        random.Random(seed).shuffle(lines)
        for line in lines:
            prompt = f"Review: {line['text']}\nSentiment:"
            yield Example(prompt, f" {line['label']}", options=OPTIONS)

    seen: set[str] = set()
    test = {
        "movies": _take(rows("movie_test", TEST_SEED), sizes["test"], seen),
        "products (out of domain)": _take(rows("amazon_test", TEST_SEED), sizes["test"], seen),
    }
    stream = rows("movie_train", seed)
    calibration = _take(stream, sizes["calibration"], seen)
    return Data(_take(stream, sizes["train"], seen), calibration, test, choice=True)
