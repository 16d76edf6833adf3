"""What several tests of calibration need."""

from __future__ import annotations

import pytest

from tests.helpers import tiny


@pytest.fixture
def folder(tmp_path):
    """A LoRA adapter folder for the tiny Llama."""
    tiny.tiny_peft("lora").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
