"""What calibration keeps of the teacher-forced logits, in the form in which the artifact stores it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdk.calibration.loss_views import LIMIT, GridView, MaskedView, View
from svdk.errors import ArtifactError, InputError

DIRECTIONS = ("kl_gradient", "log_ratio")
"""Of the paper, and of the ratio itself."""
KINDS = ("content", "template", "stop")
"""Of labels; see :meth:`Statistics.kinds`."""
TEMPLATE_SHARE = 0.9
LEAST_OF_TEMPLATE = 5
"""Completions that reach a position before anything there is called a template."""


def default_grid(points: int = 49) -> Tensor:
    """(points,) float64 strengths from -LIMIT to LIMIT, 0 in the middle, spaced like sinh.

    Close to 0 the spacing is about 0.2, where the optimum of a useful task lies; further out it grows to a
    fifth of the strength, which is as fast as the loss there changes shape.
    """
    half = points // 2
    steps = torch.linspace(0, math.asinh(LIMIT), half + 1, dtype=torch.float64).sinh()
    return torch.cat([-steps[1:].flip(0), steps])


NO_SCALES = (
    "the adapter's scale was not tried; allowed: lever='scale' or 'auto' from the start, with an "
    "adapter that has a scale"
)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, eq=False, repr=False)
class GridSums:
    """Storage of a :class:`GridView`: moments (3, T), curves (3, T, M) float32, hits (T, M) bool.

    Artifacts of format 1 have sums over each example instead: curves (3, E, M), hits (E, M) int32.
    """

    moments: Tensor
    curves: Tensor
    hits: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Everything calibration needs, in the form in which the artifact stores it."""

    tokens: Tensor
    """(E,) int64: labelled tokens of each example."""
    logprob_warm: Tensor
    logprob_base: Tensor
    """(T,) float32 each: log-probability of the label."""
    excluded: int = 0
    """Labels that the warm model itself gives probability 0, which no strength can change."""
    alpha: float = 0.0
    """The mask of ``sizes`` ... ``label``; 0 when there are none."""
    sizes: Tensor | None = None
    """(T,) int32: candidates of each token."""
    p: Tensor | None = None
    ratio: Tensor | None = None
    """(N,) float32 each: probability and r - K; either direction follows from them."""
    label: Tensor | None = None
    """(T,) int32: place of the label in its row, -1 outside C."""
    grid: Tensor | None = None
    """(M,) float64"""
    full: Mapping[str, GridSums] = field(default_factory=dict)
    """alpha = 0, by direction."""
    position: Tensor | None = None
    """(T,) int32: which token of its completion each is, from 0 on; None in artifacts of format 1."""
    label_ids: Tensor | None = None
    """(T,) int32: the labels; None in artifacts of format 1."""
    stop_ids: Tensor | None = None
    """(S,) int64: the tokens that end a completion; None in artifacts of format 1."""
    greedy: Tensor | None = None
    """(T,) int32: the token that the warm-started model likes best; None in artifacts without it."""
    vector: Tensor | None = None
    """(V,) float32: the static vector of all examples; None when that lever was not tried."""
    along_vector: GridSums | None = None
    """Along the vector that the other folds made, of each example."""
    scales: Tensor | None = None
    """(S,) float64, ascending, 1 among them; None when the adapter's scale was not tried."""
    scale_nll: Tensor | None = None
    """(T, S) float32: loss of the label at each scale of the adapter, unsteered."""
    scale_hits: Tensor | None = None
    """(T, S) bool: whether the label is the greedy token there."""

    @property
    def examples(self) -> int:
        """The number of examples, E."""
        return len(self.tokens)

    def examples_of_tokens(self) -> Tensor:
        """(T,) int64: the example of each token."""
        return torch.repeat_interleave(torch.arange(self.examples), self.tokens)

    def positions(self) -> Tensor:
        """(T,) int64: which token of its completion each is; ``InputError`` where that was not kept."""
        if self.position is None:
            raise InputError(
                "these statistics are of an older svdk, without output positions; needed for levers: the "
                "calibration once more"
            )
        return self.position.long()

    def due(self) -> Tensor:
        """(T,) int64: what the warm-started model likes best; ``InputError`` where that was not kept."""
        if self.greedy is None:
            raise InputError(
                "these statistics are of an older svdk, without the warm start's own tokens; needed for "
                "lever 'classes': the calibration once more"
            )
        return self.greedy.long()

    def labels(self) -> Tensor:
        """(T,) int64: the labels, where they were kept."""
        return _there(self.label_ids).long()

    def stops(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        return tuple(_there(self.stop_ids).tolist())

    def template_ids(self, keep: Tensor) -> tuple[int, ...]:
        """The tokens that stand somewhere in nearly all completions of the examples ``keep`` (E,) bool."""
        example = self.examples_of_tokens()
        used = keep[example]
        pairs = torch.stack([self.labels()[used], example[used]], 1).unique(dim=0)
        ids, completions = pairs[:, 0].unique(return_counts=True)
        share = completions / max(1, int((keep & (self.tokens > 0)).sum()))
        common = (completions >= LEAST_OF_TEMPLATE) & (share >= TEMPLATE_SHARE)
        stops = torch.isin(ids, _there(self.stop_ids))
        return tuple(ids[common & ~stops].tolist())

    def scale_curves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scales (S,), losses and hits (T, S), float64; ``InputError`` where they were not tried."""
        if self.scales is None:
            raise InputError(NO_SCALES)
        return self.scales, _there(self.scale_nll).double(), _there(self.scale_hits).double()

    def kinds(self) -> Tensor:
        """(T,) int64, places in :data:`KINDS`: what each label is.

        Stop tokens end a completion; a template token is the one that stands at its position in nearly all
        completions that reach it.
        """
        position, ids = self.positions(), self.labels()
        kinds = torch.zeros_like(position)
        for at in range(int(position.max()) + 1 if len(position) else 0):
            here = position == at
            if int(here.sum()) >= LEAST_OF_TEMPLATE:
                common = ids[here].mode().values
                same = here & (ids == common)
                if int(same.sum()) >= TEMPLATE_SHARE * int(here.sum()):
                    kinds[same] = 1
        kinds[torch.isin(ids, _there(self.stop_ids))] = 2
        return kinds

    def settings(self) -> list[tuple[str, float]]:
        """The (direction, alpha) settings that can be evaluated."""
        masked = [] if self.sizes is None else [("kl_gradient", self.alpha), ("log_ratio", self.alpha)]
        return masked + [(direction, 0.0) for direction in self.full]

    def view(self, direction: str, alpha: float, penalty: float = 0.0) -> View:
        """The view of one of :meth:`settings`; ``InputError`` for another.

        ``penalty`` (lambda) other than 0 is for scoring with a mask; without mask nothing is outside C.
        """
        if (direction, alpha) not in self.settings():
            have = ", ".join(f"({name}, alpha {mask:g})" for name, mask in self.settings())
            raise InputError(f"setting was ({direction}, alpha {alpha:g}); these statistics hold: {have}")
        if alpha == 0.0 and direction in self.full:
            return self._grid_view(self.full[direction])
        example = self.examples_of_tokens()
        sizes, at = _there(self.sizes).long(), _there(self.label)
        p, delta = _there(self.p).double(), _there(self.ratio).double()
        if direction == "kl_gradient":
            delta = p * delta
        start = sizes.cumsum(0) - sizes
        label = torch.where(at >= 0, start + at, -1)
        row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return MaskedView(example, self.examples, self.logprob_warm.double(), row, p, delta, label, penalty)

    def vector_view(self) -> GridView:
        """The loss along the static vector; ``InputError`` where that lever was not tried."""
        if self.along_vector is None:
            raise InputError(
                "a static vector was not tried; allowed: lever='vector' or 'auto' from the start"
            )
        return self._grid_view(self.along_vector)

    def _grid_view(self, sums: GridSums) -> GridView:
        example, tokens = self.examples_of_tokens(), self.tokens.double()
        (gain, norm2, variance), hits = sums.moments.double(), sums.hits.double()
        (nll, slope, curvature) = sums.curves.double()
        owner = example if len(hits) == len(example) else torch.arange(self.examples)
        moments, curves = (gain, norm2, variance), (nll, slope, curvature)
        return GridView(example, tokens, *moments, _there(self.grid), owner, *curves, hits)

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors by name, for the artifact."""
        names = ["tokens", "logprob_warm", "logprob_base", "sizes", "p", "ratio", "label", "grid"]
        names += [
            "position",
            "label_ids",
            "greedy",
            "stop_ids",
            "scales",
            "scale_nll",
            "scale_hits",
            "vector",
        ]
        out = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        out["excluded"] = torch.tensor(self.excluded)
        out["alpha"] = torch.tensor(self.alpha, dtype=torch.float64)
        every = {f"full.{direction}": sums for direction, sums in self.full.items()}
        if self.along_vector is not None:
            every["along_vector"] = self.along_vector
        for place, sums in every.items():
            for name in ("moments", "curves", "hits"):
                out[f"{place}.{name}"] = getattr(sums, name)
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """The inverse of :meth:`tensors`; ``ArtifactError`` when shapes or values do not fit together."""
        try:
            parts = dict(tensors)
            full, along = {}, None
            for direction in ("kl_gradient", "log_ratio", "vector"):
                if f"full.{direction}.curves" in parts:
                    hits = "hits" if f"full.{direction}.hits" in parts else "counts"  # of format 1
                    full[direction] = GridSums(
                        *(parts.pop(f"full.{direction}.{name}") for name in ("moments", "curves", hits))
                    )
            if "vector" in parts:
                names = ("moments", "curves", "hits")
                along = GridSums(*(parts.pop(f"along_vector.{name}") for name in names))
            excluded, alpha = int(parts.pop("excluded")), float(parts.pop("alpha"))
            result = cls(excluded=excluded, alpha=alpha, full=full, along_vector=along, **parts)
            problem = result._problem()
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ArtifactError(f"the calibration statistics are incomplete: {error}") from error
        if problem:
            raise ArtifactError(f"the calibration statistics are inconsistent: {problem}")
        return result

    def _problem(self) -> str | None:
        tokens, examples = int(self.tokens.sum()), self.examples
        if self.tokens.dim() != 1 or (examples and int(self.tokens.min()) < 0):
            return "tokens must be non-negative counts"
        if self.logprob_warm.shape != (tokens,) or self.logprob_base.shape != (tokens,):
            return f"log-probabilities must have shape ({tokens},)"
        if self.sizes is not None:
            sizes, label = self.sizes, _there(self.label)
            if sizes.shape != (tokens,) or label.shape != (tokens,):
                return f"sizes and label must have shape ({tokens},)"
            candidates = int(sizes.sum())
            if _there(self.p).shape != (candidates,) or _there(self.ratio).shape != (candidates,):
                return f"p and ratio must have shape ({candidates},)"
            if bool(((sizes < 0) | (label < -1) | (label >= sizes)).any()):
                return "a label points outside its candidates"
        for name in ("position", "label_ids", "greedy"):
            x = getattr(self, name)
            if x is not None and (x.shape != (tokens,) or bool((x < 0).any())):
                return f"{name} must be non-negative, of shape ({tokens},)"
        if self.scales is not None:
            scales, shape = self.scales, (tokens, len(self.scales))
            if _there(self.scale_nll).shape != shape or _there(self.scale_hits).shape != shape:
                return f"scale curves must have shape {shape}"
            if bool((scales.diff() <= 0).any()) or not bool((scales == 1).any()):
                return "the scales must ascend through 1"
        if self.stop_ids is not None and self.stop_ids.dim() != 1:
            return "stop_ids must be a list"
        if (self.vector is None) != (self.along_vector is None):
            return "vector and along_vector belong together"
        if self.vector is not None and (self.vector.dim() != 1 or not bool(self.vector.isfinite().all())):
            return "vector must be a list of finite numbers"
        every = [*self.full.values(), *([] if self.along_vector is None else [self.along_vector])]
        if every:
            grid = _there(self.grid)
            points = len(grid)
            for sums in every:
                shapes = tuple(tuple(x.shape) for x in (sums.moments, sums.curves, sums.hits))
                fits = [((3, tokens), (3, rows, points), (rows, points)) for rows in (tokens, examples)]
                if shapes not in fits:
                    return f"grid sums had shapes {shapes}"
            if points < 3 or bool((grid.diff() <= 0).any()) or not bool((grid == 0).any()):
                return "the grid must ascend through 0"
        return None


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a tensor that belongs to the others is absent")
    return tensor
