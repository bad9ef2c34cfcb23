"""Metadata lists: reading, writing, checking, and what can match at all."""

from __future__ import annotations

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moviola.data.matching import needs_no_space
from moviola.data.metadata import (
    Assembly,
    Metadata,
    MetadataRules,
    entries_hash,
    raw_entries,
    read_languages,
    read_metadata,
    write_metadata,
)
from moviola.data.metadata_check import find_problems, why_unmatchable, witness
from moviola.types import UsageError

ENTRIES = ("dog", "hot dog", "Ελλάδα", "北京", " x", "a,b")

# -------------------------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("ending", [".txt", ".json", ".parquet"])
def test_what_is_written_is_read_with_the_same_hash(tmp_path, ending):
    path = tmp_path / f"m{ending}"
    write_metadata(ENTRIES, path, sources=["words"] * 6, scores=[1.0, None] * 3, made={"a": 1})
    found = read_metadata(path)
    assert found.entries == ENTRIES
    assert found.hash == entries_hash(ENTRIES) == Metadata(ENTRIES).hash
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_hash_is_of_entries_and_order():
    assert (
        len({entries_hash(e) for e in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""])}) == 5
    )


def test_a_parquet_file_tells_where_entries_are_from(tmp_path):
    write_metadata(["a"], tmp_path / "m.parquet", sources=["titles"], scores=[7.0], made={"language": "en"})
    table = pq.read_table(tmp_path / "m.parquet")
    assert table.to_pylist() == [{"entry": "a", "source": "titles", "score": 7.0}]
    assert json.loads(table.schema.metadata[b"moviola"]) == {"language": "en"}


def test_lines_and_packings(tmp_path):
    data = "\ufeffone\r\ntwo words\n\n three".encode()
    for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.bz2", bz2.compress)):
        (tmp_path / name).write_bytes(pack(data))
        assert read_metadata(tmp_path / name).entries == ("one", "two words", "", " three")


def test_the_keys_of_a_json_object_are_entries_and_doubles_show(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"dog": "w", "cat": "u", "dog": "t"}')
    assert read_metadata(path).entries == ("dog", "cat", "dog")


def test_parquet_columns(tmp_path):
    path = tmp_path / "m.parquet"
    table = pa.table({"n": [1, 2], "text": pa.array(["a", "b"], pa.large_string()), "other": ["c", "d"]})
    pq.write_table(table.append_column("code", pa.array(["e", "f"]).dictionary_encode()), path)
    assert read_metadata(path).entries == ("a", "b")
    assert read_metadata(path, column="other").entries == ("c", "d")
    assert read_metadata(path, column="code").entries == ("e", "f")
    with pytest.raises(UsageError, match=r"column none is not there\. It has: n .int64., text"):
        read_metadata(path, column="none")
    with pytest.raises(UsageError, match="column n is no column of strings"):
        read_metadata(path, column="n")
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), path)
    with pytest.raises(UsageError, match="--column"):
        read_metadata(path)
    pq.write_table(pa.table({"whatever": ["x"], "n": [1]}), path)
    assert read_metadata(path).entries == ("x",)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.txt", b"dog\n\xff\xfe\xfd\n", "entry 1 is not UTF-8.*metadata check"),
        ("m.txt", "dog".encode("utf-16"), "is UTF-16"),
        ("m.txt", b"", "holds no entry"),
        ("m.json", b"[]", "holds no entry"),
        ("m.json", b'["a", 3]', "entry 1 is a int"),
        ("m.json", b'["a", null]', "entry 1 is null"),
        ("m.json", b'["\\ud800"]', "half a surrogate"),
        ("m.json", b'"dog"', "JSON str, expected a list"),
        ("m.json", b"[1", "is no JSON"),
        ("m.json", b"\xff", "is not UTF-8|UTF-16"),
        ("m.parquet", b"PAR1", "no readable Parquet"),
        ("m.txt.gz", b"dog", "cannot be unpacked"),
        ("m.csv", b"dog", "no metadata by its name"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_metadata(tmp_path / name)


def test_missing_files_and_columns_of_text(tmp_path):
    for name in ("m.txt", "m.json", "m.parquet"):
        with pytest.raises(UsageError, match="does not exist"):
            read_metadata(tmp_path / name)
    with pytest.raises(UsageError, match="has no columns"):
        read_metadata(tmp_path / "m.txt", column="a")


def test_a_line_end_cannot_go_into_lines(tmp_path):
    with pytest.raises(UsageError, match=r"Write \.json or \.parquet"):
        write_metadata(["a\nb"], tmp_path / "m.txt")
    write_metadata(["a\nb"], tmp_path / "m.json")
    assert read_metadata(tmp_path / "m.json").entries == ("a\nb",)
    with pytest.raises(UsageError, match="names no format"):
        write_metadata(["a"], tmp_path / "m.csv")


def test_a_folder_with_one_list_per_language(tmp_path):
    (tmp_path / "en.txt").write_text("dog\n")
    (tmp_path / "zh.json").write_text('["北京"]')
    (tmp_path / "README.md").write_text("not a list")
    found = read_languages(tmp_path)
    assert {k: (v.entries, v.language) for k, v in found.items()} == {
        "en": (("dog",), "en"),
        "zh": (("北京",), "zh"),
    }
    (tmp_path / "en.json").write_text('["cat"]')
    with pytest.raises(UsageError, match="two lists for en"):
        read_languages(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no metadata"):
        read_languages(tmp_path / "empty")


# ------------------------------------------------------------------------------------- what can match

MARKS = ",.;:?!`"
ALPHABET = "ab  " + MARKS + "\t\n\r(-北ไ。か"
entries = st.text(st.sampled_from(ALPHABET), min_size=1, max_size=7)


def naive(entry, text, languages):
    """The rule as the card words it, character by character."""
    spaced = "".join(f" {c} " if c in MARKS else " " if c in "\t\n\r" else c for c in text)
    before = "" if languages and needs_no_space(entry[0]) else " "
    after = "" if languages and needs_no_space(entry[-1]) else " "
    return f"{before}{entry}{after}" in f" {spaced} "


@settings(max_examples=500, deadline=None)
@given(entry=entries, languages=st.booleans())
@example(entry=":  -", languages=False)
@example(entry=",", languages=False)
@example(entry=",", languages=True)
@example(entry=", ,", languages=True)
@example(entry=",  ,", languages=True)
@example(entry="dog , cat", languages=False)
@example(entry="北 ,", languages=True)
def test_what_is_said_to_match_has_a_text_that_holds_it(entry, languages):
    text = witness(entry, languages=languages)
    assert (text is None) == (why_unmatchable(entry, languages=languages) is not None)
    if text is not None:
        assert naive(entry, text, languages)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), languages=st.booleans())
def test_whatever_stands_in_a_text_is_said_to_match(data, languages):
    """Cut entries out of real spaced texts: none may be declared unmatchable."""
    text = data.draw(st.text(st.sampled_from(ALPHABET), max_size=9))
    spaced = "".join(f" {c} " if c in MARKS else " " if c in "\t\n\r" else c for c in text)
    form = f" {spaced} "
    start = data.draw(st.integers(0, len(form) - 1))
    end = data.draw(st.integers(start + 1, len(form)))
    for entry in {form[start:end], form[start:end].removeprefix(" ").removesuffix(" ")} - {""}:
        if naive(entry, text, languages):
            assert why_unmatchable(entry, languages=languages) is None


@pytest.mark.parametrize("languages", [False, True])
def test_every_short_entry_against_every_short_text(languages):
    """Exhaustive: over all texts up to 5 characters, exactly those with a witness are ever found."""
    import itertools

    letters = "a, \n" if not languages else "a,北\n "
    texts = ["".join(t) for n in range(5) for t in itertools.product(letters, repeat=n)]
    for n in (1, 2, 3):
        for entry in map("".join, itertools.product(letters, repeat=n)):
            found = any(naive(entry, text, languages) for text in texts)
            assert found == (why_unmatchable(entry, languages=languages) is None), (entry, languages)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("St. Louis", "'.' touches 't'"),
        ("5.5", "'.' touches '5'"),
        ("a\tb", "becomes a space"),
        ("a , . b", "share a space"),
        ("\ud800", "surrogate"),
        ("dog , cat", None),
        ("a ,  . b", None),
        (",", None),
        ("rock 'n' roll", None),
    ],
)
def test_reasons(entry, why):
    found = why_unmatchable(entry)
    assert (found is None) if why is None else (found is not None and why in found)


# ------------------------------------------------------------------------------------------- problems


def test_every_problem_is_named_with_its_reason():
    listed = [
        "dog",
        "",
        "dog",
        b"\xff",
        None,
        3,
        "a.b",
        " cat",
        "caf\u0065\u0301",
        "cafÃ©",
        "x\ufffd",
        "a\u00a0",
        "é",
    ]
    found = [(p.number, p.kind) for p in find_problems(listed)]
    assert found == [
        (1, "empty"),
        (2, "duplicate"),
        (3, "no text"),
        (4, "no text"),
        (5, "no text"),
        (6, "unmatchable"),
        (7, "blanks"),
        (8, "not normalised"),
        (9, "garbled"),
        (10, "garbled"),
        (11, "blanks"),
    ]
    reasons = {p.number: p.why for p in find_problems(listed)}
    assert reasons[2] == "it is the same as entry 0"
    assert "'café'" in reasons[9]


def test_raw_entries_keep_what_is_not_utf8(tmp_path):
    (tmp_path / "m.txt").write_bytes(b"ok\nb\xffd\n")
    assert list(raw_entries(tmp_path / "m.txt")) == ["ok", b"b\xffd"]


# -------------------------------------------------------------------------------------------- assembly


def test_each_entry_belongs_to_the_first_source_that_has_it():
    made = Assembly(MetadataRules())
    made.add("words", [("dog", None), ("", None), (",", None), ("...", None), ("dog", None)])
    report = made.add("titles", [("dog", 9.0), ("cat", 8.0), ("hen", 7.0), ("cow", 6.0)], most=2)
    assert list(made.entries) == ["dog", "...", "cat", "hen"]
    assert made.entries["cat"] == ("titles", 8.0)
    assert made.reports[0].left_out == {"empty": 1, "only punctuation": 1, "already there": 1}
    assert (report.candidates, report.added) == (4, 2)
    assert report.left_out == {"already there": 1, "over the limit": 1}


def test_limits_of_the_whole_list_and_of_an_entry():
    made = Assembly(MetadataRules(most=2, longest=3, all_marks=True), matchable=True)
    made.add("words", [(e, None) for e in ("long one", "...", "a.b", "a", "b", "c")])
    assert list(made.entries) == ["a", "b"]
    assert made.full
    assert made.reports[0].left_out == {
        "over 3 characters": 1,
        "only punctuation": 1,
        "no text can hold it": 1,
        "over the limit": 1,
    }


def test_rules_of_the_papers():
    english, german = MetadataRules.of("en"), MetadataRules.of("de", titles=5)
    assert (english.unigram_count, english.bigram_pmi, english.title_views, english.title_hourly) == (
        100,
        30,
        70,
        50,
    )
    assert (english.most, english.mobile) == (500_000, False)
    assert (german.unigram_share, german.unigrams, german.bigrams, german.titles) == (
        0.1,
        251_465,
        100_646,
        5,
    )
    assert (german.most, german.longest, german.mobile) == (None, 256, True)
    for bad in ({"unigram_share": 1.5}, {"numbers": -1}, {"bigram_pmi": float("nan")}):
        with pytest.raises(UsageError):
            MetadataRules.of("en", **bad)
