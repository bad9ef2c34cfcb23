"""Gaussian discriminant analysis: classes that share a covariance give a linear classifier in closed form.

With class means mu, a precision P and shares p: W = P mu^T, b = log p - 1/2 diag(mu P mu^T). P is that of
`parts.shrunk_precision` on the class-centred vectors, or, unshrunk, the inverse of the mean over classes of
each one's covariance.

Axis letters: N vectors, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moviola.parts.linear_head import check_labels, class_means
from moviola.parts.shrunk_precision import (
    Form,
    Precision,
    Sums,
    inverse,
    precision_of_rows,
    precision_of_scatter,
)
from moviola.types import UsageError

Covariance = Literal["shared", "class"]


@dataclass(frozen=True)
class Gaussians:
    """GDA's classifier in float64 at the official scale: logits = f @ weight_DC + bias_C."""

    mean_CD: np.ndarray
    p_C: np.ndarray
    precision: Precision
    weight_DC: np.ndarray
    bias_C: np.ndarray
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, mean_CD: np.ndarray, precision: Precision, p_C: np.ndarray, *notes: str) -> Gaussians:
        if precision.flat:
            notes += ("No class has two different vectors: their covariance is taken as the identity.",)
        weight_DC = precision.times(mean_CD.T)
        bias_C = np.log(p_C) - (mean_CD.T * weight_DC).sum(0) / 2
        return cls(mean_CD, p_C, precision, weight_DC, bias_C, notes)

    def logits(self, vectors_ND: np.ndarray) -> np.ndarray:
        return np.asarray(vectors_ND @ self.weight_DC + self.bias_C)


class GaussianFitter:
    """GDA on all vectors, or on all outside one fold. With N >= D the sums of each fold are made once."""

    def __init__(
        self,
        vectors_ND: np.ndarray,
        labels_N: np.ndarray,
        classes: int,
        *,
        fold_N: np.ndarray | None = None,
        covariance: Covariance = "shared",
        form: Form = "auto",
    ) -> None:
        check_labels(vectors_ND, labels_N, classes)
        if classes < 2 or covariance not in ("shared", "class"):
            raise UsageError(
                f"Expected two classes or more and covariance shared or class, got {classes}, {covariance!r}."
            )
        self.vectors_ND, self.labels_N, self.classes = vectors_ND, labels_N, classes
        self.fold_N = np.zeros(len(labels_N), np.int64) if fold_N is None else fold_N
        self.covariance, self.form = covariance, form
        self.sums: dict[int, Sums] = {}
        if covariance == "shared" and form == "auto" and len(vectors_ND) >= vectors_ND.shape[1]:
            for fold in np.unique(self.fold_N).tolist():
                in_N = self.fold_N == fold
                self.sums[fold] = Sums.of(vectors_ND[in_N], labels_N[in_N], classes)
            first, *others = self.sums.values()
            self.whole = sum(others, start=first)

    def fit(self, p_C: np.ndarray, without: int | None = None) -> Gaussians:
        if self.sums:
            sums = self.whole if without is None else self.whole - self.sums[without]
            mean_CD, scatter_DD = sums.mean_and_scatter()
            return Gaussians.of(mean_CD, precision_of_scatter(scatter_DD, int(sums.count_C.sum())), p_C)
        in_N = np.ones(len(self.labels_N), bool) if without is None else self.fold_N != without
        rows_ND, labels_N = self.vectors_ND[in_N].astype(np.float64), self.labels_N[in_N]
        mean_CD = class_means(rows_ND, labels_N, self.classes)
        rows_ND -= mean_CD[labels_N]
        if self.covariance == "shared":
            return Gaussians.of(mean_CD, precision_of_rows(rows_ND, self.form), p_C)
        count_C = np.bincount(labels_N)
        weighted_ND = rows_ND / np.sqrt(len(count_C) * np.maximum(count_C - 1, 1))[labels_N, None]
        matrix_DD = weighted_ND.T @ weighted_ND  # the mean over classes of each one's covariance
        value_D = np.linalg.eigvalsh(matrix_DD)
        if value_D[0] > len(value_D) * np.finfo(np.float64).eps * value_D[-1]:
            return Gaussians.of(mean_CD, Precision(inverse(matrix_DD)), p_C)
        note = "The mean of the classes' covariances is singular: a shrunk shared one was taken."
        return Gaussians.of(mean_CD, precision_of_rows(rows_ND, self.form), p_C, note)
