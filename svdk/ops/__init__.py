"""The operations: logits in, token out. :mod:`svdk.ops.api` is what users call.

Reading order: ``api`` (the four ops), ``arguments`` (their checks), ``results``, ``schema`` (the one table
of parameters, and the registration with the dispatcher), ``backends``, ``reference`` (what is right),
``philox``; then ``flashinfer`` (the same sampler under FlashInfer's names) and what it stands on:
``probabilities`` (its filters), ``seeds``, ``speculative``.
"""

from svdk.ops.api import extract, steered_logits, steered_logprob, steered_sample

__all__ = ["extract", "steered_logits", "steered_logprob", "steered_sample"]
