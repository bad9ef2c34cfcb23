"""Exact scores straight from half precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.store.scan import exact_scores, to_halves


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    width=st.integers(1, 70),
    queries=st.integers(1, 3),
    threads=st.sampled_from([1, 3]),
)
def test_equals_the_plain_product(seed: int, width: int, queries: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    chunks = [rng.normal(size=(n, width)).astype(np.float16) for n in rng.integers(0, 300, 4)]
    query_QD = rng.normal(size=(queries, width)).astype(np.float32)
    plain = np.concatenate(chunks).astype(np.float32) @ query_QD.T
    np.testing.assert_allclose(exact_scores(chunks, query_QD, threads=threads), plain, atol=1e-4 * width)


def test_every_finite_half_is_converted_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)][:, None]
    got = exact_scores([finite], np.ones((1, 1), np.float32))[:, 0]
    np.testing.assert_array_equal(got, finite[:, 0].astype(np.float32))


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="expected float16 rows of 8"):
        exact_scores([np.zeros((3, 7), np.float16)], np.zeros((1, 8), np.float32))


def test_halves_are_unit_vectors_with_their_lengths() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 512)).astype(np.float32) * 7
    vectors[3] = 0
    halves, norm = to_halves(vectors)
    np.testing.assert_allclose(halves.astype(np.float32) * norm[:, None], vectors, atol=2e-2)
    assert norm[3] == 0
    assert not halves[3].any()
    with pytest.raises(ValueError, match="not finite"):
        to_halves(np.array([[np.nan, 1.0]]))
