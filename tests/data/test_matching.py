"""The fast matcher finds exactly what the written-out rule finds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.data import matching
from moviola.data.matching import Matcher, Matches, needs_no_space, spaced_entry, spacing
from moviola.types import UsageError

# few letters, so that words meet; long runs, so that chunks of eight bytes are crossed and ended
LETTERS = "ab ,.;:?!`\t\n\r'()-é犬ก　 C+🙂́"
words = st.text(LETTERS, max_size=12) | st.sampled_from(
    [
        "hot dog",
        "a",
        "ab",
        "abababab",
        "abababa",
        "ababababa",
        " a",
        "a ",
        "a  b",
        "\x00",
        "a\x00b",
        "犬a",
        "C++",
        "(a)",
    ]
)
entries_of = st.lists(words.filter(bool), min_size=1, max_size=25, unique=True)
texts_of = st.lists(st.lists(words, max_size=8).map(" ".join) | words, max_size=12)


def naive(entries, texts, languages):
    forms = [spaced_entry(e, languages=languages) for e in entries]
    return [(t, e) for t, text in enumerate(texts) for e, form in enumerate(forms) if form in spacing(text)]


@settings(max_examples=400)
@given(entries_of, texts_of, st.booleans())
def test_equals_the_written_out_rule(entries, texts, languages):
    found = Matcher(entries, languages=languages)(texts)
    assert list(zip(found.text_M.tolist(), found.entry_M.tolist(), strict=True)) == naive(
        entries, texts, languages
    )
    assert found.texts == len(texts)


@given(entries_of, texts_of.filter(bool), st.data())
def test_batches_and_slices_give_the_same(entries, texts, data):
    matcher, cut = Matcher(entries), data.draw(st.integers(0, len(texts)))
    whole = matcher(pa.array(texts, pa.string()))
    sliced = matcher(pa.array(["x", *texts], pa.large_string()).slice(1))
    chunked = matcher(pa.chunked_array([texts[:cut], texts[cut:]], pa.string()))
    for other in (sliced, chunked):
        np.testing.assert_array_equal(whole.text_M, other.text_M)
        np.testing.assert_array_equal(whole.entry_M, other.entry_M)


def test_texts_longer_than_a_work_slice(monkeypatch):
    monkeypatch.setattr(matching, "_SLICE_BYTES", 64)
    texts = ["a dog", "dog " * 100, "", "no", "a hot dog"]
    found = Matcher(["dog", "hot dog", "a"])(texts)
    assert found.pairs().tolist() == [[0, 0], [2, 0], [0, 1], [0, 4], [1, 4], [2, 4]]


def test_many_entries_collide_in_the_table_and_are_found():
    entries = [f"w{n % 500} x{n}" for n in range(20_000)]
    found = Matcher(entries)(entries)
    np.testing.assert_array_equal(found.entry_M, np.arange(20_000))
    np.testing.assert_array_equal(found.text_M, np.arange(20_000))


def test_as_lists():
    found = Matcher(["dog", "hot dog", "cat"])(["hot dog", "x", "cat, dog"])
    assert found.to_arrow().to_pylist() == [[0, 1], [], [0, 2]]
    assert found.to_arrow().type == pa.list_(pa.uint32())
    assert found.per_text().tolist() == [2, 0, 2]
    assert Matcher(["a"])([]).to_arrow().to_pylist() == []
    assert isinstance(found, Matches)


def test_a_second_list_is_not_the_first():
    """The authors' matcher caches the first list it is given."""
    assert len(Matcher(["dog"])(["dog cat"])) == 1
    assert len(Matcher(["dog", "cat"])(["dog cat"])) == 2


def test_scripts_without_spaces():
    assert [needs_no_space(c) for c in "犬กက(，aあ한é"] == [
        True,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert len(Matcher(["犬"], languages=True)(["黒犬が"])) == 1
    assert len(Matcher(["犬"])(["黒犬が"])) == 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "metadata is empty"),
        (["a", ""], "Entry 1 of the metadata is empty"),
        (["a", "b", "a"], "twice, first 'a'"),
        (["a", 3], "is a int"),
    ],
)
def test_bad_metadata(entries, message):
    with pytest.raises(UsageError, match=message):
        Matcher(entries)


def test_bad_texts():
    with pytest.raises(UsageError, match="without nulls, got 1 among 2"):
        Matcher(["a"])(pa.array(["a", None]))
    with pytest.raises(UsageError, match="as strings, got int64"):
        Matcher(["a"])(pa.array([1]))
