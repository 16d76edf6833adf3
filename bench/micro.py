"""The micro part: a grid of points, each a contest between svdk's backends and the baselines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from svdk.bench import cases, logits, timing
from svdk.bench.baselines import why_not_flashinfer
from svdk.bench.busy import loaded
from svdk.bench.cases import FILTERS, SETTINGS, Setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORKING_COPIES = 8
"""float32 copies of the logits that an eager baseline holds at once, for the memory budget."""
COMPILE_MODES = {
    "cpu": ("default", "max-autotune-no-cudagraphs"),
    "cuda": ("default", "reduce-overhead", "max-autotune"),
}


@dataclass(frozen=True)
class Block:
    """A product of settings and shapes."""

    settings: tuple[str, ...]
    batches: tuple[int, ...] = (8,)
    vocabs: tuple[int, ...] = (151936,)
    dtypes: tuple[str, ...] = ("float32",)
    kinds: tuple[str, ...] = ("natural",)
    caches: tuple[str, ...] = ("cold",)
    compile: bool = False
    """Whether torch.compile competes; it costs ten seconds or so a point."""

    def points(self) -> Iterator[Point]:
        """Every combination."""
        for setting, kind, dtype, vocab, batch in itertools.product(
            self.settings, self.kinds, self.dtypes, self.vocabs, self.batches
        ):
            yield Point(setting, batch, vocab, dtype, kind, self.caches, self.compile)


@dataclass(frozen=True)
class Point:
    """One setting at one shape, hot, cold or both."""

    setting: str
    batch: int
    vocab: int
    dtype: str
    kind: str
    caches: tuple[str, ...]
    compile: bool

    def __str__(self) -> str:
        """As in the progress line and the list of what was skipped."""
        return f"{self.setting} B={self.batch} V={self.vocab} {self.dtype} {self.kind}"


MAIN = ("sample", "plain")
BATCHES = (1, 8, 32, 64, 128, 256, 512)
VOCABS = (32000, 49152, 128256, 151936, 262144)
GRIDS: dict[str, tuple[Block, ...]] = {
    "quick": (
        Block(MAIN, batches=(1, 8), caches=("hot", "cold")),
        Block(MAIN, vocabs=(49152,)),
        Block(("greedy", "top_k_top_p", "plain_top_k", "logprob", "extract")),
    ),
    "default": (
        Block(MAIN, batches=(8,), caches=("hot", "cold"), compile=True),
        Block(MAIN, batches=(1,), caches=("hot", "cold"), compile=True),
        Block(MAIN, batches=(64,), compile=True),
        Block(MAIN, batches=(1, 8, 64), vocabs=(49152,), compile=True),
        Block(MAIN, batches=(2, 4, 16, 32)),
        Block(tuple(name for name in SETTINGS if name not in MAIN)),
        Block(MAIN, kinds=("peaked", "flat")),
        Block(MAIN, dtypes=("bfloat16",)),
    ),
    "filters": (
        Block(FILTERS, batches=(8,), compile=True),
        Block(FILTERS, batches=(1, 64)),
        Block(FILTERS, batches=(8,), kinds=("flat",)),
        Block(FILTERS, batches=(1, 8, 64), vocabs=(32000, 262144)),
        Block(FILTERS, batches=(1, 8, 64), dtypes=("bfloat16",)),
    ),
    "busy": (Block(("plain", "plain_top_k", "sample"), batches=(1, 8, 64), vocabs=(32000, 151936)),),
    "full": (
        Block(tuple(SETTINGS), BATCHES, VOCABS, tuple(DTYPES), ("natural",), ("hot", "cold"), True),
        Block(tuple(SETTINGS), BATCHES, VOCABS, tuple(DTYPES), ("peaked", "flat")),
    ),
}


def points(blocks: tuple[Block, ...]) -> list[Point]:
    """The points of a grid, each once."""
    return list(dict.fromkeys(point for block in blocks for point in block.points()))


@dataclass
class Runner:
    """Runs points within a budget of time and memory, and keeps what was skipped and why."""

    device: torch.device
    last_cache: int
    plan: timing.Plan
    memory: int
    """Bytes that one point may hold."""
    deadline: float
    """``time.monotonic()`` after which no new point starts."""
    backends: list[str]
    with_baselines: bool = True
    with_compile: bool = True
    busy: int = 0
    """Busy loops beside the calls: every point is measured without them and with them."""
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        """Nothing measured yet."""
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self._modes: dict[str, str] = {}
        self._natural = logits.natural_source() is not None
        self._no_compiler: str | None = None

    def run(self, grid: list[Point]) -> None:
        """Measure every point that fits; :attr:`rows` and :attr:`skipped` grow."""
        for index, point in enumerate(grid, 1):
            if point.kind == "natural" and not self._natural:
                point = replace(point, kind="zipf")
            if time.monotonic() > self.deadline:
                self._skip(f"{len(grid) - index + 1} points from {point} on", "the time budget was spent")
                return
            self.say(f"[{index}/{len(grid)}] {point}")
            self._run_point(point)

    def _skip(self, what: str, why: str) -> None:
        self.skipped.append({"what": what, "why": why})
        self.say(f"  skipped {what}: {why}")

    def _run_point(self, point: Point) -> None:
        setting, dtype = SETTINGS[point.setting], DTYPES[point.dtype]
        numbers = point.batch * point.vocab
        if (need := 2 * numbers * (dtype.itemsize + 8)) > self.memory:
            self._skip(str(point), f"needs {need / 1e9:.1f} GB, the budget is {self.memory / 1e9:.1f} GB")
            return
        room = self.memory - WORKING_COPIES * numbers * 4
        if self.with_baselines and room < 4 * numbers * dtype.itemsize:
            self._skip(f"{point}: baselines", f"their temporaries exceed {self.memory / 1e9:.1f} GB")
        inputs = logits.make(point.kind, point.batch, point.vocab, dtype, self.device)
        torch._dynamo.reset()  # one specialisation at a time: no recompilation limit, no shape made dynamic
        calls = self._svdk(setting)
        if self.with_baselines and room >= 4 * numbers * dtype.itemsize:
            calls |= self._baselines(point, setting)
        counts: dict[str, int | None] = {}
        for cache in point.caches:
            sets = logits.rotation(inputs, cache == "cold", self.last_cache, max(room, self.memory // 2))
            contest = timing.Contest(sets, self.device, self.plan)
            for name, call in list(calls.items()):
                reason = self._enter(contest, name, call, setting)
                if reason is not None:
                    self._skip(f"{point}: {name}", reason)
                    del calls[name]
                elif name not in counts:
                    known = not name.startswith("compile") or self.device.type == "cuda"
                    counts[name] = timing.launches(call, inputs, self.device) if known else None
            for busy in dict.fromkeys((0, self.busy)):
                with loaded(busy):
                    timings = contest.run()
                self._note_mode(point.setting, timings)
                for name, measured in timings.items():
                    row = self._row(point, setting, cache, name, measured, counts[name])
                    self.rows.append(row | {"busy": busy})

    def _enter(self, contest: timing.Contest, name: str, call: timing.Call, setting: Setting) -> str | None:
        compiled = name.startswith("compile")
        try:
            contest.enter(name, call, capture=setting.capture and not compiled)
        except timing.TooSlowError as error:
            return str(error)
        except RuntimeError as error:
            # Only what the compiler reports (no C++ compiler, an operator it cannot lower) may be skipped.
            if not compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            self._no_compiler = str(error).strip().splitlines()[0]
            return f"torch.compile failed: {self._no_compiler}"
        return None

    def _svdk(self, setting: Setting) -> dict[str, timing.Call]:
        return {f"svdk/{name}": cases.svdk_call(setting, name, self.device) for name in self.backends}

    def _baselines(self, point: Point, setting: Setting) -> dict[str, timing.Call]:
        found: dict[str, timing.Call] = {}
        for name in setting.baselines:
            if name == "compile":
                if self.with_compile and point.compile and self._no_compiler is None:
                    chosen = self._modes.get(point.setting)
                    for mode in (chosen,) if chosen else COMPILE_MODES[self.device.type]:
                        found[f"compile:{mode}"] = cases.compiled(setting, mode, self.device)
            elif name == "flashinfer" and why_not_flashinfer(self.device):
                continue
            else:
                found[name] = cases.baseline_call(setting, name, self.device)
        return found

    def _note_mode(self, setting: str, timings: dict[str, timing.Timing]) -> None:
        modes = {name: t.minimum for name, t in timings.items() if name.startswith("compile:")}
        if setting not in self._modes and modes:
            self._modes[setting] = min(modes, key=modes.__getitem__).split(":")[1]

    def _row(
        self, point: Point, setting: Setting, cache: str, name: str, t: timing.Timing, launches: int | None
    ) -> dict[str, Any]:
        return {
            "setting": point.setting,
            "op": setting.op,
            "contestant": name,
            "batch": point.batch,
            "vocab": point.vocab,
            "dtype": point.dtype,
            "logits": point.kind,
            "cache": cache,
            "median_s": t.median,
            "q1_s": t.q1,
            "q3_s": t.q3,
            "min_s": t.minimum,
            "noise_s": t.noise,
            "n": t.count,
            "rounds_s": list(t.rounds),
            "bytes": cases.bytes_moved(setting, point.batch, point.vocab, DTYPES[point.dtype]),
            "launches": launches,
        }
