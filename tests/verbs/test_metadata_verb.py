"""Building a list from made sources, and checking lists."""

from __future__ import annotations

import bz2
import gzip
import json
from xml.sax.saxutils import escape

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from moviola.cli.metadata import metadata_app
from moviola.data.metadata import MetadataRules, read_metadata
from moviola.types import UsageError
from moviola.verbs.metadata import build, check

TEXT = "big dog. " * 40 + "ice cream. " * 3 + "dog runs. " * 60 + "rare pair. "
RULES = MetadataRules.of("en", unigram_count=3, bigram_pmi=5.0)


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    (folder / "wordnet").mkdir(parents=True)
    nouns = "00000001 03 n 01 dog 0 000 | x  \n00000002 03 n 01 hot_dog 0 000 | x  \n"
    for part in ("noun", "verb", "adj", "adv"):
        lines = nouns if part == "noun" else "00000001 03 v 01 42 0 000 | x  \n"
        (folder / "wordnet" / f"data.{part}").write_text("  licence\n" + lines)
    page = f"<page><title>A</title><ns>0</ns><revision><text>{escape(TEXT)}</text></revision></page>"
    (folder / "wiki.xml.bz2").write_bytes(bz2.compress(f"<mediawiki>{page}</mediawiki>".encode()))
    views = "en Hot_dog 70 0\nen St._Louis 90 0\nen Less 69 0\nen , 500 0\nen bad\nde Hund 80 0\n"
    (folder / "pageviews-1.gz").write_bytes(gzip.compress(views.encode()))
    return {
        "wordnet": folder / "wordnet",
        "dumps": [folder / "wiki.xml.bz2"],
        "views": [folder / "pageviews-1.gz"],
    }


def test_every_source_in_the_papers_order(sources, tmp_path):
    to = tmp_path / "m.parquet"
    report = build(to, **sources, rules=RULES)
    numbers = tuple(map(str, range(100)))
    # N = 208 words; "ice cream" and "rare pair" come only together
    assert read_metadata(to).entries == (
        *numbers,
        "dog",
        "hot dog",
        *("runs", "big", "cream", "ice"),
        *("rare pair", "ice cream"),
        *("St. Louis", "Hot dog"),
    )
    assert {s.name: (s.candidates, s.added) for s in report.sources} == {
        "numbers": (100, 100),
        "wordnet": (3, 2),
        "unigrams": (5, 4),
        "bigrams": (2, 2),
        "titles": (3, 2),
    }
    assert report.sources[-1].left_out == {"only punctuation": 1}
    assert "1 lines of page views could not be read." in report.notes
    table = pq.read_table(to).to_pylist()
    assert table[-1] == {"entry": "Hot dog", "source": "titles", "score": 70.0}
    assert json.loads(pq.read_schema(to).metadata[b"moviola"])["rules"]["bigram_pmi"] == 5.0
    assert report.hash == read_metadata(to).hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.parquet", "sources"]


def test_the_same_bytes_whatever_the_memory_and_the_work_folder(sources, tmp_path):
    build(tmp_path / "a.txt", **sources, rules=RULES)
    build(tmp_path / "b.txt", **sources, rules=RULES, memory=16 << 20, work=tmp_path / "work")
    build(tmp_path / "c.txt", **sources, rules=RULES, work=tmp_path / "work")
    a, b, c = ((tmp_path / f"{name}.txt").read_bytes() for name in "abc")
    assert a == b == c
    assert len(list((tmp_path / "work").iterdir())) == 3


def test_a_pair_that_no_dump_of_this_size_can_hold_is_said(sources, tmp_path):
    report = build(tmp_path / "m.txt", wordnet=sources["wordnet"], dumps=sources["dumps"])
    assert any("lower --bigram-pmi" in note and "208 words" in note for note in report.notes)


def test_another_language_follows_the_second_paper(sources, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Hund\n。。\n")
    report = build(tmp_path / "de.json", language="de", words=own, views=sources["views"])
    assert [s.added for s in report.sources] == [100, 1, 0]
    assert report.sources[1].left_out == {"only punctuation": 1}
    with pytest.raises(UsageError, match="--words FILE"):
        build(tmp_path / "x.json", language="de", wordnet=sources["wordnet"])


def test_pairs_of_a_language_without_spaces_are_joined(tmp_path):
    page = "<page><title>A</title><ns>0</ns><revision><text>北京 北京 東</text></revision></page>"
    (tmp_path / "w.xml").write_text(f"<mediawiki>{page}</mediawiki>", encoding="utf-8")
    rules = MetadataRules.of("zh", bigram_pmi=1.0, unigram_share=1.0)
    build(tmp_path / "zh.txt", language="zh", dumps=[tmp_path / "w.xml"], rules=rules)
    assert read_metadata(tmp_path / "zh.txt").entries[100:] == ("京", "北", "東", "京東", "北京")


def test_limits_leave_the_most_frequent_new_entries(sources, tmp_path):
    rules = MetadataRules.of("en", numbers=0, unigram_count=1, unigrams=2, bigram_pmi=99, titles=1, most=5)
    build(tmp_path / "m.txt", **sources, rules=rules, matchable=True)
    assert read_metadata(tmp_path / "m.txt").entries == ("42", "dog", "hot dog", "runs", "big")


def test_unmatchable_titles_can_be_left_out(sources, tmp_path):
    report = build(tmp_path / "m.txt", views=sources["views"], matchable=True)
    assert read_metadata(tmp_path / "m.txt").entries[100:] == ("Hot dog",)
    assert report.sources[-1].left_out == {"no text can hold it": 1, "only punctuation": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no source to build from"),
        ({"dumps": ["none.xml"]}, "gives no Wikipedia dump"),
        ({"wordnet": "none"}, "data.noun does not exist"),
        ({"words": "none.txt"}, "does not exist"),
        ({"wordnet": "x", "memory": 1}, "at least 16 MB"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        build(tmp_path / "m.txt", **options)
    assert not (tmp_path / "m.txt").exists()


def test_zero_entries_and_a_list_that_exists_are_errors(sources, tmp_path):
    with pytest.raises(UsageError, match=r"(?s)No source gave an entry.*titles: 0 candidates"):
        build(tmp_path / "m.txt", views=sources["views"], rules=MetadataRules.of("en", title_views=1000))
    with pytest.raises(UsageError, match=r"wordnet: 3 candidates, 1 already there, 2 over the limit"):
        build(tmp_path / "m.txt", wordnet=sources["wordnet"], rules=MetadataRules.of("en", most=100))
    (tmp_path / "m.txt").write_text("mine\n")
    with pytest.raises(UsageError, match="--overwrite"):
        build(tmp_path / "m.txt", wordnet=sources["wordnet"])
    build(tmp_path / "m.txt", wordnet=sources["wordnet"], overwrite=True)
    assert len(read_metadata(tmp_path / "m.txt")) == 102
    with pytest.raises(UsageError, match="names no format"):
        build(tmp_path / "m.csv", wordnet=sources["wordnet"])


def test_check_tells_errors_from_warnings(tmp_path):
    path = tmp_path / "m.txt"
    path.write_text("dog\nSt. Louis\n", encoding="utf-8")
    report = check(path)
    assert report.ok
    assert not check(path, strict=True).ok
    assert "St. Louis" in str(report)
    assert report.lists[0].hash == read_metadata(path).hash
    path.write_bytes(b"dog\n\ndog\n\xff\n" + b"a.b\n" * 1 + b"x.y\n" * 1)
    report = check(path, shown=1)
    assert not report.ok
    assert report.lists[0].kinds == {"empty": 1, "duplicate": 1, "no text": 1, "unmatchable": 2}
    assert "and 1 more" in str(report)
    assert report.lists[0].hash is None


def test_check_of_a_folder_matches_as_for_several_languages(tmp_path):
    (tmp_path / "en.txt").write_text("dog,\n")
    (tmp_path / "zh.json").write_text('["北京 ,"]', encoding="utf-8")
    assert [one.language for one in check(tmp_path).lists] == ["en", "zh"]
    assert check(tmp_path).lists[0].kinds == {"unmatchable": 1}
    assert check(tmp_path).lists[1].kinds == {}
    assert str(check(tmp_path / "zh.json", languages=True)).endswith("No problem.")
    with pytest.raises(UsageError, match="does not exist"):
        check(tmp_path / "none.txt")


def test_commands(sources, tmp_path):
    run = CliRunner().invoke
    to = tmp_path / "m.txt"
    named = ["--to", to, "--wordnet", sources["wordnet"], "--dump", *sources["dumps"]]
    options = ["--views", *sources["views"], "--unigram-count", 3, "--bigram-pmi", 5, "--json"]
    made = run(metadata_app, ["build", *map(str, named), *map(str, options)])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["entries"] == len(read_metadata(to)) == 110
    assert run(metadata_app, ["check", str(to)]).exit_code == 0
    assert run(metadata_app, ["check", str(to), "--strict"]).exit_code == 1
    told = json.loads(run(metadata_app, ["check", str(to), "--json"]).stdout)
    assert told["lists"][0]["problems"][0]["entry"] == "St. Louis"
    assert told["ok"] is True
    assert "(default 30)" in run(metadata_app, ["build", "--help"], env={"COLUMNS": "200"}).stdout
