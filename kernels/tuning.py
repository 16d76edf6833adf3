"""Launch configurations: a default that needs no trial, and the trials' results when there are any.

``tune`` times a few configurations on the GPU at hand and remembers the best in
``$XDG_CACHE_HOME/svdk/triton.json`` (written atomically, read once a process). With ``SVDK_AUTOTUNE=1``
the first eager call of each kind of shape tunes itself; otherwise a first call only ever compiles one
configuration.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdk.utils.files import write_json

FORMAT = 1
SPLITS = (1, 2, 4, 16, 64)
"""Slices a row. Each number is another variant of the kernels to compile, so there are few."""


@dataclass(frozen=True)
class Config:
    """How a kernel is launched; every field changes speed only."""

    block: int = 2048
    """Tokens a program handles at a time, of 16-bit logits; half as many of 32 bits."""
    num_warps: int = 4
    stages: int = 3
    """Software pipelining of the first sweep's loads."""
    programs: int = 4
    """Programs a multiprocessor that splitting rows aims at; under the interpreter, slices a row."""
    cap: int = 512
    """Candidates a slice has space for."""


DEFAULT = Config()
INTERPRETED = Config(block=512, cap=128, programs=2)
"""Small, so that a vocabulary of a thousand tokens already has several tiles and slices."""
CANDIDATES = (
    DEFAULT,
    Config(stages=4),
    Config(stages=1, programs=3),
    Config(programs=8),
    Config(num_warps=8, programs=2),
    Config(block=4096, num_warps=8, programs=2),
    Config(block=1024),
)


def cache_path() -> Path:
    """Where tuning results are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "svdk" / "triton.json"


@functools.cache
def _remembered() -> dict[str, Config]:
    """Results of earlier processes; a file of another format, or not readable, counts as none."""
    try:
        stored = json.loads(cache_path().read_text())
        if stored["format"] != FORMAT:
            return {}
        return {key: Config(**config) for key, config in stored["configs"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(key: str, config: Config) -> None:
    found = _remembered()
    found[key] = config
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "configs": {k: asdict(c) for k, c in sorted(found.items())}}
    write_json(path, content, indent=1)


def bucket(n: int) -> int:
    """The next power of two: shapes in one bucket share a configuration."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _device(index: int | None) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def key_of(name: str, like: Tensor, batch: int, vocab: int) -> str:
    """What a configuration is remembered under: device, kernel variant, dtype, shape bucket."""
    return f"{_device(like.device.index)[0]}|{name}|{like.dtype}|{bucket(batch)}x{bucket(vocab)}"


def config_for(name: str, like: Tensor, batch: int, vocab: int) -> Config:
    """The remembered configuration of a kernel variant and shape, or the default."""
    if like.device.type == "cpu":
        return INTERPRETED
    found = _remembered()
    return found.get(key_of(name, like, batch, vocab), DEFAULT) if found else DEFAULT


def wanted() -> bool:
    """Whether first calls are to tune themselves."""
    return os.environ.get("SVDK_AUTOTUNE") == "1"


def tune(name: str, like: Tensor, batch: int, vocab: int, launch: Callable[[Config], None]) -> Config:
    """Time ``launch`` with each candidate, remember the fastest on disk and return it; synchronises."""
    from triton.testing import do_bench

    key = key_of(name, like, batch, vocab)
    if key in _remembered():
        return _remembered()[key]
    best = min(CANDIDATES, key=lambda config: do_bench(lambda: launch(config), warmup=5, rep=20))
    _remember(key, best)
    return best


def block_of(config: Config, size: int) -> int:
    """Tokens a tile of logits of so many bytes each: what it takes of shared memory is the same for all."""
    return config.block * 2 // max(size, 2)


def shape(config: Config, like: Tensor, batch: int, vocab: int) -> tuple[int, int, int]:
    """``(block, splits, slice_size)``: tokens a tile, slices a row (of ``SPLITS``), tokens a slice."""
    block = min(block_of(config, like.element_size()), max(64, bucket(vocab)))
    tiles = -(-vocab // block)
    on_cpu = like.device.type == "cpu"
    aim = config.programs if on_cpu else config.programs * _device(like.device.index)[1] // max(batch, 1)
    splits = max(n for n in SPLITS if n <= max(1, min(aim, tiles)))
    return block, splits, -(-tiles // splits) * block
