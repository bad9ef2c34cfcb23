"""Robustness beyond what accuracy predicts, the bias to shape, and what corruptions cost. Percent.

Axis letters: B baseline models, N pictures, C classes, G groups of classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError

_NORMAL = NormalDist()
LEAST_BASELINES = 3


def probit(percent: float, n: int) -> float:
    """The inverse of the normal distribution function at an accuracy in percent, measured on `n` items.

    Accuracies of 0 and 100 have none, so they are moved in by half an item.

    >>> probit(50.0, 10)
    0.0
    """
    if n < 1 or not 0 <= percent <= 100:
        raise UsageError(f"Expected an accuracy from 0 to 100 percent on 1 item or more, got {percent}, {n}.")
    least = 0.5 / n
    return _NORMAL.inv_cdf(min(max(percent / 100, least), 1 - least))


@dataclass(frozen=True)
class EffectiveRobustness:
    """The line through the baselines' accuracies, both axes in probits: y = slope * x + intercept.

    Taori, Dave, Shankar, Carlini, Recht, Schmidt: "Measuring Robustness to Natural Distribution Shifts in
    Image Classification", NeurIPS 2020, arXiv 2007.00644.
    """

    slope: float
    intercept: float

    @classmethod
    def fit(
        cls, x_B: npt.ArrayLike, y_B: npt.ArrayLike, n: int = 10_000, n_y: int | None = None
    ) -> EffectiveRobustness:
        """Least squares over baselines alone. Accuracies in percent, on `n` items and `n_y` (None: n)."""
        x, y = np.asarray(x_B, np.float64), np.asarray(y_B, np.float64)
        if x.ndim != 1 or x.shape != y.shape or len(x) < LEAST_BASELINES:
            raise UsageError(
                f"A line needs both accuracies of {LEAST_BASELINES} baselines or more, got {x.shape} and "
                f"{y.shape}.",
                hint="Add reports of other models as baselines.",
            )
        x = np.array([probit(value, n) for value in x.tolist()])
        y = np.array([probit(value, n_y or n) for value in y.tolist()])
        spread = x - x.mean()
        if np.abs(spread).max() < 1e-9:
            raise UsageError("All baselines have the same accuracy, so that there is no line through them.")
        slope = float(spread @ y / (spread @ spread))
        return cls(slope, float(y.mean() - slope * x.mean()))

    def expected(self, x: float, n: int = 10_000) -> float:
        """The accuracy in percent that the baselines' line gives a model whose overall accuracy is `x`."""
        return 100 * _NORMAL.cdf(self.slope * probit(x, n) + self.intercept)

    def residual(self, x: float, y: float, n: int = 10_000, n_y: int | None = None) -> float:
        """How far a model lies above the line, in probits. The baselines' own add up to 0."""
        return probit(y, n_y or n) - (self.slope * probit(x, n) + self.intercept)

    def __call__(self, x: float, y: float, n: int = 10_000) -> float:
        """Points of accuracy above the line; about 0 on average over the baselines."""
        return y - self.expected(x, n)


def effective_robustness(
    baselines_x: npt.ArrayLike, baselines_y: npt.ArrayLike, x: float, y: float, n: int, n_y: int | None = None
) -> float:
    """Points of accuracy by which a model surpasses what baselines of its overall accuracy reach.

    x, y       the model's overall accuracy, and its accuracy on a factor or under a shift, in percent
    n, n_y     on how many items each was measured; without `n_y` both on `n`

    >>> round(effective_robustness([40, 50, 60], [40, 50, 60], 50, 55, 1000), 6)
    5.0
    """
    return EffectiveRobustness.fit(baselines_x, baselines_y, n, n_y)(x, y, n)


@dataclass(frozen=True, slots=True)
class ShapeBias:
    """bias: of the decisions for the shape or the texture, the percent for the shape; NaN if there are none.

    `shape`, `texture` and `neither` are numbers of pictures and add up to `used`, those in which the cues
    conflict.
    """

    bias: float
    shape: int
    texture: int
    neither: int
    used: int


def shape_bias(predicted_N: npt.ArrayLike, shape_N: npt.ArrayLike, texture_N: npt.ArrayLike) -> ShapeBias:
    """Which of two conflicting cues decides; pictures with the same class in both are left out.

    Geirhos, Rubisch, Michaelis, Bethge, Wichmann, Brendel: "ImageNet-trained CNNs are biased towards
    texture", ICLR 2019, arXiv 1811.12231.

    >>> shape_bias([0, 0, 1, 2], [0, 0, 0, 0], [1, 1, 1, 1]).shape
    2
    """
    predicted, shape, texture = (np.asarray(labels) for labels in (predicted_N, shape_N, texture_N))
    if predicted.ndim != 1 or not predicted.shape == shape.shape == texture.shape:
        raise UsageError(
            "Expected a predicted class, a shape and a texture for each picture, got "
            f"{predicted.shape}, {shape.shape} and {texture.shape}."
        )
    conflict = shape != texture
    if not conflict.any():
        raise UsageError(
            f"In none of {len(predicted)} pictures do shape and texture conflict.",
            hint="Pictures whose shape and texture are of one class say nothing about the bias.",
        )
    of_shape = int((predicted == shape)[conflict].sum())
    of_texture = int((predicted == texture)[conflict].sum())
    used, decided = int(conflict.sum()), of_shape + of_texture
    bias = 100 * of_shape / decided if decided else float("nan")
    return ShapeBias(bias, of_shape, of_texture, used - decided, used)


def group_probability(probability_NC: npt.ArrayLike, group_C: npt.ArrayLike) -> np.ndarray:
    """The mean probability of the classes of each group: (N, G). `group_C` holds group numbers, -1 for none.

    >>> group_probability([[0.5, 0.25, 0.25]], [0, 1, 1]).tolist()
    [[0.5, 0.25]]
    """
    probability, group = np.asarray(probability_NC), np.asarray(group_C)
    if probability.ndim != 2 or group.shape != probability.shape[1:] or group.max(initial=-1) < 0:
        raise UsageError(
            f"Expected a group for each class, -1 for none, got {group.shape} for {probability.shape}."
        )
    member_CG = group[:, None] == np.arange(group.max() + 1)
    if not member_CG.any(0).all():
        raise UsageError(f"No class is in group {int(member_CG.any(0).argmin())}.")
    made: np.ndarray = probability @ (member_CG / member_CG.sum(0))
    return made


def relative_drop(clean: float, corrupted: float) -> float:
    """The percent of its accuracy that a model loses; negative where it gains.

    >>> relative_drop(80.0, 60.0)
    25.0
    """
    if not (0 < clean <= 100 and 0 <= corrupted <= 100):
        raise UsageError(
            f"A relative drop needs accuracies from 0 to 100 percent, the clean one above 0, got {clean} and "
            f"{corrupted}."
        )
    return 100 * (1 - corrupted / clean)


def corruption_table(
    clean: float, corrupted: Mapping[tuple[str, int], float], groups: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """What corruptions cost: `rows` by name, `groups` by group of names, the accuracies in percent.

    A row has the accuracy by `severity`, in rising order, its `mean` and the `relative_drop` against `clean`
    (None where that is 0); a group has the mean over its rows. Every corruption must have the same
    severities, or the means could not be compared.
    """
    table: dict[str, dict[int, float]] = {}
    for name, severity in sorted(corrupted):
        if severity != int(severity) or severity < 1:
            raise UsageError(f"A severity is a whole number from 1, got {severity} for {name}.")
        table.setdefault(name, {})[int(severity)] = corrupted[name, severity]
    if not table:
        raise UsageError("There are no corrupted pictures to report.")
    wanted = list(next(iter(table.values())))
    uneven = [name for name, row in table.items() if list(row) != wanted]
    if uneven:
        raise UsageError(f"{uneven[0]} has the severities {list(table[uneven[0]])}, others have {wanted}.")

    def summary(accuracies: Iterable[float]) -> dict[str, Any]:
        mean = float(np.mean(list(accuracies)))
        return {"mean": mean, "relative_drop": relative_drop(clean, mean) if clean > 0 else None}

    rows = {name: {"severity": row, **summary(row.values())} for name, row in table.items()}
    present = {group: [n for n in table if n in set(names)] for group, names in groups.items()}
    means = {group: summary(rows[n]["mean"] for n in names) for group, names in present.items() if names}
    return {"clean": clean, "rows": rows, "groups": means}
