"""How many rows were steered, and how many fell back: methods that vLLM adds to its workers."""

from __future__ import annotations

from typing import Any


class Counters:
    """A worker extension; ``collective_rpc("svdk_counters")`` calls it on every worker."""

    def svdk_counters(self) -> dict[str, int]:
        """Rows of logits since the start: ``steered_rows``, and ``fallen_rows`` that were NaN or infinite.

        A row is a token that was sampled, or one that chunked prefill computed and dropped.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        table = runner.get_model().pairing.table
        return {"steered_rows": int(table.steered), "fallen_rows": int(table.fallen)}
