import numpy as np
import pytest

from moviola.metrics.variance import components_for_variance
from moviola.types import UsageError


def test_the_number_of_components():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    data = rng.standard_normal((400, 3)) @ basis[:3]
    assert components_for_variance(data + 5) == 3  # the mean does not count
    strong = np.concatenate([np.eye(3), -np.eye(3)]) * [10, 1, 0.1]
    assert [components_for_variance(strong, share) for share in (0.9, 0.999, 1.0)] == [1, 2, 3]
    assert components_for_variance(np.ones((5, 4))) == 1


@pytest.mark.parametrize(("vectors", "share"), [(np.ones((1, 4)), 0.9), (np.ones(4), 0.9), (np.eye(4), 0.0)])
def test_bad_input(vectors, share):
    with pytest.raises(UsageError, match="two or more vectors"):
        components_for_variance(vectors, share)
