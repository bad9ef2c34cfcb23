"""Dumps and page views made on the spot, counted and compared with plain dictionaries."""

from __future__ import annotations

import bz2
import gzip
import itertools
import math
import random
from collections import Counter
from xml.sax.saxutils import escape

import pyarrow.parquet as pq
import pytest

from moviola.data import tally, wikipedia
from moviola.data.wikipedia import (
    UNREADABLE,
    WordCounts,
    count_views,
    count_words,
    find_files,
    greatest_pmi,
    pairs_by_pmi,
    read_dump,
)
from moviola.types import UsageError

NAMESPACES = '<namespace key="0" case="first-letter" /><namespace key="6">Datei</namespace>'


def dump_xml(pages, *, namespaces=NAMESPACES):
    """Pages as (title, namespace, markup, is a redirect)."""
    parts = [
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">',
        f"<siteinfo><sitename>Wikipedia</sitename><namespaces>{namespaces}</namespaces></siteinfo>",
    ]
    for title, space, markup, redirect in pages:
        parts.append(f"<page><title>{escape(title)}</title><ns>{space}</ns><id>1</id>")
        if redirect:
            parts.append('<redirect title="x" />')
        parts.append(
            f"<revision><id>2</id><text xml:space='preserve'>{escape(markup)}</text></revision></page>"
        )
    return "\n".join([*parts, "</mediawiki>\n"]).encode()


PAGES = [
    ("Dog", 0, "A '''hot dog''' is [[food]]. {{box|x}} [[Datei:A.png|no]]\n{|\n|no\n|}", False),
    ("Hund", 0, "#REDIRECT [[Dog]]", True),
    ("Talk:Dog", 1, "chatter", False),
    ("Cat", 0, "A cat &amp; a hot dog<ref>no</ref>.", False),
]


@pytest.fixture
def dump(tmp_path):
    path = tmp_path / "enwiki-pages-articles.xml.bz2"
    path.write_bytes(bz2.compress(dump_xml(PAGES)))
    return path


def rows(path):
    return dict(zip(*pq.read_table(path).to_pydict().values(), strict=True))


def test_articles_without_redirects_and_other_namespaces(dump):
    pages = list(read_dump(dump))
    assert [page.title for page, _ in pages] == ["Dog", "Cat"]
    assert "datei" in pages[0][1]
    assert pages[1][0].markup.startswith("A cat &amp; a hot")


@pytest.mark.parametrize("ending", [".xml", ".xml.gz", ".xml.bz2"])
def test_packings_and_several_streams(tmp_path, ending):
    data = dump_xml(PAGES)
    path = tmp_path / f"dump{ending}"
    pack = {".xml": bytes, ".xml.gz": gzip.compress, ".xml.bz2": bz2.compress}[ending]
    path.write_bytes(pack(data[:300]) + pack(data[300:]))
    assert len(list(read_dump(path))) == 2


def test_the_last_revision_counts(tmp_path):
    data = dump_xml([("A", 0, "old", False)]).replace(
        b"</page>", b"<revision><text>new</text></revision></page>"
    )
    path = tmp_path / "d.xml"
    path.write_bytes(data)
    assert [page.markup for page, _ in read_dump(path)] == ["new"]


def test_damage_is_told_with_the_file_and_what_was_read(tmp_path, dump):
    whole = dump.read_bytes()
    short = tmp_path / "short.xml.bz2"
    short.write_bytes(whole[:-20])
    with pytest.raises(UsageError, match=r"short\.xml\.bz2 cannot be unpacked.*Copy it again"):
        list(read_dump(short))
    cut = tmp_path / "cut.xml"
    cut.write_bytes(dump_xml(PAGES)[:-40])
    with pytest.raises(UsageError, match=r"cut\.xml is damaged or cut short.*after [34] pages"):
        list(read_dump(cut))
    other = tmp_path / "other.xml"
    other.write_text("no xml at all")
    with pytest.raises(UsageError, match="is no XML"):
        list(read_dump(other))
    other.write_text("<feed><doc>x</doc></feed>")
    with pytest.raises(UsageError, match="holds no page"):
        list(read_dump(other))
    with pytest.raises(UsageError, match="does not exist"):
        list(read_dump(tmp_path / "none.xml"))


def test_counts_of_words_and_pairs(dump, tmp_path):
    told = []
    counts = count_words([dump], tmp_path / "work", on_progress=lambda *a: told.append(a))
    assert rows(counts.unigrams) == {"A": 2, "hot": 2, "dog": 2, "is": 1, "food": 1, "cat": 1, "a": 1}
    assert rows(counts.bigrams) == {
        "A hot": 1,
        "hot dog": 2,
        "dog is": 1,
        "is food": 1,
        "A cat": 1,
        "a hot": 1,
    }
    assert counts.total() == 10
    assert told[-1] == (pytest.approx(dump.stat().st_size / 1e6), told[-1][1], dump.name)
    assert told[-1][0] == told[-1][1]
    assert sorted(p.suffix for p in (tmp_path / "work").iterdir()) == [".parquet", ".parquet"]


def test_a_finished_dump_is_not_read_again_and_a_changed_one_is(dump, tmp_path, monkeypatch):
    work = tmp_path / "work"
    first = count_words([dump], work)
    with monkeypatch.context() as patch:
        patch.setattr(wikipedia, "read_dump", None)  # calling it would fail
        assert count_words([dump], work) == first
    other = count_words([dump], work, keep="'")
    assert other != first
    dump.write_bytes(bz2.compress(dump_xml([("A", 0, "new words", False)])))
    assert rows(count_words([dump], work).unigrams) == {"new": 1, "words": 1}


def test_a_run_that_was_killed_goes_on_without_double_counts(dump, tmp_path, monkeypatch):
    second = tmp_path / "second.xml"
    second.write_bytes(dump_xml([("B", 0, "hot soup", False)]))
    clean = count_words([dump, second], tmp_path / "clean")
    read = wikipedia.read_dump

    def dies(path, **options):
        for page in read(path, **options):
            yield page
            if path == second:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wikipedia, "read_dump", dies)
        with pytest.raises(KeyboardInterrupt):
            count_words([dump, second], tmp_path / "work")
    counts = count_words([dump, second], tmp_path / "work")
    assert rows(counts.unigrams)["hot"] == 3
    assert counts.unigrams.read_bytes() == clean.unigrams.read_bytes()
    assert counts.bigrams.read_bytes() == clean.bigrams.read_bytes()


def test_words_can_be_cut_by_a_function_of_ones_own(dump, tmp_path):
    counts = count_words([dump], tmp_path / "work", words=lambda text: iter([text.lower().split()]))
    assert rows(counts.unigrams)["dog"] == 1
    assert rows(counts.unigrams)["dog."] == 1


@pytest.mark.parametrize("least", [-5.0, 0.0, 3.0, 6.5])
def test_pmi_equals_the_formula_over_dictionaries(tmp_path, monkeypatch, least):
    monkeypatch.setattr(tally, "BLOCK", 7)
    draw = random.Random(3)
    runs = [[f"w{int(draw.paretovariate(0.7)) % 60}" for _ in range(draw.randint(1, 9))] for _ in range(80)]
    path = tmp_path / "d.xml"
    path.write_bytes(dump_xml([("A", 0, "\n".join(" ".join(run) for run in runs), False)]))
    counts = count_words([path], tmp_path / "work")
    words = Counter(itertools.chain.from_iterable(runs))
    pairs = Counter(pair for run in runs for pair in itertools.pairwise(run))
    total = sum(words.values())
    expected = {
        f"{x} {y}": score
        for (x, y), n in pairs.items()
        if (score := math.log2(n * total) - math.log2(words[x] * words[y])) >= least
    }
    table = pairs_by_pmi(counts, tmp_path / "work", least=least)
    found = dict(zip(table["value"].to_pylist(), table["score"].to_pylist(), strict=True))
    assert found == pytest.approx(expected)
    assert list(found) == sorted(found, key=lambda pair: (-found[pair], pair))
    assert dict(zip(table["value"].to_pylist(), table["count"].to_pylist(), strict=True)) == {
        pair: pairs[tuple(pair.split())] for pair in expected
    }


def test_a_pair_on_the_threshold_is_kept(tmp_path):
    # 2**10 words in all, a pair of two words that come once each: exactly 10 bits
    table = {"value": ["a", "b", "the"], "count": [1, 1, 1022]}
    pairs = {"value": ["a b", "b the", "the the"], "count": [1, 1, 1020]}
    counts = WordCounts(tmp_path / "u.parquet", tmp_path / "b.parquet")
    for path, data in ((counts.unigrams, table), (counts.bigrams, pairs)):
        tally.write_tables([tally.pa.table(data)], path, ("count",))
    assert greatest_pmi(counts.total()) == 10.0
    found = pairs_by_pmi(counts, tmp_path, least=10.0)
    assert found.to_pydict() == {"value": ["a b"], "count": [1], "score": [10.0]}
    assert pairs_by_pmi(counts, tmp_path, least=10.1).num_rows == 0


def write_views(path, lines):
    data = b"".join(
        line if isinstance(line, bytes) else line.encode()
        for line in (f"{x}\n" if isinstance(x, str) else x for x in lines)
    )
    path.write_bytes(gzip.compress(data))
    return path


def test_views_by_title(tmp_path):
    one = write_views(
        tmp_path / "pageviews-20200101-000000.gz",
        [
            "en Hot_dog 60 0",
            "en Cold 49 0",
            "en Talk:Dog 900 0",
            "en.m Hot_dog 100 0",
            "en.b Book 100 0",
            "de Hund 100 0",
            "en Café_au_lait 50 0",
            "en broken line 3 0 0",
            "en Dog many 0",
            b"en \xff\xfe 99 0\n",
        ],
    )
    two = write_views(tmp_path / "pageviews-20200101-010000.gz", ["en Hot_dog 70 0", "en Cold 49 0"])
    found = rows(count_views([one, two], tmp_path / "work"))
    assert found == {UNREADABLE: 3, "Café au lait": 50, "Hot dog": 130}
    mobile = rows(count_views([one, two], tmp_path / "work", mobile=True, hourly=1))
    assert mobile == {UNREADABLE: 3, "Café au lait": 50, "Cold": 98, "Hot dog": 230}
    assert rows(count_views([one], tmp_path / "work", language="de")) == {"Hund": 100}


def test_many_view_files_are_merged_in_runs(tmp_path):
    files = [
        write_views(tmp_path / f"pageviews-{n:03d}.gz", ["en A 50 0", f"en T{n} 60 0"]) for n in range(70)
    ]
    found = rows(count_views(files, tmp_path / "work"))
    assert found == {"A": 3500, **{f"T{n}": 60 for n in range(70)}}


def test_broken_views_name_the_file(tmp_path):
    path = write_views(tmp_path / "v.gz", ["en A 50 0"] * 5000)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UsageError, match=r"v\.gz cannot be unpacked"):
        count_views([path], tmp_path / "work")
    path.write_bytes(b"no gzip")
    with pytest.raises(UsageError, match=r"v\.gz cannot be unpacked"):
        count_views([path], tmp_path / "work")


def test_files_are_found_once_in_order(tmp_path):
    for name in ("b.gz", "a.gz", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_files([tmp_path, tmp_path / "a.gz", tmp_path / "*.txt"], "views", (".gz",))
    assert [path.name for path in found] == ["a.gz", "b.gz", "c.txt"]
    with pytest.raises(UsageError, match="gives no views"):
        find_files([tmp_path / "nothing"], "views", (".gz",))
