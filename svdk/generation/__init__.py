"""Steered decoding: a ``custom_generate``, a logits processor, and svdk's sampler under ``generate``.

Reading order: ``sampler`` (what one step needs beside the logits), ``generate`` (the loop), ``options`` and
``caller`` (what transformers and PEFT keep from a callable), ``logits_processor``, ``patch``.
"""

from svdk.generation.generate import SteeredOutput, decode, generate

__all__ = ["SteeredOutput", "decode", "generate"]
