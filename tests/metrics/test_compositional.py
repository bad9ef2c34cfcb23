from __future__ import annotations

import numpy as np
import pytest

from moviola.metrics.compositional import pairwise_accuracy, top_rescored, winoground_scores
from moviola.metrics.retrieval import text_to_video_ranks
from moviola.types import UsageError


def test_ties_and_failed_rows_are_not_right() -> None:
    got = pairwise_accuracy([0.5, 0.2, np.nan, 0.9], [0.1, 0.2, 0.3, 0.4])
    assert (got.accuracy, got.rows, got.failed) == (50.0, 4, 1)
    assert got.scored == pytest.approx(200 / 3)
    assert pairwise_accuracy([np.nan], [1.0]).scored == 0


def test_winoground_by_hand() -> None:
    right = [[2.0, 1.0], [1.0, 2.0]]
    text_only = [[2.0, 3.0], [1.0, 4.0]]  # each picture prefers its caption; caption 0 prefers picture 1
    image_only = np.transpose(text_only).tolist()
    tie = [[1.0, 1.0], [1.0, 1.0]]
    failed = [[np.nan, 1.0], [0.0, 2.0]]
    got = winoground_scores([right, text_only, image_only, tie, failed])
    assert got.right_R3.tolist() == [
        [True, True, True],
        [True, False, False],
        [False, True, False],
        [False] * 3,
        [False] * 3,
    ]
    assert (got.text, got.image, got.group, got.rows, got.failed) == (40.0, 40.0, 20.0, 5, 1)


def test_rescored_candidates_come_before_all_others() -> None:
    rng = np.random.default_rng(0)
    sims_NM = rng.standard_normal((6, 20))
    top_NK = np.argsort(-sims_NM, axis=1)[:, :5]
    scores_NK = rng.standard_normal((6, 5))
    scores_NK[0, 2] = np.nan
    order_NM = np.argsort(-top_rescored(sims_NM, top_NK, scores_NK), axis=1)
    for order, top, scores, sims in zip(order_NM, top_NK, scores_NK, sims_NM, strict=True):
        assert order[:5].tolist() == top[np.argsort(-np.nan_to_num(scores, nan=-np.inf))].tolist()
        assert order[5:].tolist() == np.argsort(-sims)[5:].tolist()
    same = top_rescored(sims_NM, top_NK, np.zeros((6, 5)))
    assert text_to_video_ranks(same, top_NK[:, 0]).tolist() == [5.0] * 6


@pytest.mark.parametrize(
    "call",
    [
        lambda: pairwise_accuracy([1.0], [1.0, 2.0]),
        lambda: pairwise_accuracy([], []),
        lambda: winoground_scores(np.zeros((3, 4))),
        lambda: top_rescored(np.zeros((2, 4)), np.zeros((2, 2), int), np.zeros((2, 3))),
    ],
)
def test_bad_input(call) -> None:
    with pytest.raises(UsageError, match="Expected"):
        call()
