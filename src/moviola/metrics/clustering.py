"""How well clusters agree with classes. Axis letters: N items, C classes, K clusters."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError


def adjusted_rand(clusters_N: npt.ArrayLike, classes_N: npt.ArrayLike) -> float:
    """The adjusted Rand index (Hubert and Arabie 1985): 1 for equal partitions, 0 on average by chance.

    >>> adjusted_rand([0, 0, 1, 1], [5, 5, 2, 2])
    1.0
    """
    table_KC = _table(clusters_N, classes_N).astype(np.float64)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, total = pairs(table_KC), pairs(table_KC.sum())
    rows, columns = pairs(table_KC.sum(1)), pairs(table_KC.sum(0))
    chance, most = rows * columns / total if total else 0.0, (rows + columns) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def purity(clusters_N: npt.ArrayLike, classes_N: npt.ArrayLike) -> float:
    """The share of items that are of their cluster's commonest class.

    >>> purity([0, 0, 1, 1], [0, 1, 2, 2])
    0.75
    """
    table_KC = _table(clusters_N, classes_N)
    return float(table_KC.max(1).sum() / table_KC.sum())


def _table(clusters_N: npt.ArrayLike, classes_N: npt.ArrayLike) -> np.ndarray:
    clusters, classes = np.asarray(clusters_N), np.asarray(classes_N)
    if clusters.ndim != 1 or clusters.shape != classes.shape or not clusters.size:
        raise UsageError(
            f"Expected one cluster and one class per item, got {clusters.shape} and {classes.shape}."
        )
    row_N, column_N = (np.unique(labels, return_inverse=True)[1] for labels in (clusters, classes))
    table_KC = np.zeros((row_N.max() + 1, column_N.max() + 1), np.int64)
    np.add.at(table_KC, (row_N, column_N), 1)
    return table_KC
