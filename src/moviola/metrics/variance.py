"""How many directions a set of vectors uses. Axis letters: N vectors, D width."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError


def components_for_variance(vectors_ND: npt.ArrayLike, share: float = 0.99) -> int:
    """How many eigenvalues of the covariance, largest first, hold this share of the variance.

    >>> components_for_variance([[3, 0], [-3, 0], [0, 1], [0, -1]], share=0.9)
    1
    """
    array_ND = np.asarray(vectors_ND, dtype=np.float64)
    if array_ND.ndim != 2 or len(array_ND) < 2 or not 0 < share <= 1:
        raise UsageError(
            f"Expected two or more vectors and a share above 0 and at most 1, got {array_ND.shape} and "
            f"{share}."
        )
    held_D = np.cumsum(np.linalg.svd(array_ND - array_ND.mean(0), compute_uv=False) ** 2)
    return 1 + int((held_D < share * held_D[-1] * (1 - 1e-12)).sum())
