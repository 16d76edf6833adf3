"""The views of an adapted model, by name: in arguments, studies and results files."""

from __future__ import annotations

BASE, WARM, STEERED = "base", "warm", "steered"
"""Without the adapter; with it (the warm start); with it, and steered away from the base view."""
VIEWS = (BASE, WARM, STEERED)
