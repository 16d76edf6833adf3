"""The warm start: a short PEFT fine-tune that tells where the output distribution has to move.

Reading order: ``data`` (labelled examples), ``chat`` (those that are chats), ``peft_configs``, ``training``
(the Trainer), ``run_folder`` (a folder that is complete or absent), ``api`` (:func:`svdk.warm_start`, which
puts them together).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdk.warmstart.api import warm_start

__all__ = ["warm_start"]


def __getattr__(name: str) -> Any:
    # Reading data, which calibration does too, must not load the training stack.
    if name != "warm_start":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from svdk.warmstart.api import warm_start

    return warm_start
