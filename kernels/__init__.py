"""Triton kernels of the ``triton`` backend; ``svdk.kernels.library.BACKEND`` is its entry.

Reading order, with the steps of ``docs/algorithm.md`` that they hold: ``philox`` (random bits), ``steering``
(5, 6, 8, 9: the formulas, a tile at a time), ``candidates`` (what later steps go over), ``token_sweep`` and
``tile_sweep`` (2), ``sweep`` (3, 4), ``filters`` (10), ``full_sweep`` (7, 11, the partition), then the ops
``sample``, ``logprob`` and ``extract``.
"""
