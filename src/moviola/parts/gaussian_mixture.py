"""A Gaussian mixture with one covariance, fitted by EM from given responsibilities.

    M  n_c = sum_n q_nc;  mu_c = sum_n q_nc x_n / n_c;  S = sum_nc q_nc (x_n - mu_c)(x_n - mu_c)^T
       Sigma = (S + l I) / N;  p_c as given, or n_c / N
    E  log q_nc = log p_c + mu_c^T Sigma^-1 x_n - 1/2 mu_c^T Sigma^-1 mu_c, less its log-sum-exp over c

l = trace(S) / (N - 1) of the first M step and stays: a prior on Sigma, under which no step lowers
sum_n log p(x_n) - l / 2 trace(Sigma^-1). Since each q_n sums to one, S is X^T X less the part of the means,
and X^T X is made once. Rows go through in blocks: memory is D x D and a block's n x C.

Axis letters: N vectors, n of them in a block, D width, C components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moviola.parts.shrunk_precision import inverse

_BLOCK = 4096
_GONE = 1e-9  # a component with less weight keeps its mean


@dataclass(frozen=True)
class Mixture:
    """Means, scatter, weights n_c and shares p_c; `objective`: penalised log-likelihood by step."""

    mean_CD: np.ndarray
    scatter_DD: np.ndarray
    count_C: np.ndarray
    p_C: np.ndarray
    objective: tuple[float, ...]


def fit_mixture(
    vectors_ND: np.ndarray,
    start: Callable[[np.ndarray], np.ndarray],
    *,
    p_C: np.ndarray,
    learn_p: bool = False,
    steps: int = 100,
    tolerance: float = 1e-4,
) -> Mixture:
    """`start` gives the first logits of a block (n, D) -> (n, C); ends when a step gains less per vector."""
    count, dim = vectors_ND.shape
    weight_DC = bias_C = np.empty(0)
    gram_DD = np.zeros((dim, dim))
    mean_CD, ridge, constant = np.zeros((len(p_C), dim)), 0.0, 0.0
    objective: list[float] = []
    for step in range(steps + 1):
        count_C, sum_CD, logs = np.zeros(len(p_C)), np.zeros((len(p_C), dim)), 0.0
        for begin in range(0, count, _BLOCK):
            block_nD = vectors_ND[begin : begin + _BLOCK].astype(np.float64)
            if step == 0:
                gram_DD += block_nD.T @ block_nD
            q_nC, log_n = softmax(block_nD @ weight_DC + bias_C if step else start(block_nD))
            count_C += q_nC.sum(0)
            sum_CD += q_nC.T @ block_nD
            logs += float(log_n.sum())
        if step:
            objective.append((logs - constant) / count)
        mean_CD = np.where(count_C[:, None] > _GONE, sum_CD / np.maximum(count_C, 1e-300)[:, None], mean_CD)
        mixed_DD = mean_CD.T @ sum_CD
        scatter_DD = gram_DD - mixed_DD - mixed_DD.T + (mean_CD.T * count_C) @ mean_CD
        if len(objective) > 1 and objective[-1] - objective[-2] < tolerance:
            break
        ridge = ridge or float(np.trace(scatter_DD)) / (count - 1)
        if learn_p:
            p_C = np.maximum(count_C, _GONE)
            p_C = p_C / p_C.sum()
        sigma_DD = (scatter_DD + ridge * np.eye(dim)) / count
        solve = inverse(sigma_DD)
        weight_DC = solve(mean_CD.T)
        bias_C = np.log(p_C) - (mean_CD.T * weight_DC).sum(0) / 2
        # what does not depend on the class: x^T Sigma^-1 x over all x, the determinant, and the penalty
        constant = float(np.trace(solve(gram_DD + ridge * np.eye(dim)))) / 2
        constant += count / 2 * (dim * np.log(2 * np.pi) + float(np.linalg.slogdet(sigma_DD)[1]))

    return Mixture(mean_CD, scatter_DD, count_C, p_C, tuple(objective))


def softmax(logits_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the columns, and the log-sum-exp of each row."""
    top_N1 = logits_NC.max(1, keepdims=True)
    e_NC = np.exp(logits_NC - top_N1)
    sum_N1 = e_NC.sum(1, keepdims=True)
    return e_NC / sum_N1, (top_N1 + np.log(sum_N1))[:, 0]
