"""Moment retrieval metrics: R1@tIoU and mAP as the QVHighlights evaluation defines them.

A query has predicted windows (K, 3) of start, end and score, listed best first, and true windows
(G, 2); times in seconds. Figures are percent. A query without predictions counts as zero.

mAP: average precision of each query with all-point interpolation (precision made monotone), each
true window found once, at most `max_predictions` windows per query, averaged over queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError

THRESHOLDS = tuple(float(t) for t in np.linspace(0.5, 0.95, 10))  # 0.50, 0.55, ..., 0.95


def tiou_matrix(windows_P2: npt.ArrayLike, truths_G2: npt.ArrayLike) -> np.ndarray:
    """Temporal intersection over union of every window with every true one: (P, G), or with batch axes.

    Two windows without any length overlap by 0.

    >>> tiou_matrix([[0, 10]], [[5, 15], [0, 10]]).round(3)
    array([[0.333, 1.   ]])
    """
    windows, truths = np.asarray(windows_P2, np.float64), np.asarray(truths_G2, np.float64)
    start_P1, end_P1 = windows[..., :, None, 0], windows[..., :, None, 1]
    start_1G, end_1G = truths[..., None, :, 0], truths[..., None, :, 1]
    common = np.clip(np.minimum(end_P1, end_1G) - np.maximum(start_P1, start_1G), 0, None)
    union = (end_P1 - start_P1) + (end_1G - start_1G) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def recall_at_1(
    predictions: Sequence[npt.ArrayLike],
    truths: Sequence[npt.ArrayLike],
    thresholds: Sequence[float] = (0.5, 0.7),
) -> dict[str, float]:
    """Share of queries whose first window overlaps some true window by at least the threshold.

    Returns `{"R1@0.5": ..., "R1@0.7": ...}`.
    """
    windows_QP3, listed_QP, truths_QG2, real_QG = _padded(predictions, truths, max_predictions=1)
    iou_QG = np.where(real_QG & listed_QP, tiou_matrix(windows_QP3[..., :2], truths_QG2)[:, 0], -1)
    best_Q = iou_QG.max(1)
    return {f"R1@{t:g}": float((best_Q >= t).mean() * 100) for t in thresholds}


def average_precisions(
    predictions: Sequence[npt.ArrayLike],
    truths: Sequence[npt.ArrayLike],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    max_predictions: int | None = 10,
) -> np.ndarray:
    """Average precision of each query at each threshold, in 0..1: (Q, thresholds)."""
    windows_QP3, listed_QP, truths_QG2, real_QG = _padded(predictions, truths, max_predictions)
    order_QP = np.argsort(np.where(listed_QP, -windows_QP3[..., 2], np.inf), axis=1, kind="stable")
    windows_QP3 = np.take_along_axis(windows_QP3, order_QP[..., None], axis=1)
    listed_QP = np.take_along_axis(listed_QP, order_QP, axis=1)
    iou_QPG = np.where(real_QG[:, None], tiou_matrix(windows_QP3[..., :2], truths_QG2), -1)

    queries, ranks, _ = iou_QPG.shape
    wanted_H1 = np.asarray(thresholds, np.float64)[:, None]
    free_QHG = np.broadcast_to(real_QG[:, None], (queries, len(wanted_H1), real_QG.shape[1])).copy()
    hits_QHP = np.zeros((queries, len(wanted_H1), ranks), bool)
    for rank in range(ranks):  # each window takes the best true window that is still free
        reach_QHG = free_QHG & (iou_QPG[:, rank, None] >= wanted_H1)
        reach_QHG &= listed_QP[:, rank, None, None]
        hits_QHP[..., rank] = reach_QHG.any(-1)
        taken_QH1 = np.where(reach_QHG, iou_QPG[:, rank, None], -1).argmax(-1)[..., None]
        kept = np.take_along_axis(free_QHG, taken_QH1, -1) & ~hits_QHP[..., rank, None]
        np.put_along_axis(free_QHG, taken_QH1, kept, -1)
    precision_QHP = hits_QHP.cumsum(-1) / np.arange(1, ranks + 1)
    monotone_QHP = np.maximum.accumulate(precision_QHP[..., ::-1], -1)[..., ::-1]
    return (hits_QHP * monotone_QHP).sum(-1) / real_QG.sum(1)[:, None]


def mean_average_precision(
    predictions: Sequence[npt.ArrayLike],
    truths: Sequence[npt.ArrayLike],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    max_predictions: int | None = 10,
) -> dict[str, float]:
    """mAP at each threshold and their mean: `{"mAP": ..., "mAP@0.5": ..., ...}`.

    >>> mean_average_precision([[[0, 4, 0.9]]], [[[0, 5]]], thresholds=(0.5, 0.9))
    {'mAP': 50.0, 'mAP@0.5': 100.0, 'mAP@0.9': 0.0}
    """
    ap_QH = average_precisions(predictions, truths, thresholds, max_predictions=max_predictions)
    named = {f"mAP@{t:g}": float(v) for t, v in zip(thresholds, ap_QH.mean(0) * 100, strict=True)}
    return {"mAP": float(ap_QH.mean() * 100)} | named


def _padded(
    predictions: Sequence[npt.ArrayLike], truths: Sequence[npt.ArrayLike], max_predictions: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    if len(predictions) != len(truths) or not len(truths):
        raise UsageError(
            f"Expected predictions and truths of the same queries, got {len(predictions)} and {len(truths)}."
        )
    windows = [_rows(p, 3, f"predictions of query {q}")[:max_predictions] for q, p in enumerate(predictions)]
    wanted = [_rows(t, 2, f"true windows of query {q}") for q, t in enumerate(truths)]
    empty = [q for q, t in enumerate(wanted) if not len(t)]
    if empty:
        raise UsageError(
            f"{len(empty)} queries have no true window, so nothing can be found: {empty[:5]}.",
            hint="Leave those queries out.",
        )
    windows_QP3, listed_QP = _stack(windows, 3)
    truths_QG2, real_QG = _stack(wanted, 2)
    return windows_QP3, listed_QP, truths_QG2, real_QG


def _rows(values: npt.ArrayLike, width: int, what: str) -> np.ndarray:
    rows = np.asarray(values, np.float64)
    if not rows.size:
        return np.zeros((0, width))
    if rows.ndim != 2 or rows.shape[1] != width or np.isnan(rows).any() or (rows[:, 1] < rows[:, 0]).any():
        raise UsageError(
            f"The {what} must be rows of {'start, end, score' if width == 3 else 'start, end'} with "
            f"start <= end and no NaN, got shape {rows.shape}."
        )
    return rows


def _stack(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    most = max(1, *(len(r) for r in rows)) if rows else 1
    out = np.zeros((len(rows), most, width))
    real = np.zeros((len(rows), most), bool)
    for q, row in enumerate(rows):
        out[q, : len(row)], real[q, : len(row)] = row, True
    return out, real
