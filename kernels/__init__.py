"""Triton kernels of the ``triton`` backend; ``svdk.kernels.library.BACKEND`` is its entry.

Reading order: ``philox`` (random bits), ``steering`` (the formulas, a tile at a time), ``sweep`` (one pass
over a slice of a row, and the merge), ``candidates`` (the tokens in play after it), ``filters``,
``full_sweep`` (what goes over all of them), then the ops ``sample``, ``logprob`` and ``extract``.
"""
