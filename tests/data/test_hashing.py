import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moviola.data.hashing import hash_uint64, hash_uniform, mix, permutation


def test_splitmix_reference_values():
    # The first outputs of SplitMix64 seeded with 0 (Steele, Lea and Flood 2014; any implementation).
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.array([0, int(golden), (2 * int(golden)) % 2**64], np.uint64)
    assert [hex(int(v)) for v in mix(state)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**63), min_size=1, max_size=20), st.integers(0, 9))
def test_a_draw_depends_on_its_own_id_only(seed, ids, stream):
    together = hash_uniform(seed, np.array(ids, np.uint64), stream)
    alone = [hash_uniform(seed, np.array([i], np.uint64), stream)[0] for i in ids]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_draws_are_uniform_and_streams_independent():
    ids = np.arange(200_000)
    a, b = hash_uniform(7, ids), hash_uniform(7, ids, stream=1)
    counts, _ = np.histogram(a, bins=100, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-square, 99 degrees, p < 1e-4 beyond
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.01


def test_seeds_give_other_draws():
    ids = np.arange(64)
    assert (hash_uint64(1, ids) != hash_uint64(2, ids)).all()


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_a_permutation_holds_every_row_once(count):
    order = permutation(3, 5, count)
    assert sorted(order.tolist()) == list(range(count))
    assert (order == permutation(3, 5, count)).all()


def test_epochs_differ():
    assert (permutation(0, 0, 100) != permutation(0, 1, 100)).any()
