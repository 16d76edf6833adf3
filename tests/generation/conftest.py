"""The two models that most tests of decoding compare: one with a random LoRA adapter, and its base."""

from __future__ import annotations

import pytest

from tests.helpers import tiny


@pytest.fixture(scope="module")
def lora():
    return tiny.tiny_peft("lora")


@pytest.fixture(scope="module")
def plain():
    return tiny.tiny_model()
