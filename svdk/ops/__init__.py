"""The operations: logits in, token out. :mod:`svdk.ops.api` is what users call.

Reading order: ``api`` (the four ops), ``arguments`` (their checks), ``results``, ``schema`` (the one table
of parameters, and the registration with the dispatcher), ``backends``, ``reference`` (what is right),
``philox``, ``flashinfer`` (the same sampler under FlashInfer's names).
"""

from svdk.ops.api import extract, steered_logits, steered_logprob, steered_sample

__all__ = ["extract", "steered_logits", "steered_logprob", "steered_sample"]
