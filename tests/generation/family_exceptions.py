"""Where steered decoding of a family does not equal the slow loop, and why; read by test_families.py."""

from __future__ import annotations

from dataclasses import dataclass

from tests.helpers.families import FORWARDS, KINDS, Verdict


@dataclass(frozen=True)
class Known:
    """One reason, and whom it concerns: every listed family with every listed kind and forward."""

    verdict: str
    pattern: str
    """A regular expression that the verdict's detail holds."""
    names: str
    """Families, separated by blanks."""
    kinds: tuple[str, ...] = KINDS
    forwards: tuple[str, ...] = (*FORWARDS, "auto")

    @property
    def families(self) -> tuple[str, ...]:
        """``names``, apart."""
        return tuple(self.names.split())

    def covers(self, verdict: Verdict) -> bool:
        """Whether it names this family, kind and forward."""
        return (
            verdict.family in self.families
            and verdict.kind in self.kinds
            and verdict.forward in self.forwards
        )


EXCEPTIONS: tuple[Known, ...] = ()
