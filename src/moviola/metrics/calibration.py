"""How far a classifier's confidence can be believed, and the one temperature that repairs most of it.

Confidence is the highest class probability; among equal ones the first class is taken. Shares are
percent, the negative log-likelihood is in nats. Everything is computed in float64.

Axis letters: N items, C classes, K bins.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError

_WIDEST = 1e3  # temperatures are sought within this factor of the logits' own spread, both ways
_STEPS = 80


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram in percent: edges (K + 1,), and per bin how many items there are (K,) int,
    their mean confidence and their accuracy; NaN where a bin is empty.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the gaps, weighted by how many items are in them."""
        gap_K = np.abs(np.nan_to_num(self.accuracy) - np.nan_to_num(self.confidence))
        return float((self.count * gap_K).sum() / self.count.sum())


def softmax(logits_NC: npt.ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Class probabilities of logits divided by `temperature`: (N, C) float64.

    >>> softmax([[0.0, 0.0]]).tolist()
    [[0.5, 0.5]]
    """
    return np.exp(_log_softmax(checked_logits(logits_NC), temperature))


def reliability(probability_NC: npt.ArrayLike, labels_N: npt.ArrayLike, *, bins: int = 15) -> Reliability:
    """Items by their confidence in bins of equal width; bin k of K holds ((k-1)/K, k/K], and 0 the first.

    Guo, Pleiss, Sun, Weinberger: "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599.
    """
    probability = checked_logits(probability_NC)
    labels = _checked_labels(labels_N, probability)
    if bins < 1:
        raise UsageError(f"There must be one bin or more, got {bins}.")
    if probability.min() < 0 or np.abs(probability.sum(1) - 1).max() > 1e-3:
        raise UsageError(
            f"Probabilities must not be negative and must add up to 1 in every row, got values from "
            f"{probability.min():.3g} and sums up to {probability.sum(1).max():.3g}.",
            hint="Logits become probabilities by softmax(logits).",
        )
    confidence_N, right_N = probability.max(1), probability.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1)
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="left") - 1, 0, bins - 1)
    count_K = np.bincount(bin_N, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence_K, accuracy_K = (
            np.bincount(bin_N, weights=values, minlength=bins) / count_K * 100
            for values in (confidence_N, right_N)
        )
    return Reliability(edges * 100, count_K, confidence_K, accuracy_K)


def expected_calibration_error(
    probability_NC: npt.ArrayLike, labels_N: npt.ArrayLike, *, bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over the bins of `reliability`, in percent.

    >>> expected_calibration_error([[0.8, 0.2]] * 4, [0, 0, 1, 1])
    30.0
    """
    return reliability(probability_NC, labels_N, bins=bins).error


def negative_log_likelihood(
    logits_NC: npt.ArrayLike, labels_N: npt.ArrayLike, *, temperature: float = 1.0
) -> float:
    """Mean of -log p(own class), in nats, of logits divided by `temperature`."""
    logits = checked_logits(logits_NC)
    labels = _checked_labels(labels_N, logits)
    log_NC = _log_softmax(logits, temperature)
    return float(-np.take_along_axis(log_NC, labels[:, None], axis=1).mean())


def fit_temperature(logits_NC: npt.ArrayLike, labels_N: npt.ArrayLike) -> float:
    """The temperature that minimises `negative_log_likelihood`.

    The likelihood is concave in 1 / T, so its slope has at most one zero, which Newton's method finds
    within a shrinking bracket. There is none where every item is right (any smaller T is better) or where
    the logits say no more than chance (any larger T is better): then the end of the range is returned,
    a thousandth or a thousand times the logits' own spread, with a warning. Logits that are constant
    within every item give 1.
    """
    logits = checked_logits(logits_NC)
    labels = _checked_labels(labels_N, logits)
    centred_NC = logits - logits.mean(1, keepdims=True)
    spread = math.sqrt(float((centred_NC**2).mean()))
    if spread == 0:
        return 1.0
    unit_NC = centred_NC / spread
    own = float(np.take_along_axis(unit_NC, labels[:, None], axis=1).mean())

    def slope(inverse: float) -> tuple[float, float]:
        """First and second derivative of the mean loss by 1 / T."""
        p_NC = np.exp(_log_softmax(unit_NC, 1 / inverse))
        mean_N = (p_NC * unit_NC).sum(1)
        variance_N = (p_NC * (unit_NC - mean_N[:, None]) ** 2).sum(1)
        return float(mean_N.mean()) - own, float(variance_N.mean())

    low, high = 1 / _WIDEST, _WIDEST
    for end, better in ((low, slope(low)[0] >= 0), (high, slope(high)[0] <= 0)):
        if better:
            warnings.warn(
                "The temperature has no optimum: "
                + ("the logits say no more than chance." if end == low else "every item is right."),
                stacklevel=2,
            )
            return spread / end
    inverse = 1.0
    for _ in range(_STEPS):
        first, second = slope(inverse)
        low, high = (inverse, high) if first < 0 else (low, inverse)
        step = inverse - first / second if second > 0 else 0.0
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - inverse) <= 1e-13 * inverse:
            break
        inverse = following
    return spread / inverse


def checked_logits(scores_NC: npt.ArrayLike) -> np.ndarray:
    """Scores per class as float64 (N, C); raises `UsageError` for another shape, NaN or infinity."""
    scores = np.asarray(scores_NC, np.float64)
    if scores.ndim != 2 or not scores.size:
        raise UsageError(f"Expected scores (items, classes), got the shape {scores.shape}.")
    bad = int((~np.isfinite(scores)).any(1).sum())
    if bad:
        raise UsageError(f"{bad} of {len(scores)} items have scores that are NaN or infinite.")
    return scores


def _checked_labels(labels_N: npt.ArrayLike, scores_NC: np.ndarray) -> np.ndarray:
    labels, (count, classes) = np.asarray(labels_N), scores_NC.shape
    if labels.shape != (count,):
        raise UsageError(f"Expected one label for each of {count} items, got the shape {labels.shape}.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise UsageError(
            f"Labels must be class numbers in 0..{classes - 1}, got {labels.dtype} in "
            f"{labels.min()}..{labels.max()}.",
            hint="Are the scores those of the classes that the labels count?",
        )
    return labels


def _log_softmax(logits_NC: np.ndarray, temperature: float) -> np.ndarray:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"A temperature is positive and finite, got {temperature}.")
    scaled = (logits_NC - logits_NC.max(1, keepdims=True)) / temperature
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
