import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moviola.data.shots import few_shot, split_rows
from moviola.types import UsageError

NAMES = ["cat", "dog", "fox"]


@given(st.lists(st.integers(0, 2), min_size=6, max_size=40), st.integers(1, 6), st.integers(0, 9))
def test_more_shots_contain_the_fewer(labels, shots, seed):
    labels_N = np.array(labels)
    few, more = few_shot(labels_N, shots, seed), few_shot(labels_N, shots + 1, seed)
    assert set(few) <= set(more)
    counts = np.bincount(labels_N[few], minlength=3)
    assert (counts == np.minimum(np.bincount(labels_N, minlength=3), shots)).all()


def test_a_row_left_out_gives_its_place_to_the_next():
    labels_N = np.repeat([0, 1, 2], 8)
    first = few_shot(labels_N, 3, seed=1)
    again = few_shot(labels_N, 3, seed=1, without={int(first[0])})
    assert first[0] not in again
    assert set(first[1:]) <= set(again)
    assert len(again) == 9


def test_what_is_learned_from_is_not_measured_on():
    labels_N = np.repeat([0, 1, 2], [10, 4, 7])
    split = split_rows(labels_N, NAMES, shots=5, seed=0)
    assert not set(split.train) & set(split.test)
    assert sorted([*split.train, *split.test]) == list(range(21))
    assert np.bincount(labels_N[split.train]).tolist() == [5, 4, 5]
    assert "1 of 3 classes have fewer than 5 items" in split.notes[0]
    assert "dog" in split.notes[0]
    limited = split_rows(labels_N, NAMES, shots=5, seed=0, most_test=3)
    assert (limited.train == split.train).all()
    assert len(limited.test) == 3


def test_without_shots_a_share_of_every_class_is_kept_apart():
    labels_N = np.repeat([0, 1, 2], [10, 5, 1])
    split = split_rows(labels_N, NAMES, shots=None, seed=0, held_out=0.2)
    assert np.bincount(labels_N[split.test], minlength=3).tolist() == [2, 1, 0]
    assert "1 of 3 classes have one item only" in split.notes[0]
    assert len(split_rows(labels_N, NAMES, shots=None, seed=0, held_out=0).test) == 0


def test_errors_name_the_classes():
    labels_N = np.repeat([0, 1, 2], 2)
    with pytest.raises(UsageError, match="no item that can be read: fox"):
        split_rows(labels_N, NAMES, shots=1, seed=0, without={4, 5})
    with pytest.raises(UsageError, match="shots must be at least 1"):
        split_rows(labels_N, NAMES, shots=0, seed=0)
    with pytest.raises(UsageError, match="shots must be at least 1"):
        few_shot(labels_N, 0, 0)
    with pytest.raises(UsageError, match=r"lies in \[0, 1\)"):
        split_rows(labels_N, NAMES, shots=None, seed=0, held_out=1.0)
