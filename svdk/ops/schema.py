"""Codes and dispatcher schemas shared by every backend; the flat argument order is the backend interface."""

from __future__ import annotations

KL_GRADIENT, LOG_RATIO, VECTOR, PLAIN = range(4)
"""Directions; PLAIN means neither base nor vector: the warm distribution itself, no mask."""

CONSTANT, LABEL, KL_BUDGET = range(3)
"""Strength modes of ``steered_sample``."""

DIRECTIONS = {"kl_gradient": KL_GRADIENT, "log_ratio": LOG_RATIO}
STRENGTH_MODES = {"constant": CONSTANT, "label": LABEL, "kl_budget": KL_BUDGET}

_ROWS = "Tensor warm, Tensor? base, Tensor? vector, Tensor? warm_rows, Tensor? base_rows"

STEERED_SAMPLE = (
    f"({_ROWS}, Tensor? labels, int vocab, int direction, int mode, float penalty, "
    "float strength, Tensor? strength_rows, float alpha, Tensor? alpha_rows, "
    "float temperature, Tensor? temperature_rows, int top_k, Tensor? top_k_rows, "
    "float top_p, Tensor? top_p_rows, float min_p, Tensor? min_p_rows, "
    "int seed, Tensor? seed_rows, int offset, Tensor? offset_rows, bool info) "
    "-> (Tensor token, Tensor floats, Tensor ints)"
)

STEERED_LOGPROB = (
    f"({_ROWS}, Tensor labels, int vocab, int direction, float penalty, "
    "float alpha, Tensor? alpha_rows, float strength, Tensor? strength_rows, Tensor? strengths) "
    "-> (Tensor curves, Tensor greedy, Tensor rows, Tensor status)"
)

EXTRACT = (
    f"({_ROWS}, int vocab, int direction, float alpha, Tensor? alpha_rows) "
    "-> (Tensor row_ptr, Tensor ids, Tensor p, Tensor delta, Tensor rows, Tensor status)"
)
