from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moviola.metrics.retrieval import (
    owners_from_ids,
    rank_metrics,
    retrieval_metrics,
    text_to_video_ranks,
    unpad_captions,
    video_to_text_ranks,
)
from moviola.types import UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    return load_file(oracles_dir / "44-xpool" / "a.safetensors")


@pytest.mark.parametrize(
    ("sims", "count", "prefix"),
    [
        ("in/metric_sims", "in/metric_caption_count", "out/metric_"),
        ("out/inference_sims", "out/inference_sims_valid", "out/"),
    ],
)
def test_equals_the_official_metrics(oracle, sims, count, prefix):
    counts = oracle[count] if oracle[count].ndim == 1 else oracle[count].sum(1)
    got = retrieval_metrics(*unpad_captions(oracle[sims], counts), ks=(1, 5, 10, 50, 100))
    compared = 0
    for way, metrics in got.items():
        for name, value in metrics.items():
            assert value == pytest.approx(float(oracle[f"{prefix}{way}_{name}"]), abs=1e-9)
            compared += 1
    assert compared == 14


def slow_ranks(sims, owner, ties, among):
    """The definitions, one comparison at a time."""
    videos, own_ranks, video_ranks = sims.shape[1], [], []
    level = 1.0 if ties == "pessimistic" else 0.5
    for n, v in enumerate(owner):
        others = [sims[n, j] for j in range(videos) if j != v]
        own_ranks.append(
            1 + sum(s > sims[n, v] for s in others) + level * sum(s == sims[n, v] for s in others)
        )
    for v in range(videos):
        best = [max(sims[n, v] for n in range(len(owner)) if owner[n] == j) for j in range(videos)]
        if among == "videos":
            others = [b for j, b in enumerate(best) if j != v]
        else:
            others = [sims[n, v] for n in range(len(owner)) if owner[n] != v]
        video_ranks.append(1 + sum(s > best[v] for s in others) + level * sum(s == best[v] for s in others))
    return own_ranks, video_ranks


@given(
    seed=st.integers(0, 10**6),
    videos=st.integers(1, 6),
    ties=st.sampled_from(["pessimistic", "average"]),
    among=st.sampled_from(["videos", "captions"]),
)
def test_equals_the_definition_with_ties(seed, videos, ties, among):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.concatenate([np.arange(videos), rng.integers(0, videos, 4)]))
    sims = rng.integers(0, 4, (len(owner), videos)).astype(float)
    t2v, v2t = slow_ranks(sims, owner, ties, among)
    assert text_to_video_ranks(sims, owner, ties=ties).tolist() == t2v
    assert video_to_text_ranks(sims, owner, ties=ties, among=among).tolist() == v2t


@given(seed=st.integers(0, 10**6), videos=st.integers(2, 20))
def test_perfect_similarities_give_100_and_rank_1(seed, videos):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(videos), 3))
    sims = rng.uniform(0, 0.4, (len(owner), videos))
    sims[np.arange(len(owner)), owner] += 0.5
    for among in ("videos", "captions"):
        for metrics in retrieval_metrics(sims, owner, among=among).values():
            assert metrics == {"R1": 100.0, "R5": 100.0, "R10": 100.0, "MedR": 1.0, "MeanR": 1.0}


@pytest.mark.parametrize("ties", ["pessimistic", "average"])
def test_a_constant_matrix_never_scores(ties):
    metrics = retrieval_metrics(np.ones((40, 40)), np.arange(40), ties=ties)
    for way in metrics.values():
        assert way["R1"] == way["R10"] == 0.0
        assert way["MeanR"] == (40.0 if ties == "pessimistic" else 20.5)


def test_owners_from_ids():
    owner = owners_from_ids(["b", "a", "b"], ["a", "b"])
    assert owner.tolist() == [1, 0, 1]


def test_captions_and_videos_that_do_not_match_are_all_reported():
    with pytest.raises(UsageError) as error:
        owners_from_ids(["a", "zebra"], ["a", "b", "b"])
    assert all(part in str(error.value) for part in ("zebra", "no caption: b", "more than once: b"))


@pytest.mark.parametrize(
    ("sims", "owner", "said"),
    [
        (np.eye(3), [0, 1, 3], "belong to no video"),
        (np.eye(3), [0, 1, -1], "belong to no video"),
        (np.eye(3), [0, 1], "one owner per caption"),
        (np.eye(3), [0.0, 1.0, 2.0], "column numbers"),
        (np.full((2, 2), np.nan), [0, 1], "NaN"),
        (np.zeros((0, 3)), np.zeros(0, int), "one owner per caption"),
    ],
)
def test_bad_input(sims, owner, said):
    with pytest.raises(UsageError, match=said):
        text_to_video_ranks(sims, owner)


def test_a_video_without_caption_is_reported_and_t2v_still_works():
    sims = np.eye(3)[:2]
    assert text_to_video_ranks(sims, [0, 1]).tolist() == [1, 1]
    with pytest.raises(UsageError, match="have no caption: 2"):
        video_to_text_ranks(sims, [0, 1])


def test_bad_summaries():
    with pytest.raises(UsageError, match="K of 1"):
        rank_metrics([1.0], ks=(0,))
    with pytest.raises(UsageError, match="No ranks"):
        rank_metrics([])
    with pytest.raises(UsageError, match="caption count"):
        unpad_captions(np.zeros((2, 1, 2)), [1, 2])
    with pytest.raises(UsageError, match="ties must be"):
        text_to_video_ranks(np.eye(2), [0, 1], ties="best")
