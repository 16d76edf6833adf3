"""The CUDA kernels on the CPU: builds tests/shim with g++ and wraps it as a backend.

The wrapper takes the flat arguments of the dispatcher's ops (``svdk/ops/schema.py``), as every backend does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdk.ops import backends
from tests import ROOT
from tests.helpers import ops_cases as oc

SOURCES = (ROOT / "csrc", ROOT / "tests" / "shim")
SOLO, CLUSTER, WORKSPACE = range(3)
TRANSPORTS = {"solo": SOLO, "cluster": CLUSTER, "workspace": WORKSPACE}
SMALL = {"SVDK_SLICE_TOKENS": 256, "SVDK_LIST": 64}
"""Short slices and lists, so that small vocabularies meet every path."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_INTEGERS = ("dtype", "source", "batch", "vocab", "direction", "mode", "split", "transport")
_POINTERS = (
    "parts", "tickets", "token", "floats", "ints", "curves", "greedy", "stats", "status",
    "extracted", "row_ptr", "ids", "p", "delta",
)  # fmt: skip
_LAYOUT = (
    [(name, ctypes.c_int64) for name in _INTEGERS]
    + [
        ("warm", ctypes.c_void_p), ("warm_stride", ctypes.c_int64),
        ("warm_index", ctypes.c_void_p), ("warm_limit", ctypes.c_int64),
        ("other", ctypes.c_void_p), ("other_stride", ctypes.c_int64),
        ("other_index", ctypes.c_void_p), ("other_limit", ctypes.c_int64),
        ("penalty", ctypes.c_double),
    ]
    + [
        field
        for name in ("strength", "alpha", "temperature", "top_p", "min_p")
        for field in ((name, ctypes.c_double), (f"{name}_rows", ctypes.c_void_p))
    ]
    + [
        field
        for name in ("top_k", "seed", "offset")
        for field in ((name, ctypes.c_int64), (f"{name}_rows", ctypes.c_void_p))
    ]
    + [("labels", ctypes.c_void_p), ("strengths", ctypes.c_void_p), ("count", ctypes.c_int64)]
    + [(name, ctypes.c_void_p) for name in _POINTERS]
)  # fmt: skip


class Call(ctypes.Structure):
    """``svdk::cuda::Call`` of csrc/cuda/arguments.cuh."""

    _fields_ = _LAYOUT


class ShimError(AssertionError):
    """A deadlock, a read out of bounds, or warps that fell apart."""


def compiler() -> str | None:
    """The C++ compiler that the shim is built with."""
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def build(sources: Path = ROOT, **macros: int) -> ctypes.CDLL:
    """Compile the shim of a source tree (kept between runs, by the hash of what went in) and load it."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-DSVDK_SHIM"]
    flags += [f"-D{name}={value}" for name, value in macros.items()]
    shim = sources / "tests" / "shim"
    digest = hashlib.sha256(repr(flags).encode())
    for folder in (sources / "csrc" / "cuda", shim, sources / "csrc"):
        for path in sorted([*folder.glob("*.*h"), *folder.glob("*.cpp")]):
            digest.update(path.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"svdk-shim-{os.getuid()}"
    kept.mkdir(mode=0o700, exist_ok=True)
    library = kept / f"{digest.hexdigest()[:24]}.so"
    if not library.exists():
        unfinished = kept / f"{library.stem}.{os.getpid()}.tmp"
        command = [compiler(), *flags, f"-I{shim}", *map(str, shim.glob("*.cpp")), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        os.replace(unfinished, library)
    loaded = ctypes.CDLL(str(library))
    loaded.shim_sizes.restype = ctypes.c_int64
    for name in ("shim_sample", "shim_logprob", "shim_extract"):
        if hasattr(loaded, name):
            getattr(loaded, name).restype = ctypes.c_char_p
    assert loaded.shim_sizes(0) == ctypes.sizeof(Call)
    return loaded


@dataclass
class Shim:
    """The three ops on the shim. ``schedule``: 0 in order, else the seed of a random one."""

    library: ctypes.CDLL
    transport: int = SOLO
    split: int = 1
    schedule: int = 0

    def _call(self, warm, base, vector, warm_rows, base_rows, vocab, direction, batch) -> tuple[Call, list]:
        other = base if base is not None else vector
        tables = 2 if vector is not None and vector.dim() == 2 else 1
        call = Call(
            dtype=DTYPES[warm.dtype], source=1 if base is not None else 2 if vector is not None else 0,
            batch=batch, vocab=vocab, direction=direction,
            split=self.split, transport=self.transport if self.split > 1 else SOLO,
            warm=warm.data_ptr(), warm_stride=warm.stride(0), warm_limit=warm.shape[0],
        )  # fmt: skip
        if other is not None:
            call.other = other.data_ptr()
            call.other_stride = other.stride(0) if other.dim() == 2 else 0
            call.other_limit = other.shape[0] if base is not None or tables == 2 else batch
        keep = [warm, other]
        self._rows(call, keep, warm_index=warm_rows, other_index=base_rows)
        if call.transport == WORKSPACE:
            # What an earlier call left there could pass for this call's.
            size = batch * self.split * self.library.shim_sizes(1) + 128
            parts = torch.full((size,), 0x7F, dtype=torch.uint8)
            tickets = torch.zeros(batch, dtype=torch.int32)
            keep += [parts, tickets]
            call.parts = (parts.data_ptr() + 127) // 128 * 128
            call.tickets = tickets.data_ptr()
        return call, keep

    @staticmethod
    def _rows(call: Call, keep: list, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(call, name, None if tensor is None else tensor.data_ptr())
            keep.append(tensor)

    @staticmethod
    def _raise(error: bytes | None) -> None:
        if error:
            raise ShimError(error.decode())

    def steered_sample(
        self, warm, base, vector, warm_rows, base_rows, vocab, direction, labels, mode,
        strength, strength_rows, alpha, alpha_rows, penalty, temperature, temperature_rows,
        top_k, top_k_rows, top_p, top_p_rows, min_p, min_p_rows, seed, seed_rows, offset, offset_rows, info,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As ``svdk.reference.steered_sample``."""
        batch = warm.shape[0] if warm_rows is None else warm_rows.shape[0]
        token = torch.full((batch,), -7)
        floats = torch.full((5, batch) if info else (0,), 7e7)
        ints = torch.full((2, batch) if info else (0,), -7, dtype=torch.int32)
        call, keep = self._call(warm, base, vector, warm_rows, base_rows, vocab, direction, batch)
        call.mode, call.penalty, call.strength, call.alpha = mode, penalty, strength, alpha
        call.temperature, call.top_p, call.min_p = temperature, top_p, min_p
        call.top_k, call.seed, call.offset = top_k, seed, offset
        self._rows(
            call, keep, labels=labels, strength_rows=strength_rows, alpha_rows=alpha_rows,
            temperature_rows=temperature_rows, top_k_rows=top_k_rows, top_p_rows=top_p_rows,
            min_p_rows=min_p_rows, seed_rows=seed_rows, offset_rows=offset_rows, token=token,
            floats=floats if info else None, ints=ints if info else None,
        )  # fmt: skip
        self._raise(self.library.shim_sample(ctypes.byref(call), ctypes.c_uint64(self.schedule)))
        return token, floats, ints

    def steered_logprob(
        self, warm, base, vector, warm_rows, base_rows, vocab, direction, labels,
        strength, strength_rows, alpha, alpha_rows, penalty, strengths,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """As ``svdk.reference.steered_logprob``."""
        batch, count = labels.shape[0], 1 if strengths is None else strengths.shape[0]
        curves = torch.full((3, batch, count), 7e7)
        greedy = torch.full((batch, count), -7)
        stats, status = torch.full((6, batch), 7e7), torch.full((batch,), -7, dtype=torch.int32)
        call, keep = self._call(warm, base, vector, warm_rows, base_rows, vocab, direction, batch)
        call.penalty, call.alpha, call.strength, call.count = penalty, alpha, strength, count
        self._rows(
            call, keep, labels=labels, alpha_rows=alpha_rows, strength_rows=strength_rows,
            strengths=strengths, curves=curves, greedy=greedy, stats=stats, status=status,
        )  # fmt: skip
        self._raise(self.library.shim_logprob(ctypes.byref(call), ctypes.c_uint64(self.schedule)))
        return curves, greedy, stats, status

    def extract(self, warm, base, vector, warm_rows, base_rows, vocab, direction, alpha, alpha_rows):
        """As ``svdk.reference.extract``."""
        batch = warm.shape[0] if warm_rows is None else warm_rows.shape[0]
        call, keep = self._call(warm, base, vector, warm_rows, base_rows, vocab, direction, batch)
        call.penalty, call.alpha = -float("inf"), alpha
        row_ptr, stats = torch.full((batch + 1,), -7), torch.full((3, batch), 7e7)
        status = torch.full((batch,), -7, dtype=torch.int32)
        extracted = torch.empty(batch * self.library.shim_sizes(2) // 8 + 1, dtype=torch.float64)
        self._rows(
            call,
            keep,
            alpha_rows=alpha_rows,
            row_ptr=row_ptr,
            stats=stats,
            status=status,
            extracted=extracted,
        )
        schedule = ctypes.c_uint64(self.schedule)
        if batch == 0:
            row_ptr[0] = 0
        else:
            self._raise(self.library.shim_extract(ctypes.byref(call), schedule, 0))
        entries = int(row_ptr[-1])
        ids, p, delta = torch.full((entries,), -7), torch.full((entries,), 7e7), torch.full((entries,), 7e7)
        self._rows(call, keep, ids=ids, p=p, delta=delta)
        self._raise(self.library.shim_extract(ctypes.byref(call), schedule, 1))
        return row_ptr, ids, p, delta, stats, status


def install(monkeypatch: pytest.MonkeyPatch, shim: Shim) -> None:
    """Put a shim into the table of backends under the name ``shim``."""
    row = backends.Backend("shim", ("cpu",), lambda: None, lambda: shim)
    monkeypatch.setitem(backends.TABLE, "shim", row)
    monkeypatch.setattr(backends, "_resolved", {})


def kernels() -> list[str]:
    """``ops_cases.kernels`` and the shim, for tests that use the fixture ``shim_backend``."""
    return [*oc.kernels(), *(["shim"] if compiler() is not None else [])]
