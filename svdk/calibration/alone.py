"""The warm-started model alone, once more over the examples of a calibration: levers without a base row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdk.calibration.kept_statistics import GridSums, Statistics, default_grid
from svdk.calibration.sweep import MAX_OP, check_rows, rows_of
from svdk.models.adapter_scale import adapter_scale
from svdk.ops.api import steered_logprob
from svdk.warmstart.data import Encoded

if TYPE_CHECKING:
    from svdk.models.pair import ModelPair

SCALES = (0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
"""Tried beside the adapter's own, 1."""


@dataclasses.dataclass(frozen=True)
class WarmRuns:
    """Runs of the warm-started model over the examples that statistics are of."""

    pair: ModelPair
    encoded: list[Encoded]
    batch_size: int
    backend: str = "auto"
    progress: bool = False

    def rows(self, statistics: Statistics, title: str) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
        """The tokens of ``statistics``, some at a time.

        Yields the example, which of all tokens they are, the logits (R, V) of their batch, their labels (t,)
        and their rows (t,).
        """

        def forward(ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor]:
            with self.pair.evaluating():
                return (self.pair.warm(ids, mask, keep=keep),)

        place = torch.zeros(len(self.encoded) + 1, dtype=torch.int64)
        place[1:] = statistics.tokens.cumsum(0)
        every = rows_of(self.pair, self.encoded, self.batch_size, forward, title, self.progress)
        for index, (warm,), labels, rows in every:
            first, end = int(place[index]), int(place[index + 1])
            kept = statistics.positions()[first:end].to(labels.device)  # the possible ones
            labels, rows = labels[kept], rows[kept]
            chunk = max(1, MAX_OP // warm.shape[1])
            for start in range(0, len(labels), chunk):
                stop = min(start + chunk, len(labels))
                span = slice(first + start, first + stop)
                yield index, span, warm, labels[start:stop], rows[start:stop]

    def with_scales(self, statistics: Statistics, scales: Sequence[float]) -> Statistics:
        """``statistics`` with the loss at other scales of the adapter.

        ``InputError``: an adapter without a scale, or one that is not a finite number.
        """
        every = sorted({1.0, *map(float, scales)})
        nll = torch.empty(int(statistics.tokens.sum()), len(every))
        hits = torch.empty(nll.shape, dtype=torch.bool)
        for column, scale in enumerate(every):
            if scale == 1:  # which the statistics know
                nll[:, column] = -statistics.logprob_warm
                hits[:, column] = statistics.due() == statistics.labels()
                continue
            with adapter_scale(self.pair, scale):
                for index, span, warm, labels, rows in self.rows(statistics, f"scale {scale:g}"):
                    info = steered_logprob(warm, labels=labels, warm_rows=rows, backend=self.backend)
                    check_rows(info.status, f"calibration example {index} at scale {scale:g}")
                    nll[span, column] = -info.logprob.cpu()
                    hits[span, column] = (info.greedy == labels).cpu()
        tried = torch.tensor(every, dtype=torch.float64)
        return dataclasses.replace(statistics, scales=tried, scale_nll=nll, scale_hits=hits)

    def with_vectors(self, statistics: Statistics, vectors: Sequence[Tensor], fold: Tensor) -> Statistics:
        """``statistics`` with the loss along a static vector that has not seen the example.

        ``vectors``: (V,) each, that of fold k made without the examples of fold k; the last one of all
        examples, which is kept for decoding. ``fold`` (E,): of each example.
        """
        tokens = int(statistics.tokens.sum())
        grid = default_grid() if statistics.grid is None else statistics.grid
        moments, curves = torch.empty(3, tokens), torch.empty(3, tokens, len(grid))
        hits = torch.empty(tokens, len(grid), dtype=torch.bool)
        strengths = grid.float().to(self.pair.device)
        moved = [vector.to(self.pair.device) for vector in vectors[:-1]]
        for index, span, warm, labels, rows in self.rows(statistics, "vector"):
            info = steered_logprob(
                warm, labels=labels, strengths=strengths, alpha=0.0, vector=moved[int(fold[index])],
                warm_rows=rows, backend=self.backend,
            )  # fmt: skip
            check_rows(info.status, f"calibration example {index} with a static vector")
            moments[:, span] = torch.stack([info.gain, info.norm2, info.variance]).cpu()
            curves[:, span] = torch.stack([-info.logprob, -info.slope, info.curvature]).cpu()
            hits[span] = (info.greedy == labels[:, None]).cpu()
        grid = grid.float().double()  # the ops saw it in float32
        sums = GridSums(moments, curves, hits)
        return dataclasses.replace(statistics, grid=grid, vector=vectors[-1], along_vector=sums)
