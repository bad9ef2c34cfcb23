"""How two figures go together over models. Axis letters: M models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError

LEAST_MODELS = 3


def pearson(x_M: npt.ArrayLike, y_M: npt.ArrayLike) -> float | None:
    """The linear correlation, -1 to 1; None below three models or where one side is constant.

    >>> round(pearson([1, 2, 3], [2, 4, 6]), 12)
    1.0
    """
    x, y = _checked(x_M, y_M)
    if len(x) < LEAST_MODELS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(x_M: npt.ArrayLike, y_M: npt.ArrayLike) -> float | None:
    """The correlation of the ranks, equal values sharing the mean of theirs; None as for `pearson`."""
    x, y = _checked(x_M, y_M)
    return pearson(_average_ranks(x), _average_ranks(y))


def slope(x_M: npt.ArrayLike, y_M: npt.ArrayLike) -> float | None:
    """The slope of the least-squares line of y over x; None below three models or where x is constant."""
    x, y = _checked(x_M, y_M)
    if len(x) < LEAST_MODELS or np.ptp(x) == 0:
        return None
    x = x - x.mean()
    return float(x @ y / (x @ x))


def attribute_study(
    models: Sequence[Mapping[str, Any]], attribute: str, measure: str, within: str | None = None
) -> dict[str, Any]:
    """How a measure goes with an attribute over models, each a mapping from names to values.

    An attribute of numbers gives `pearson`, `spearman` and `slope`; any other gives `groups`: n, mean and
    standard deviation by value. `within` holds another attribute fixed: the same for each of its values, in
    `within`. Models that lack one of these, or have None, are left out and counted.
    """
    names = [attribute, measure, *([within] if within else [])]
    kept = [model for model in models if all(model.get(name) is not None for name in names)]
    if not kept:
        raise UsageError(f"No model has all of {', '.join(names)}.")
    figures: dict[str, Any] = {"n": len(kept), "left_out": len(models) - len(kept)}
    if within is not None:
        parts = _by_value(kept, within)
        return figures | {
            "within": {v: attribute_study(part, attribute, measure) for v, part in parts.items()}
        }
    if all(type(model[attribute]) in (int, float) for model in kept):
        x, y = [model[attribute] for model in kept], [model[measure] for model in kept]
        return figures | {"pearson": pearson(x, y), "spearman": spearman(x, y), "slope": slope(x, y)}
    groups = {}
    for value, part in _by_value(kept, attribute).items():
        of = np.array([model[measure] for model in part], np.float64)
        groups[value] = {"n": len(of), "mean": float(of.mean()), "std": float(of.std())}
    return figures | {"groups": groups}


def _by_value(models: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[Mapping[str, Any]]]:
    values = sorted({str(model[name]) for model in models})
    return {value: [model for model in models if str(model[name]) == value] for value in values}


def _average_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _checked(x_M: npt.ArrayLike, y_M: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x_M, np.float64), np.asarray(y_M, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise UsageError(f"Expected two figures for each model, got {x.shape} and {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UsageError("Figures that are NaN or infinite have no correlation; leave those models out.")
    return x, y
