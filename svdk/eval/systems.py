"""The systems that a study compares: the base model, the warm start, and every way to steer it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from svdk.eval.spec import Study
from svdk.utils import views


@dataclass(frozen=True)
class System:
    """One way to decode; the fields are those of a line of the results."""

    system: str
    direction: str | None = None
    alpha: float | None = None
    penalty: float | None = None
    """lambda; None stands for -inf where ``system`` is "steered"."""
    strength_mode: str | None = None
    estimator: str | None = None
    objective: str | None = None

    @property
    def setting(self) -> tuple[str, float]:
        """(direction, alpha) of a steered system."""
        if self.direction is None or self.alpha is None:
            raise ValueError(f"system {self.system} is not steered")
        return self.direction, self.alpha

    @property
    def fitting(self) -> tuple[str, str]:
        """(estimator, objective) of a steered system."""
        if self.estimator is None or self.objective is None:
            raise ValueError(f"system {self.system} is not steered")
        return self.estimator, self.objective


BASE = System(views.BASE)
WARM = System(views.WARM)


def system_key(system: System, decoding: str) -> str:
    """A name for use in a file."""
    return json.dumps([*(value for value in asdict(system).values() if value is not None), decoding])


def scoring_systems(study: Study) -> list[System]:
    """Every system that a study scores by likelihood."""
    found = [BASE, WARM]
    for direction in study.directions:
        for alpha in (study.alpha, 0.0):
            setting = (views.STEERED, direction, alpha, 0.0, "constant")
            for estimator in study.estimators:
                # Only the optimum looks at the objective; the others are formulas.
                for objective in study.objectives if estimator == "optimum" else ("nll",):
                    found.append(System(*setting, estimator, objective))
        if study.kl_budget:
            found.append(System(views.STEERED, direction, study.alpha, 0.0, "kl_budget", "optimum", "nll"))
        for penalty in study.penalties:
            if penalty != 0 and "optimum" in study.estimators:
                value = None if penalty == float("-inf") else penalty
                found.append(
                    System(views.STEERED, direction, study.alpha, value, "constant", "optimum", "nll")
                )
    if study.static_vector:
        found.append(System(views.STEERED, "vector", 0.0, 0.0, "constant", "optimum", "nll"))
    return found
