"""Telling what belongs from what does not by a score: higher should mean inside. Figures are percent.

Both take O((N + M) log(N + M)). Axis letters: N items inside, M items outside.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError


def auroc(inside_N: npt.ArrayLike, outside_M: npt.ArrayLike) -> float:
    """The chance that an item inside scores higher than one outside, equal scores counting half.

    >>> auroc([3, 2], [1, 2])
    87.5
    """
    inside, outside = _checked(inside_N, outside_M)
    outside = np.sort(outside)
    below_N = np.searchsorted(outside, inside, side="left")
    up_to_N = np.searchsorted(outside, inside, side="right")
    # whole numbers, so that nothing is lost by rounding however many pairs there are
    return int((below_N + up_to_N).sum()) / (2 * len(inside) * len(outside)) * 100


def fpr_at_tpr(inside_N: npt.ArrayLike, outside_M: npt.ArrayLike, tpr: float = 95.0) -> float:
    """The smallest share of items outside that pass a threshold which `tpr` percent or more inside pass.

    >>> fpr_at_tpr([4, 3, 2, 1], [0, 2.5, 0, 0], tpr=75)
    25.0
    """
    inside, outside = _checked(inside_N, outside_M)
    if not 0 < tpr <= 100:
        raise UsageError(f"tpr is a share in percent, above 0 and at most 100, got {tpr}.")
    must_pass = math.ceil(tpr * len(inside) / 100)
    threshold = np.partition(inside, len(inside) - must_pass)[len(inside) - must_pass]
    return float((outside >= threshold).mean() * 100)


def _checked(inside_N: npt.ArrayLike, outside_M: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    inside, outside = np.asarray(inside_N, np.float64), np.asarray(outside_M, np.float64)
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1:
            raise UsageError(f"Expected one score an item, got the shape {scores.shape} for those {name}.")
        if not len(scores):
            raise UsageError(
                f"There are no items {name}, so nothing can be told apart.",
                hint="Give items of the classes and items of none of them.",
            )
        if np.isnan(scores).any():
            raise UsageError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores {name} are NaN.")
    return inside, outside
