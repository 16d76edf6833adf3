"""From the seed of a call to one stream a row, and the seeds and offsets of FlashInfer's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from svdk.ops import arguments
from svdk.utils.checks import check_count, fail

JUMP = arguments.GOLDEN - (1 << 64)
"""Between the keys of neighbouring rows, as a signed int64."""


def row_keys(seed: int | Tensor, rows: int, like: Tensor) -> tuple[float, Tensor | None]:
    """The Philox keys of a call, as the fields of a :class:`PerRow`.

    Of a single seed row r gets ``seed + r * GOLDEN`` modulo 2**64, so that rows draw different noise, row 0
    what a call of one row draws, and no row what another row draws under the next seed. A (rows,) tensor
    holds the keys themselves.
    """
    key, keys = arguments.checked("seed", seed, rows, like)
    if rows == 1 or (isinstance(seed, Tensor) and seed.dim() > 0):
        return key, keys
    if keys is None and torch.compiler.is_compiling():
        keys = arguments.filled(key, True, rows, like)
    return 0, spread(int(key) if keys is None else keys, rows, like.device)


def spread(first: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """Keys int64 (rows,), from that of row 0 on; int64 wraps around, as wanted."""
    return torch.rsub(torch.arange(rows, device=device), first, alpha=-JUMP)


def row_words(
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    rows: int,
    generator: torch.Generator | None,
    like: Tensor,
) -> tuple[Tensor, int | Tensor]:
    """Seeds int64 (rows,) on the device of ``like``, and an offset: an integer, or int64 (rows,)."""
    _check_generator(generator)
    if seed is None or offset is None:  # as FlashInfer: one without the other is not used
        seed, offset = _fresh(generator), 0
    single = not isinstance(seed, Tensor) or seed.shape in ((), (1,))
    word, words = _word64("seed", seed, rows, like)
    number, numbers = _word64("offset", offset, rows, like)
    seeds = spread(int(word) if words is None else words, rows, like.device) if single else words
    assert seeds is not None
    return seeds, int(number) if numbers is None else numbers


def get_seed_and_offset(
    increment: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> tuple[int, int]:
    """A seed and an offset that no earlier call returned, and ``generator`` moved on past them.

    A GPU generator gives its own seed and the offset that it stands at, and goes on by ``increment`` rounded
    up to a multiple of 4. A CPU generator has no offset: the seed is a fresh number of 64 bits drawn from it,
    whatever ``increment`` is, and the offset 0.

    Args:
        increment: how many numbers a row will be drawn, at least 0.
        generator: None: torch's own of ``device``.
        device: None: the CPU.

    Raises:
        InputError: an argument of the wrong kind, or a device without a generator here.

    """
    check_count("increment", increment, 0)
    _check_generator(generator)
    generator = _default_generator(device) if generator is None else generator
    if generator.device.type == "cpu":
        return int(_fresh(generator)), 0
    offset = generator.get_offset()
    generator.set_offset(offset + (increment + 3) // 4 * 4)
    return generator.initial_seed(), offset


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise fail("generator", repr(generator), "a torch.Generator, or None for torch's own")


def _default_generator(device: torch.device | str | None) -> torch.Generator:
    try:
        where = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise fail("device", repr(device), "a torch.device or its name") from None
    if where.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()
        index = torch.cuda.current_device() if where.index is None else where.index
        return torch.cuda.default_generators[index]
    if where.type != "cpu":
        raise fail("device", where, "cpu, or a CUDA device that is visible; a generator for any other")
    return torch.default_generator


def _fresh(generator: torch.Generator | None) -> Tensor:
    where = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=where)


def _word64(name: str, value: int | Tensor, rows: int, like: Tensor) -> tuple[float, Tensor | None]:
    """As :func:`arguments.word64`; FlashInfer's tensors are (1,) or (rows,), uint64 too, on any device."""
    if arguments.dense(value):
        assert isinstance(value, Tensor)
        value = value.view(torch.int64) if value.dtype == torch.uint64 else value
        value = (value.reshape(()) if value.shape == (1,) else value).to(like.device)
    return arguments.word64(name, value, rows, like)
