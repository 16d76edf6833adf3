"""How a row is steered and how it is sampled, as objects: what decoding carries from call to call."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from svdk.errors import InputError
from svdk.ops.arguments import choice, shape
from svdk.utils.checks import fail, is_number

DIRECTIONS = ("kl_gradient", "log_ratio", "vector")
STRENGTH_MODES = ("constant", "kl_budget")


@lru_cache(maxsize=64)
def _listed(ids: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``ids`` as a tensor: decoding asks for the same at every step, and must not copy it each time."""
    return torch.tensor(ids, dtype=dtype, device=device)


@dataclass(frozen=True)
class ClassStrengths:
    """Strengths by the class of the token that the warm-started model itself likes best at a step.

    The likeliest token (of equal ones the one with the lowest id) tells what is due: a stop token, a token of
    the template, or content, which has the strength of the config.

    Raises:
        InputError: a strength that is not finite, or ids that are not token ids.

    """

    template: float
    """mu where a token of ``template_ids`` is due."""
    stop: float
    """mu where a token of ``stop_ids`` is due; a stop token is no template."""
    template_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check every field; ``InputError`` names the first bad one."""
        for name in ("template", "stop"):
            value = getattr(self, name)
            if not (is_number(value) and math.isfinite(value)):
                raise fail(f"classes.{name}", repr(value), "a finite number")
        for name in ("template_ids", "stop_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple) or not all(
                is_number(x) and isinstance(x, int) and x >= 0 for x in ids
            ):
                raise fail(f"classes.{name}", repr(ids), "a tuple of token ids")

    def classes_of(self, ids: Tensor) -> Tensor:
        """int64, as ``ids``: 0 for content, 1 for template, 2 for stop."""
        template, stop = (
            torch.isin(ids, _listed(known, ids.dtype, ids.device))
            for known in (self.template_ids, self.stop_ids)
        )
        return torch.where(stop, 2, template.long())

    def of(self, warm: Tensor, content: float | Tensor) -> Tensor:
        """Mu float64 (...,) of rows of warm logits (..., V); ``content``: mu of that class."""
        return self.at(warm.argmax(-1), content)

    def at(self, due: Tensor, content: float | Tensor) -> Tensor:
        """As :meth:`of`, where the tokens ``due`` (...,) are the likeliest."""
        classes = self.classes_of(due)
        other = torch.where(classes == 1, self.template, float(self.stop)).double()
        return torch.where(classes == 0, torch.as_tensor(content).to(other), other)


@dataclass(frozen=True, eq=False)
class SteeringConfig:
    """How logits are steered (design section 2; SVDecode, arXiv 2509.15888); :class:`svdk.Steering` is one.

    Raises:
        InputError: a value out of range.

    """

    strength: float | Tensor = 1.0
    """mu for ``constant``; kappa in nats for ``kl_budget``. A number, or one a row (B,)."""
    direction: str = "kl_gradient"
    """``"kl_gradient"``, ``"log_ratio"``, or ``"vector"``: a vector of its own beside it."""
    alpha: float | Tensor = 0.1
    """Threshold of the confidence set C in [0, 1]; 0 keeps every token. A number, or one a row (B,)."""
    penalty: float = -math.inf
    """lambda: finite, or -inf (tokens outside C are never drawn)."""
    strength_mode: str = "constant"
    """``"constant"`` or ``"kl_budget"``."""
    positions: tuple[float, ...] | Tensor = ()
    """Strengths of the first output positions, in place of ``strength``, which all later ones have; (B, P)
    for one list a row. With ``"constant"`` only."""
    classes: ClassStrengths | None = None
    """Strengths by class of token, ``strength`` being that of content. With ``"constant"``, without
    ``positions``."""
    scale: float = 1.0
    """The adapter's own scale times this, while it decodes (LoRA and its kin); 1 leaves it alone."""

    def __post_init__(self) -> None:
        """Check every field; ``InputError`` names the first bad one."""
        strength, alpha, penalty = self.strength, self.alpha, self.penalty
        if not isinstance(strength, Tensor) and not (is_number(strength) and math.isfinite(strength)):
            raise fail("strength", repr(strength), "a finite number")
        choice("direction", self.direction, DIRECTIONS)
        choice("strength_mode", self.strength_mode, STRENGTH_MODES)
        if self.strength_mode == "kl_budget" and not isinstance(strength, Tensor) and strength < 0:
            raise InputError(f"strength was {strength}; allowed for kl_budget: a number >= 0 (nats)")
        if not isinstance(alpha, Tensor) and not (is_number(alpha) and 0 <= alpha <= 1):
            raise fail("alpha", repr(alpha), "a number in [0, 1]")
        if not is_number(penalty) or not penalty < math.inf:
            raise fail("penalty", repr(penalty), "a finite number or -inf")
        if not is_number(self.scale) or not math.isfinite(self.scale):
            raise fail("scale", repr(self.scale), "a finite number")
        self._check_positions()

    def _check_positions(self) -> None:
        positions = self.positions
        if isinstance(positions, Tensor):
            if positions.dim() != 2 or not positions.is_floating_point():
                raise fail("positions", shape(positions), "numbers, or a float tensor (B, P)")
        elif not isinstance(positions, tuple) or not all(
            is_number(x) and math.isfinite(x) for x in positions
        ):
            raise fail("positions", repr(positions), "a tuple of finite numbers")
        if len(positions) and self.strength_mode != "constant":
            raise InputError("positions was given with strength_mode 'kl_budget'; allowed: 'constant'")
        if self.classes is None:
            return
        if not isinstance(self.classes, ClassStrengths):
            raise fail("classes", repr(self.classes), "ClassStrengths or None")
        if len(positions) or self.strength_mode != "constant":
            other = "positions" if len(positions) else "strength_mode 'kl_budget'"
            raise InputError(f"classes was given with {other}; allowed: one strength of content beside it")

    def values(self, step: int | None = None, warm: Tensor | None = None) -> dict[str, Any]:
        """The fields as arguments of the ops, at an output position; None: at one beyond ``positions``.

        ``warm`` (B, V): the warm-started model's logits there, needed for ``classes``. A fixed vector takes
        the place of a direction.
        """
        direction = "kl_gradient" if self.direction == "vector" else self.direction
        names = {name: getattr(self, name) for name in ("strength_mode", "alpha", "penalty")}
        return names | {"strength": self.strength_at(step, warm), "direction": direction}

    def strength_at(self, step: int | None, warm: Tensor | None = None) -> float | Tensor:
        """The strength at an output position, counted from 0 on; one a row of ``warm`` with ``classes``."""
        if self.classes is not None:
            if warm is None:
                raise InputError("warm was None with strengths by class; needed: the warm logits of the step")
            return self.classes.of(warm, self.strength).float()
        positions = self.positions
        if isinstance(positions, Tensor):
            return self.strength if step is None or step >= positions.shape[1] else positions[:, step]
        return self.strength if step is None or step >= len(positions) else positions[step]

    @property
    def steers(self) -> bool:
        """Whether any row may come out other than it went in."""
        at_rest = all(not isinstance(x, Tensor) and x == 0 for x in (self.strength, self.alpha))
        positions, classes = self.positions, self.classes
        own = classes is not None and (classes.template != 0 or classes.stop != 0)
        return not at_rest or own or isinstance(positions, Tensor) or any(positions)

    def scaled(self, by: float) -> SteeringConfig:
        """A plain config with all strengths times ``by``, and the adapter's scale moved likewise from 1.

        A dial: 1 is what was calibrated, 0 the warm start (behind the mask, with alpha above 0). A KL budget
        goes with the square of a strength.
        """
        squared = self.strength_mode == "kl_budget"
        positions, classes = self.positions, self.classes
        if classes is not None:
            classes = dataclasses.replace(classes, template=by * classes.template, stop=by * classes.stop)
        return self.override(
            strength=self.strength * (by * by if squared else by),
            classes=classes,
            positions=positions * by if isinstance(positions, Tensor) else tuple(x * by for x in positions),
            scale=1 + by * (self.scale - 1),
        )

    def override(self, **changes: Any) -> SteeringConfig:
        """A plain config with ``changes``; those that are None stay as they are."""
        kept = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(SteeringConfig)}
        return SteeringConfig(**kept | {name: x for name, x in changes.items() if x is not None})

    def with_one_strength(self, strength: float | Tensor, **changes: Any) -> SteeringConfig:
        """A plain config with this strength wherever the token stands and whatever it is."""
        kept = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(SteeringConfig)}
        return SteeringConfig(**kept | changes | {"strength": strength, "positions": (), "classes": None})


@dataclass(frozen=True, eq=False)
class SamplingConfig:
    """How a token is drawn from steered logits, in transformers' order: temperature, top-k, top-p, min-p.

    Each a number or one a row (B,); ranges as in :func:`svdk.steered_sample`, which checks them.
    """

    temperature: float | Tensor = 1.0
    """0 is greedy."""
    top_k: int | Tensor = 0
    """0 is off."""
    top_p: float | Tensor = 1.0
    """1 is off."""
    min_p: float | Tensor = 0.0
    """0 is off."""
    seed: int | Tensor = 0
    """The 64-bit Philox key."""

    def values(self) -> dict[str, Any]:
        """The fields as arguments of the ops."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @property
    def filters(self) -> bool:
        """Whether some row may be cut by top-k, top-p or min-p."""
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return any(isinstance(x := getattr(self, name), Tensor) or x != value for name, value in off.items())
