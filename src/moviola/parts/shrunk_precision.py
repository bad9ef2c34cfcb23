"""The inverse of a covariance with a ridge, applied to vectors without making a D x D inverse.

S is the scatter of N centred rows X (X^T X), t = trace(S) / (N - 1) the trace of their covariance, and
P = D (S + t I)^-1 the precision with the ridge of Kubokawa and Srivastava (2008, "Estimation of the
precision matrix of a singular Wishart distribution"). S + t I is positive definite with a condition number
of at most N: its pseudo-inverse is its inverse, and a Cholesky factor applies it. With N < D the factor is
of the N x N matrix X X^T + t I, by (S + t I)^-1 v = (v - X^T (X X^T + t I)^-1 X v) / t. All in float64.

Rows without any spread (S = 0, so t = 0) would give 0 by the pseudo-inverse. t is then taken as 1, the
square of a unit vector, so that P = D I: plain distances, on the scale of the others.

Axis letters: N vectors, n of them in a block, D width, C classes or other columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

Solve = Callable[[np.ndarray], np.ndarray]
Form = Literal["auto", "pinv", "cholesky", "woodbury"]

_BLOCK = 4096
_NO_SPREAD = 1e-12  # mean square of centred unit vectors that is rounding alone


@dataclass(frozen=True)
class Sums:
    """What class means and their scatter need of a set of vectors, and additive: counts, sums and X^T X."""

    count_C: np.ndarray
    sum_CD: np.ndarray
    gram_DD: np.ndarray

    @classmethod
    def of(cls, vectors_ND: np.ndarray, labels_N: np.ndarray, classes: int) -> Sums:
        """Rows are cast to float64 in blocks."""
        dim = vectors_ND.shape[1]
        sum_CD, gram_DD = np.zeros((classes, dim)), np.zeros((dim, dim))
        for begin in range(0, len(vectors_ND), _BLOCK):
            block_nD = vectors_ND[begin : begin + _BLOCK].astype(np.float64)
            np.add.at(sum_CD, labels_N[begin : begin + _BLOCK], block_nD)
            gram_DD += block_nD.T @ block_nD
        return cls(np.bincount(labels_N, minlength=classes), sum_CD, gram_DD)

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count_C + other.count_C, self.sum_CD + other.sum_CD, self.gram_DD + other.gram_DD)

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.count_C - other.count_C, self.sum_CD - other.sum_CD, self.gram_DD - other.gram_DD)

    def mean_and_scatter(self) -> tuple[np.ndarray, np.ndarray]:
        mean_CD = self.sum_CD / self.count_C[:, None]
        return mean_CD, self.gram_DD - mean_CD.T @ self.sum_CD


class Precision(NamedTuple):
    """A precision matrix as what it does, (D, C) -> (D, C); `flat` where the rows had no spread at all."""

    times: Solve
    flat: bool = False


def inverse(matrix_DD: np.ndarray, form: Form = "cholesky") -> Solve:
    """Of a symmetric positive definite matrix; `pinv` makes the whole inverse by singular values."""
    matrix = torch.from_numpy(matrix_DD)
    if form == "pinv":
        full_DD = torch.linalg.pinv(matrix).numpy()
        return lambda right_DC: full_DD @ right_DC
    factor_DD = torch.linalg.cholesky(matrix)
    return lambda right_DC: torch.cholesky_solve(torch.tensor(right_DC), factor_DD).numpy()


def precision_of_scatter(scatter_DD: np.ndarray, count: int, form: Form = "auto") -> Precision:
    """P from the scatter of `count` unit rows."""
    ridge, flat = _ridge(float(np.trace(scatter_DD)), count)
    dim = len(scatter_DD)
    solve = inverse(scatter_DD + ridge * np.eye(dim), form)
    return Precision(lambda right_DC: dim * solve(right_DC), flat)


def precision_of_rows(rows_ND: np.ndarray, form: Form = "auto") -> Precision:
    """P from centred unit rows; `auto` solves the smaller of the N x N and the D x D system."""
    count, dim = rows_ND.shape
    if form in ("cholesky", "pinv") or (form == "auto" and count >= dim):
        return precision_of_scatter(rows_ND.T @ rows_ND, count, form)
    ridge, flat = _ridge(float(np.vdot(rows_ND, rows_ND)), count)
    inner, scale = inverse(rows_ND @ rows_ND.T + ridge * np.eye(count)), dim / ridge
    return Precision(lambda right_DC: scale * (right_DC - rows_ND.T @ inner(rows_ND @ right_DC)), flat)


def _ridge(spread: float, count: int) -> tuple[float, bool]:
    flat = spread <= _NO_SPREAD * count
    return (1.0 if flat else spread / (count - 1)), flat
