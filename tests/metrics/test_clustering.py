from __future__ import annotations

import numpy as np
import pytest

from moviola.metrics.clustering import adjusted_rand, purity
from moviola.types import UsageError


def test_names_of_clusters_do_not_matter():
    classes = np.array([0, 0, 1, 1, 2, 2, 2])
    assert adjusted_rand(np.array([7, 7, 3, 3, 9, 9, 9]), classes) == 1
    assert purity([7, 7, 3, 3, 9, 9, 9], classes) == 1


def test_known_values():
    """By hand: of 15 pairs 1 is together in both, 3 in a cluster, 1 + 3 in a class."""
    clusters, classes = [0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 1, 2]
    both, rows, columns = 1, 3, 1 + 3
    chance = rows * columns / 15
    assert adjusted_rand(clusters, classes) == pytest.approx(
        (both - chance) / ((rows + columns) / 2 - chance)
    )
    assert purity(clusters, classes) == pytest.approx(5 / 6)


def test_chance_is_zero_on_average():
    rng = np.random.default_rng(0)
    got = [adjusted_rand(rng.integers(5, size=200), rng.integers(4, size=200)) for _ in range(100)]
    assert abs(np.mean(got)) < 0.003


def test_one_cluster_and_single_items():
    assert adjusted_rand([0, 0, 0], [1, 2, 3]) == 0
    assert adjusted_rand([0, 0], [1, 1]) == 1
    assert adjusted_rand([0], [1]) == 1


@pytest.mark.parametrize(("clusters", "classes"), [([0, 1], [0]), ([], []), ([[0]], [[0]])])
def test_bad_input(clusters, classes):
    with pytest.raises(UsageError, match="one cluster and one class"):
        adjusted_rand(clusters, classes)
