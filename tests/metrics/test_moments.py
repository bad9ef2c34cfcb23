from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moviola.metrics.moments import (
    THRESHOLDS,
    average_precisions,
    mean_average_precision,
    recall_at_1,
    tiou_matrix,
)
from moviola.types import TimeSpan, UsageError


def slow_average_precision(predictions, truths, threshold):
    """The definition, one window at a time."""
    rows = sorted(predictions[:10], key=lambda row: -row[2])
    free, hits = list(truths), []
    for start, end, _ in rows:
        overlaps = [TimeSpan(start, end).iou(TimeSpan(*t)) for t in free]
        best = int(np.argmax(overlaps)) if overlaps else -1
        hits.append(best >= 0 and overlaps[best] >= threshold)
        if hits[-1]:
            free.pop(best)
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    return sum(precision[k:].max() for k in range(len(hits)) if hits[k]) / len(truths)


def windows(rng, count):
    start = rng.uniform(0, 20, count)
    return np.stack([start, start + rng.uniform(0.5, 10, count)], 1)


@given(seed=st.integers(0, 10**6))
def test_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    truths = [windows(rng, rng.integers(1, 4)) for _ in range(3)]
    predictions = [np.c_[w := windows(rng, rng.integers(0, 14)), rng.uniform(size=len(w))] for _ in range(3)]
    got = average_precisions(predictions, truths, (0.1, 0.3, 0.5))
    wanted = [[slow_average_precision(p, t, h) for h in (0.1, 0.3, 0.5)] for p, t in zip(predictions, truths)]
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@given(seed=st.integers(0, 10**6))
def test_perfect_predictions_give_100_in_any_order_of_windows(seed):
    rng = np.random.default_rng(seed)
    truths = [windows(rng, rng.integers(1, 6)) for _ in range(4)]
    predictions = [np.c_[rng.permutation(t), rng.uniform(size=len(t))] for t in truths]
    assert set(mean_average_precision(predictions, truths).values()) == {100.0}
    assert set(recall_at_1(predictions, truths, THRESHOLDS).values()) == {100.0}


@given(seed=st.integers(0, 10**6))
def test_tiou_matrix_equals_time_spans(seed):
    rng = np.random.default_rng(seed)
    a, b = windows(rng, 4), windows(rng, 3)
    wanted = [[TimeSpan(*x).iou(TimeSpan(*y)) for y in b] for x in a]
    np.testing.assert_allclose(tiou_matrix(a, b), wanted, atol=1e-12)


def test_thresholds_are_the_evaluations():
    assert tuple(float(t) for t in np.linspace(0.5, 0.95, 10)) == THRESHOLDS
    assert list(mean_average_precision([[[0, 1, 1]]], [[[0, 1]]])) == [
        "mAP", "mAP@0.5", "mAP@0.55", "mAP@0.6", "mAP@0.65", "mAP@0.7", "mAP@0.75", "mAP@0.8", "mAP@0.85",
        "mAP@0.9", "mAP@0.95",
    ]  # fmt: skip


def test_one_window_finds_one_truth_only():
    truths = [[[0, 10], [0, 10]]]
    assert mean_average_precision([[[0, 10, 0.9]]], truths)["mAP"] == 50.0
    assert mean_average_precision([[[0, 10, 0.9], [0, 10, 0.8]]], truths)["mAP"] == 100.0


def test_only_ten_windows_count_and_a_query_without_any_counts_as_zero():
    miss = [[50, 60, 1.0]]
    assert mean_average_precision([miss * 10 + [[0, 10, 9.0]]], [[[0, 10]]])["mAP"] == 0.0
    every = mean_average_precision([miss * 10 + [[0, 10, 9.0]]], [[[0, 10]]], max_predictions=None)
    assert every["mAP"] == 100.0
    both = ([[[0, 10, 1.0]], []], [[[0, 10]], [[0, 10]]])
    assert mean_average_precision(*both)["mAP"] == 50.0
    assert recall_at_1(*both)["R1@0.5"] == 50.0


def test_equals_the_qvhighlights_evaluation(shared_dir):
    """The authors' predictions, annotations and per-query results, where the data lies beside."""
    folder = shared_dir / "oracles" / "72-qvhighlights-eval"
    if not folder.is_dir():
        pytest.skip("no QVHighlights evaluation data beside the checkout")
    oracle = load_file(folder / "a.safetensors")
    official = json.loads((folder / "a.json").read_text())["metrics"]["full"]
    truth = {}
    for line in (folder / "highlight_val_release.jsonl").read_text().splitlines():
        row = json.loads(line)
        truth[row["qid"]] = row["relevant_windows"]
    with gzip.open(folder / "sample_val_preds.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    predictions = [row["pred_relevant_windows"] for row in rows]
    truths = [truth[row["qid"]] for row in rows]
    assert [row["qid"] for row in rows] == oracle["out/query_ids"].tolist()
    np.testing.assert_allclose(average_precisions(predictions, truths), oracle["out/mr_ap_full"], atol=1e-9)
    got = mean_average_precision(predictions, truths)
    assert round(got["mAP"], 2) == official["MR-mAP"]["average"]
    recalls = recall_at_1(predictions, truths, THRESHOLDS)
    assert [round(v, 2) for v in recalls.values()] == list(official["MR-R1"].values())


@pytest.mark.parametrize(
    ("predictions", "truths", "said"),
    [
        ([[[0, 1, 1]]], [], "same queries"),
        ([[[0, 1, 1]]], [[]], "no true window"),
        ([[[2, 1, 1]]], [[[0, 1]]], "start <= end"),
        ([[[0, 1]]], [[[0, 1]]], "start, end, score"),
        ([[[0, np.nan, 1]]], [[[0, 1]]], "NaN"),
    ],
)
def test_bad_input(predictions, truths, said):
    with pytest.raises(UsageError, match=said):
        mean_average_precision(predictions, truths)
