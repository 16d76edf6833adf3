"""The tests; ``ROOT`` is the repository, for those that read its files."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
