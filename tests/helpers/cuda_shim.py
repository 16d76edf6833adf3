"""The CUDA kernels on the CPU: builds tests/shim with g++ and wraps it as a backend.

The wrapper takes the flat arguments of the dispatcher's ops, as every backend does, and hands them on in the
order of the table in ``svdk/ops/schema.py``.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from svdk.ops import backends, schema
from tests import ROOT
from tests.helpers import ops_cases as oc

SOURCES = (ROOT / "csrc", ROOT / "tests" / "shim")
SOLO, CLUSTER, WORKSPACE = range(3)
TRANSPORTS = {"solo": SOLO, "cluster": CLUSTER, "workspace": WORKSPACE}
SMALL = {"SVDK_SLICE_TOKENS": 256, "SVDK_CAPACITY": 64}
"""Short slices and few candidates, so that small vocabularies meet every path."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_FLOAT, _INT = [[("scalar", kind), ("rows", ctypes.c_void_p)] for kind in (ctypes.c_double, ctypes.c_int64)]


def _structure(name: str, fields: list) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


KINDS = {
    "float": _structure("Real", _FLOAT),
    "int": _structure("Integer", _INT),
    "scalar": ctypes.c_double,
}
"""How the kinds of the table look to the kernels."""
BatchParameters = _structure(
    "BatchParameters",
    [("labels", KINDS["int"]), ("mode", ctypes.c_int)] + [(p.name, KINDS[p.kind]) for p in schema.PARAMETERS],
)
Table = _structure(
    "Table",
    [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("limit", ctypes.c_int64),
    ],
)

Adjustments = _structure(
    "Adjustments",
    [
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64),
        ("bitmask", ctypes.c_void_p),
        ("bitmask_stride", ctypes.c_int64),
    ],
)

_INTEGERS = ("dtype", "source", "batch", "vocab", "direction", "split", "transport")
_POINTERS = (
    "parts",
    "tickets",
    "token",
    "floats",
    "ints",
    "curves",
    "greedy",
    "stats",
    "status",
    "constants",
)
_ENTRIES = ("row_ptr", "ids", "p", "delta")


class Call(ctypes.Structure):
    """``svdk::cuda::Call`` of csrc/cuda/arguments.cuh."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in _INTEGERS),
        ("warm", Table),
        ("other", Table),
        ("adjustments", Adjustments),
        ("parameters", BatchParameters),
        ("strengths", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in (*_POINTERS, *_ENTRIES, "skip", "out")),
        *((n, ctypes.c_int64) for n in ("out_stride", "out_width", "out_narrow")),
    ]


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
    for name in ("shim_sample", "shim_logprob", "shim_logits", "shim_extract"):
        if hasattr(loaded, name):
            getattr(loaded, name).restype = ctypes.c_char_p
    assert loaded.shim_sizes(0) == ctypes.sizeof(Call)
    return loaded


@dataclass
class Shim:
    """The four ops on the shim. ``schedule``: 0 in order, else the seed of a random one."""

    library: ctypes.CDLL
    transport: int = SOLO
    split: int = 1
    schedule: int = 0

    def _call(self, op: schema.Op, flat: tuple) -> tuple[Call, list[Tensor | None], SimpleNamespace]:
        """The call without its outputs, what has to be kept alive for it, and what else was given."""
        rows, given = op.unpack(flat)
        other = rows.vector if rows.base is None else rows.base
        call = Call(
            dtype=DTYPES[rows.warm.dtype],
            source=0 if other is None else 1 if rows.base is not None else 2,
            batch=rows.batch,
            vocab=rows.vocab,
            direction=rows.direction,
            split=self.split,
            transport=self.transport if self.split > 1 else SOLO,
            warm=_table(rows.warm, rows.warm_rows, rows.warm.shape[0]),
        )
        if other is not None:
            limit = other.shape[0] if rows.base is not None else rows.batch
            call.other = _table(other, rows.base_rows, limit)
        for parameter in op.parameters:
            value = getattr(given, parameter.name)
            if parameter.kind != "scalar":
                value = KINDS[parameter.kind](value.scalar, _address(value.rows))
            setattr(call.parameters, parameter.name, value)
        call.parameters.labels.rows = _address(getattr(given, "labels", None))
        call.parameters.mode = getattr(given, "strength_mode", schema.CONSTANT)
        keep = list(flat)
        if call.transport == WORKSPACE:
            # What an earlier call left there could pass for this call's.
            size = rows.batch * self.split * self.library.shim_sizes(1) + 128
            parts = torch.full((size,), 0x7F, dtype=torch.uint8)
            tickets = torch.zeros(rows.batch, dtype=torch.int32)
            keep += [parts, tickets]
            call.parts = (parts.data_ptr() + 127) // 128 * 128
            call.tickets = tickets.data_ptr()
        return call, keep, given

    def _run(self, entry: str, call: Call, *more: int) -> None:
        error = getattr(self.library, entry)(ctypes.byref(call), ctypes.c_uint64(self.schedule), *more)
        if error:
            raise ShimError(error.decode())

    def steered_sample(self, *flat) -> tuple[Tensor, Tensor, Tensor]:
        """As ``svdk.reference.steered_sample``."""
        call, _keep, given = self._call(schema.STEERED_SAMPLE, flat)
        if given.logit_bias is not None:
            call.adjustments.bias = given.logit_bias.data_ptr()
            call.adjustments.bias_stride = given.logit_bias.stride(0) if given.logit_bias.dim() == 2 else 0
        if given.bitmask is not None:
            call.adjustments.bitmask = given.bitmask.data_ptr()
            call.adjustments.bitmask_stride = given.bitmask.stride(0)
        token, floats, ints = (
            _fresh(call.batch),
            _fresh(5, call.batch, dtype=torch.float32),
            _fresh(2, call.batch, dtype=torch.int32),
        )
        _outputs(call, token=token)
        if given.info:
            _outputs(call, floats=floats, ints=ints)
        self._run("shim_sample", call)
        return (token, floats, ints) if given.info else (token, floats.new_empty(0), ints.new_empty(0))

    def steered_logprob(self, *flat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``svdk.reference.steered_logprob``."""
        call, _keep, given = self._call(schema.STEERED_LOGPROB, flat)
        call.strengths = _address(given.strengths)
        call.count = 1 if given.strengths is None else given.strengths.shape[0]
        curves = _fresh(3, call.batch, call.count, dtype=torch.float32)
        greedy = _fresh(call.batch, call.count)
        stats, status = _fresh(6, call.batch, dtype=torch.float32), _fresh(call.batch, dtype=torch.int32)
        _outputs(call, curves=curves, greedy=greedy, stats=stats, status=status)
        self._run("shim_logprob", call)
        return curves, greedy, stats, status

    def steered_logits(self, *flat) -> Tensor:
        """As ``svdk.reference.steered_logits``."""
        call, _keep, given = self._call(schema.STEERED_LOGITS, flat)
        status, out = _fresh(call.batch, dtype=torch.int32), given.out
        _outputs(call, out=out, status=status)
        call.parameters.temperature.scalar = call.parameters.top_p.scalar = 1.0
        call.skip, call.out_stride, call.out_width = _address(given.skip), out.stride(0), out.shape[1]
        call.out_narrow = out.dtype != torch.float32
        self._run("shim_logits", call)
        return status

    def extract(self, *flat) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As ``svdk.reference.extract``."""
        call, _keep, _ = self._call(schema.EXTRACT, flat)
        call.parameters.penalty = -math.inf
        constants = _fresh(call.batch * self.library.shim_sizes(2), dtype=torch.uint8)
        row_ptr, status = _fresh(call.batch + 1), _fresh(call.batch, dtype=torch.int32)
        stats = _fresh(3, call.batch, dtype=torch.float32)
        _outputs(call, constants=constants, row_ptr=row_ptr, stats=stats, status=status)
        if call.batch == 0:
            row_ptr[0] = 0
        else:
            self._run("shim_extract", call, 0)
        entries = int(row_ptr[-1])
        ids = _fresh(entries)
        p, delta = _fresh(entries, dtype=torch.float32), _fresh(entries, dtype=torch.float32)
        _outputs(call, ids=ids, p=p, delta=delta)
        self._run("shim_extract", call, 1)
        return row_ptr, ids, p, delta, stats, status


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _table(tensor: Tensor, index: Tensor | None, limit: int) -> Table:
    return Table(tensor.data_ptr(), tensor.stride(0) if tensor.dim() == 2 else 0, _address(index), limit)


def _fresh(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """An output that shows where nothing was written."""
    return torch.full(
        shape, 7e7 if dtype == torch.float32 else 0x7F if dtype == torch.uint8 else -7, dtype=dtype
    )


def _outputs(call: Call, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())


def install(monkeypatch: pytest.MonkeyPatch, shim: Shim) -> None:
    """Put a shim into the table of backends under the name ``shim``."""
    row = backends.Backend("shim", ("cpu",), lambda: None, lambda: shim)
    monkeypatch.setitem(backends.TABLE, "shim", row)
    monkeypatch.setattr(backends, "_resolved", {})


def kernels() -> list[str]:
    """``ops_cases.kernels`` and the shim, for tests that use the fixture ``shim_backend``."""
    return [*oc.kernels(), *(["shim"] if compiler() is not None else [])]
