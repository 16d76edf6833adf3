"""Registration with the dispatcher: schemas and fakes here, implementations in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from svdk.ops import schema

LIBRARY = torch.library.Library("svdk", "DEF")
for _name, _schema in (
    ("steered_sample", schema.STEERED_SAMPLE),
    ("steered_logprob", schema.STEERED_LOGPROB),
    ("extract", schema.EXTRACT),
):
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _batch(warm: Tensor, warm_rows: Tensor | None) -> int:
    return warm.shape[0] if warm_rows is None else warm_rows.shape[0]


@torch.library.register_fake("svdk::steered_sample", lib=LIBRARY)
def _steered_sample(warm, base, vector, warm_rows, *args):
    batch = _batch(warm, warm_rows)
    info = args[-1]
    return (
        warm.new_empty(batch, dtype=torch.int64),
        warm.new_empty((5, batch) if info else (0,), dtype=torch.float32),
        warm.new_empty((2, batch) if info else (0,), dtype=torch.int32),
    )


@torch.library.register_fake("svdk::steered_logprob", lib=LIBRARY)
def _steered_logprob(warm, base, vector, warm_rows, base_rows, labels, *args):
    batch, strengths = labels.shape[0], args[-1]
    count = 1 if strengths is None else strengths.shape[0]
    return (
        warm.new_empty((3, batch, count), dtype=torch.float32),
        warm.new_empty((batch, count), dtype=torch.int64),
        warm.new_empty((6, batch), dtype=torch.float32),
        warm.new_empty(batch, dtype=torch.int32),
    )


@torch.library.register_fake("svdk::extract", lib=LIBRARY)
def _extract(warm, base, vector, warm_rows, *args):
    batch, entries = _batch(warm, warm_rows), torch.library.get_ctx().new_dynamic_size()
    return (
        warm.new_empty(batch + 1, dtype=torch.int64),
        warm.new_empty(entries, dtype=torch.int64),
        warm.new_empty(entries, dtype=torch.float32),
        warm.new_empty(entries, dtype=torch.float32),
        warm.new_empty((3, batch), dtype=torch.float32),
        warm.new_empty(batch, dtype=torch.int32),
    )
