from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.parts import kmeans as module
from moviola.parts.kmeans import check_labels, cluster_means, kmeans, nearest
from moviola.types import UsageError


def points(count, dim, true, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((true, dim))
    x = centres[rng.integers(true, size=count)] + spread * rng.standard_normal((count, dim))
    return x.astype(np.float32)


def plain_lloyd(x, start, iterations):
    """Written out in float64; empty clusters are the farthest points, as the module says."""
    x, centroids = x.astype(np.float64), x[start].astype(np.float64)
    for _ in range(iterations):
        square = ((x[:, None] - centroids[None]) ** 2).sum(-1)
        labels = square.argmin(1)
        far = np.argsort(-square.min(1), kind="stable")
        empty = [k for k in range(len(centroids)) if not (labels == k).any()]
        for k in range(len(centroids)):
            if k not in empty:
                centroids[k] = x[labels == k].mean(0)
        for k, row in zip(empty, far, strict=False):
            centroids[k] = x[row]
    square = ((x[:, None] - centroids[None]) ** 2).sum(-1)
    return square.argmin(1), centroids, square.min(1).sum()


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("clusters", [2, 40, 150])
def test_equals_lloyd_written_out(clusters, iterations):
    x = points(600, 5, 30, seed=clusters)
    got = kmeans(x, clusters, iterations=iterations, restarts=1, seed=3)
    start = np.random.default_rng([3, 0]).choice(len(x), clusters, replace=False)
    labels, centroids, inertia = plain_lloyd(x, start, iterations)
    np.testing.assert_array_equal(got.labels_N, labels)
    np.testing.assert_allclose(got.centroids_KD, centroids, atol=1e-5)
    assert got.inertia == pytest.approx(inertia, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_empty_clusters_take_over_the_farthest_points(seed):
    """Equal points start several clusters in one place: all but the first run empty."""
    few = points(120, 3, 120, seed=seed)
    x = few[np.random.default_rng(seed).integers(120, size=500)]
    got = kmeans(x, 60, iterations=2, restarts=1, seed=seed)
    start = np.random.default_rng([seed, 0]).choice(len(x), 60, replace=False)
    assert len(np.unique(x[start], axis=0)) < 55
    labels, _, inertia = plain_lloyd(x, start, 2)
    assert got.inertia == pytest.approx(inertia, rel=1e-3)
    assert (np.bincount(labels, minlength=60) == np.bincount(got.labels_N, minlength=60)).all()


def test_bands_change_nothing(monkeypatch):
    x = points(500, 8, 20)
    whole = kmeans(x, 60, restarts=1)
    monkeypatch.setattr(module, "_ROWS", 37)
    monkeypatch.setattr(module, "_COLUMNS", 13)
    banded = kmeans(x, 60, restarts=1)
    np.testing.assert_array_equal(whole.labels_N, banded.labels_N)
    np.testing.assert_allclose(whole.centroids_KD, banded.centroids_KD, atol=1e-6)


def test_no_whole_distance_matrix():
    """20,000 x 4,000 distances would be 320 MB; a tile is 8 MB."""
    x_ND, centroids_KD = torch.randn(20_000, 4), torch.randn(4000, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        module._best(x_ND, centroids_KD)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 32 << 20


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(1, 6), st.integers(0, 5), st.booleans())
def test_the_sum_of_distances_never_grows_and_labels_are_of_the_final_centroids(count, dim, seed, repeated):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, dim)).astype(np.float32)
    if repeated:  # many equal points: clusters run empty
        x = x[rng.integers(max(1, count // 4), size=count)]
    clusters = max(1, count // 2)
    got = kmeans(x, clusters, restarts=2, seed=seed)
    steps = np.array(got.steps)
    assert (np.diff(steps) <= 1e-4 * (1 + steps[:-1])).all()
    square = ((x[:, None] - got.centroids_KD[None]) ** 2).sum(-1)
    np.testing.assert_allclose(square[np.arange(count), got.labels_N], square.min(1), atol=1e-5)
    assert got.inertia == pytest.approx(square.min(1).sum(), abs=1e-3)
    check_labels(torch.from_numpy(got.labels_N), clusters)


def test_restarts_keep_the_best_and_the_seed_decides():
    x = points(400, 6, 12)
    runs = [kmeans(x, 12, restarts=n, seed=5).inertia for n in (1, 2, 6)]
    assert runs[0] >= runs[1] >= runs[2]
    again = kmeans(x, 12, seed=5)
    np.testing.assert_array_equal(kmeans(x, 12, seed=5).labels_N, again.labels_N)
    assert not np.array_equal(kmeans(x, 12, seed=6, restarts=1).labels_N, again.labels_N)


def test_finds_what_is_there():
    x = points(600, 16, 3, spread=0.05)
    got = kmeans(x, 3, restarts=10)
    assert got.inertia < 600 * 16 * 0.05**2 * 1.1
    np.testing.assert_array_equal(nearest(x, got.centroids_KD), got.labels_N)


def test_a_far_mean_costs_no_digits():
    x = points(300, 4, 10)
    near, far = kmeans(x, 30, restarts=1), kmeans(x + np.float32(1000), 30, restarts=1)
    assert (near.labels_N == far.labels_N).mean() > 0.98
    assert far.inertia == pytest.approx(near.inertia, rel=0.02)


def test_points_all_alike():
    got = kmeans(np.ones((20, 3), np.float32), 5)
    assert got.inertia == 0
    np.testing.assert_allclose(got.centroids_KD, 1)


def test_as_many_clusters_as_points():
    x = points(30, 3, 30)
    assert kmeans(x, 30).inertia == pytest.approx(0, abs=1e-4)


def test_means_of_clusters():
    x_ND, labels_N = torch.randn(9, 4), torch.tensor([3, 0, 0, 3, 3, 1, 0, 1, 3])
    means_KD, count_K = cluster_means(x_ND, labels_N, 5)
    assert count_K.tolist() == [3, 2, 0, 4, 0]
    for k in (0, 1, 3):
        torch.testing.assert_close(means_KD[k], x_ND[labels_N == k].mean(0))
    assert not means_KD[[2, 4]].any()


@pytest.mark.parametrize(
    ("x", "options", "said"),
    [
        (np.zeros((4, 2)), {"clusters": 5}, "cannot make 5 clusters of 4 points"),
        (np.zeros((4, 2)), {"clusters": 0}, "at least one cluster"),
        (np.zeros((4, 2)), {"clusters": 2, "restarts": 0}, "at least one cluster"),
        (np.zeros(4), {"clusters": 2}, r"takes points \(N, D\)"),
        (np.array([[0.0], [np.nan], [1.0]]), {"clusters": 2}, "1 of 3 points hold NaN.*row 1"),
        (np.array([[0.0], [np.inf], [np.inf]]), {"clusters": 2}, "2 of 3 points"),
    ],
)
def test_bad_input(x, options, said):
    with pytest.raises(UsageError, match=said):
        kmeans(x, **options)


@pytest.mark.parametrize("labels", [[0, 4], [-1, 2]])
def test_labels_outside(labels):
    with pytest.raises(UsageError, match="from 0 to 3"):
        check_labels(torch.tensor(labels), 4)
