"""One number a label, added to its log-probability: the control that any other lever has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 4.0
"""Standard deviation, in nats, of the Gaussian prior: a label that is never right gets no infinite bias."""


def fit_bias(logprobs: Tensor, labels: Tensor) -> Tensor:
    """(K,) float64, mean 0: the biases of least loss, a Gaussian prior of :data:`WIDTH` included.

    ``logprobs`` (Q, K) of the same K options to all questions, ``labels`` (Q,). The loss of
    ``softmax(logprobs + bias)`` is convex (a multinomial logistic regression on the intercepts); Newton's
    method, with steps halved until the loss falls.
    """
    level = logprobs - logprobs.max(1, keepdim=True).values
    level = torch.where(torch.isfinite(level), level, -1e4)  # impossible options stay so
    bias = torch.zeros(logprobs.shape[1], dtype=torch.float64)
    target = torch.nn.functional.one_hot(labels, len(bias)).double()

    def loss(b: Tensor) -> float:
        fitted = -((level + b).log_softmax(1) * target).sum()
        return float(fitted + (b**2).sum() / (2 * WIDTH**2))

    here = loss(bias)
    for _ in range(100):
        share = (level + bias).softmax(1)
        slope = (share - target).sum(0) + bias / WIDTH**2
        bend = torch.diag(share.sum(0) + WIDTH**-2) - share.T @ share
        step = torch.linalg.solve(bend, slope)
        size = 1.0
        while size > 1e-6 and loss(bias - size * step) > here:
            size /= 2
        moved = bias - size * step
        if size <= 1e-6 or bool((moved - bias).abs().max() < 1e-10):
            break
        bias, here = moved, loss(moved)
    return bias - bias.mean()
