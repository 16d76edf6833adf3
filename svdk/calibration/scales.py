"""The loss at other scales of the adapter: the lever that needs no base row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdk.calibration.kept_statistics import Statistics
from svdk.calibration.sweep import MAX_OP, check_rows, rows_of
from svdk.models.adapter_scale import adapter_scale
from svdk.ops.api import steered_logprob
from svdk.warmstart.data import Encoded

if TYPE_CHECKING:
    from svdk.models.pair import ModelPair

SCALES = (0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
"""Tried beside the adapter's own, 1."""


def with_scales(
    pair: ModelPair,
    encoded: list[Encoded],
    statistics: Statistics,
    scales: Sequence[float],
    batch_size: int,
    backend: str = "auto",
    progress: bool = False,
) -> Statistics:
    """``statistics`` of the examples ``encoded``, with the loss at other scales of the adapter.

    ``InputError``: an adapter without a scale, or one that is not a finite number.
    """
    every = sorted({1.0, *map(float, scales)})
    place = torch.zeros(len(encoded) + 1, dtype=torch.int64)
    place[1:] = statistics.tokens.cumsum(0)
    nll = torch.empty(int(place[-1]), len(every))
    hits = torch.empty(nll.shape, dtype=torch.bool)
    for column, scale in enumerate(every):

        def warm_alone(ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor]:
            with pair.evaluating():
                return (pair.warm(ids, mask, keep=keep),)

        with adapter_scale(pair, scale):
            for index, (warm,), labels, rows in rows_of(
                pair, encoded, batch_size, warm_alone, f"scale {scale:g}", progress
            ):
                mine = slice(int(place[index]), int(place[index + 1]))
                kept = statistics.positions()[mine].to(labels.device)  # the possible ones
                labels, rows = labels[kept], rows[kept]
                chunk = max(1, MAX_OP // warm.shape[1])
                for start in range(0, len(labels), chunk):
                    span = slice(start, start + chunk)
                    info = steered_logprob(warm, labels=labels[span], warm_rows=rows[span], backend=backend)
                    check_rows(info.status, f"calibration example {index} at scale {scale:g}")
                    nll[mine][span, column] = -info.logprob.cpu()
                    hits[mine][span, column] = (info.greedy == labels[span]).cpu()
    tried = torch.tensor(every, dtype=torch.float64)
    return dataclasses.replace(statistics, scales=tried, scale_nll=nll, scale_hits=hits)
