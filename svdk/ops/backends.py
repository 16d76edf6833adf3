"""Which implementations of the ops there are, and why one cannot run here.

``auto`` takes the first available row of the table for the tensor's device; a name that cannot run
raises with the reason. An extension that is present but does not load is an error, not a fallback.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdk.errors import BackendError, InputError
from svdk.ops import (
    batching,  # noqa: F401 - registers what vmap does
    reference,  # and with it the schema, which registers the ops
)
from svdk.ops.arguments import LOGIT_DTYPES


@dataclass(frozen=True)
class Backend:
    """One row of the table."""

    name: str
    devices: tuple[str, ...]
    """Device types, or ``("any",)``."""
    why_not: Callable[[], str | None]
    """None when it can run on this machine, else the reason."""
    load: Callable[[], Any]
    """A namespace with ``steered_sample``, ``steered_logprob``, ``steered_logits`` and ``extract``."""
    by_name_only: tuple[str, ...] = ()
    """Further device types, which ``auto`` never picks it for."""

    def serves(self, device: str, by_name: bool = False) -> bool:
        """Whether tensors of this device type can be handled (``by_name``: when it is asked for)."""
        return device in self.devices or "any" in self.devices or (by_name and device in self.by_name_only)


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which takes a second to import what sets this mark."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@_constant
def _load_extension(name: str) -> str | None:
    """Import a compiled module; the reason if it was not built. A broken one raises."""
    if importlib.util.find_spec(name) is None:
        return f"{name} was not built (no compiler at install time, or SVDK_SKIP_EXT=1)"
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"{name} is installed but does not load: {error}") from error
    return None


def _once(probe: Callable[[], str | None]) -> Callable[[], str | None]:
    """Run a probe once; a failure is kept and raised at every use, so that it can never be overlooked."""
    outcome: list[str | BackendError | None] = []

    def reason() -> str | None:
        if not outcome:
            try:
                outcome.append(probe())
            except BackendError as error:
                outcome.append(error)
        if isinstance(outcome[0], BackendError):
            raise outcome[0]
        return outcome[0]

    return reason


@_constant
def _why_not_cuda() -> str | None:
    """Whether the CUDA module was built and has a device to run on; a broken one raises."""
    if _load_extension("svdk._C_cuda") is not None:
        return "svdk._C_cuda was not built (it needs a CUDA build of torch and nvcc at install time)"
    return None if torch.cuda.is_available() else "svdk._C_cuda is there, but no CUDA device is visible"


TRITON_MINIMUM = (3, 6)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
def _why_not_triton() -> str | None:
    """Whether Triton is there, new enough, and has something to run on."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed (PyTorch's CUDA and ROCm wheels bring it)"
    if tuple(int(x) for x in version.split(".")[:2]) < TRITON_MINIMUM:
        return f"triton {version} is too old; needed: {'.'.join(map(str, TRITON_MINIMUM))} or newer"
    if not (torch.cuda.is_available() or _interpreted()):
        return "no GPU is visible (TRITON_INTERPRET=1 interprets the kernels on CPU tensors, slowly)"
    return None


def _load_triton() -> Any:
    # A statement, which torch.compile can trace, as the first call may be one that it traces.
    from svdk.kernels.library import BACKEND

    return BACKEND


TABLE: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cuda", ("cuda",), _once(_why_not_cuda), lambda: torch.ops.svdk),
        Backend(
            "triton", ("cuda",), _once(_why_not_triton), _load_triton, ("cpu",) if _interpreted() else ()
        ),
        Backend("cpu", ("cpu",), _once(lambda: _load_extension("svdk._C")), lambda: torch.ops.svdk),
        Backend("reference", ("any",), lambda: None, lambda: reference),
    )
}

_resolved: dict[tuple[str, str], Any] = {}

# A fork copies none of OpenMP's threads, and the child's first parallel region waits for them forever, in
# PyTorch's own operators too. PyTorch gives its data loader's workers one thread for the same reason.
if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def resolve(name: str, like: Tensor) -> Any:
    """The op namespace for a backend name and a logits tensor.

    Raises:
        InputError: an unknown name, or a dtype that the backend does not take.
        BackendError: the backend cannot run here; the message says why.
    """
    if not isinstance(name, str):
        raise InputError(f"backend was {name!r}; allowed: 'auto' | " + " | ".join(map(repr, TABLE)))
    device = like.device.type
    chosen = _resolved.get((name, device))
    if chosen is None:
        chosen = _resolved[name, device] = _choose(name, device)
    if chosen is not reference and like.dtype not in LOGIT_DTYPES:
        allowed = "float32, bfloat16 or float16 (float64 with backend='reference')"
        raise InputError(f"warm_logits was {like.dtype}; allowed: {allowed}")
    return chosen


def _choose(name: str, device: str) -> Any:
    if name == "auto":
        row = next(b for b in TABLE.values() if b.serves(device) and b.why_not() is None)
        return row.load()
    if name not in TABLE:
        raise InputError(f"backend was {name!r}; allowed: 'auto' | " + " | ".join(map(repr, TABLE)))
    row = TABLE[name]
    reason = row.why_not()
    if reason is None and not row.serves(device, by_name=True):
        reason = f"it runs on {', '.join(row.devices)} tensors and the logits are on {device}"
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run: {reason}")
    return row.load()


def status() -> dict[str, str]:
    """Backend name -> ``"available"``, or why it is not (a broken extension: its error)."""
    result = {}
    for row in TABLE.values():
        try:
            result[row.name] = row.why_not() or "available"
        except BackendError as error:
            result[row.name] = f"broken: {error}"
    return result
