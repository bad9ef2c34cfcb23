"""The report of a curation run: what it counts, what it names, how short it stays, what it escapes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from moviola.systems.curation.metaclip import probabilities, tail_share
from moviola.verbs.curate_page import shown_text
from moviola.verbs.curate_report import build_report, report_lines, report_page
from moviola.verbs.curate_stages import NO_ENTRY, NO_LIST

CONFIG = {"threshold": 20.0, "tail_share": None, "texts": "one", "languages": False, "seed": 7}


def zipf(entries, largest, *, never=0):
    ranks = np.arange(1, entries - never + 1)
    return np.concatenate([np.maximum(1, largest // ranks), np.zeros(never)]).astype(np.int64)


def table(lists, limits=None):
    """Counts by language; with limits also probabilities and what a binomial draw keeps."""
    names = [name for name, (entries, _) in lists.items() for _ in entries]
    made = {
        "language": names,
        "entry": [entry for entries, _ in lists.values() for entry in entries],
        "count": np.concatenate([count for _, count in lists.values()]),
    }
    if limits is not None:
        prob_E = np.concatenate([probabilities(c, limits[name]) for name, (_, c) in lists.items()])
        made["probability"] = prob_E
        made["kept"] = np.random.default_rng(0).binomial(made["count"], prob_E)
    return pa.table(made)


def piece(**changes):
    return {
        "columns": {"texts": ("caption",), "id": "url", "language": None},
        "rows": 100,
        "texts": 90,
        "matched_texts": 70,
        "matched_rows": 70,
        "rows_with_text": 90,
        "most_texts": 1,
        "without_id": 0,
        "problems": {"text is null": 6, "row is not JSON": 4, NO_ENTRY: 20},
        "examples": [],
        "unmatched": [],
        **changes,
    }


def report_of(columns, summaries=None, *, limits=None, **changes):
    return build_report(
        columns,
        **{
            "config": CONFIG,
            "metadata": "words.txt",
            "hashes": {"": "abc123"},
            "files": 2,
            "summaries": [piece(), piece()] if summaries is None else summaries,
            "duplicates": 10,
            "thresholds": limits,
            "kept": None if limits is None else {"texts": 50, "rows": 50, "expected": 51.5, "bytes": 1 << 20},
            "counts_given": False,
            "failed": [],
            "engine": "local",
            "seconds": 12.3,
            **changes,
        },
    )


def words(many, start=""):
    return [f"{start}word {n}" for n in range(many)]


@pytest.fixture
def single():
    return table({"": (words(1000), zipf(1000, 5000, never=100))}, {"": 20.0})


def lost(funnel):
    """The steps' sizes as their losses make them."""
    left = funnel["steps"][0]["left"]
    for step in funnel["steps"][1:]:
        left -= sum(step["lost"].values())
        yield left, step["left"]


class Reader(HTMLParser):
    """Collects what a browser would see, and what it would load."""

    def __init__(self, page):
        super().__init__()
        self.seen, self.tags, self.attributes = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.seen.append(data)


# ------------------------------------------------------------------------------------------- figures


def test_a_report_is_plain_json_and_the_page_reads_it_back(single):
    made = report_of(single, limits={"": 20.0})
    text = json.dumps(made, allow_nan=False)
    assert report_page(json.loads(text)) == report_page(made)
    assert made["seed"] == 7
    assert made["metadata"] == {"name": "words.txt", "hashes": {"": "abc123"}}
    assert {"moviola", "pyarrow", "numpy"} <= set(made["versions"])
    assert (made["engine"], made["seconds"]) == ("local", 12.3)


def test_figures_of_the_head_and_the_tail_are_those_of_the_method(single):
    total = report_of(single, limits={"": 20.0})["total"]
    count_E, kept_E = single["count"].to_numpy(), single["kept"].to_numpy()
    assert total["matches"] == count_E.sum()
    assert total["matched"] == 900
    assert total["head_entries"] == (count_E > 20).sum()
    assert total["tail_share"] == pytest.approx(tail_share(count_E, 20), rel=1e-5)
    assert total["head_share"] == pytest.approx(count_E[count_E > 20].sum() / count_E.sum(), rel=1e-5)
    assert total["kept_head_share"] == pytest.approx(kept_E[count_E > 20].sum() / kept_E.sum(), rel=1e-5)
    assert total["kept_entries"] == (kept_E > 0).sum()


def test_entries_that_make_half_of_the_matches():
    columns = table({"": (words(5), np.array([1, 50, 39, 10, 0]))})
    total = report_of(columns)["total"]
    assert total["covering"] == {"50": 1, "90": 3, "99": 3}  # 50, 89, 99, 100
    one = report_of(table({"": (["a"], np.array([3]))}))["total"]
    assert one["covering"] == {"50": 1, "90": 1, "99": 1}


def test_curves_follow_the_sorted_counts_and_stay_short(single):
    made = report_of(single, limits={"": 20.0})
    (block,) = made["languages"]
    for curve, name in ((block["before"], "count"), (block["after"], "kept")):
        falling = np.sort(single[name].to_numpy())[::-1]
        falling = falling[falling > 0]
        assert len(curve["rank"]) <= 200
        assert curve["rank"][0] == 1
        assert curve["rank"][-1] == len(falling)
        places = np.array(curve["rank"]) - 1
        assert curve["many"] == falling[places].tolist()
        assert curve["share"] == pytest.approx(np.cumsum(falling)[places] / falling.sum(), rel=1e-3)


def test_a_million_entries_make_no_longer_report():
    sizes = []
    for entries in (10_000, 1_000_000):
        columns = table({"": (list(map(str, range(entries))), zipf(entries, 10**7, never=entries // 3))})
        sizes.append(len(json.dumps(report_of(columns))))
    assert sizes[1] < 1.3 * sizes[0] < 40_000


def test_with_many_languages_a_curve_has_fewer_points():
    lists = {f"l{n}": (words(3000), zipf(3000, 9000)) for n in range(100)}
    made = report_of(table(lists))
    assert {len(block["before"]["rank"]) for block in made["languages"]} < set(range(30, 41))
    assert len(json.dumps(made)) < 500_000


def test_largest_tail_and_never_matched_entries_by_name(single):
    (block,) = report_of(single, limits={"": 20.0})["languages"]
    assert [one["entry"] for one in block["largest"]] == words(25)
    first = block["largest"][0]
    assert first == {
        "entry": "word 0",
        "count": 5000,
        "probability": 0.004,
        "kept": single["kept"][0].as_py(),
    }
    assert all(0 < one["count"] < 20 and one["probability"] == 1 for one in block["tail"])
    assert block["tail"][-1]["entry"] == "word 899"  # the last that matched
    assert block["never"][0] == "word 900"
    assert block["never"][-1] == "word 999"
    assert len(block["never"]) == len(set(block["never"])) == 40


# -------------------------------------------------------------------------------------------- funnel


def test_rows_of_one_text_are_accounted_for_in_rows(single):
    made = report_of(single, limits={"": 20.0})
    funnel = made["funnel"]
    assert funnel["unit"] == "rows"
    assert [step["left"] for step in funnel["steps"]] == [200, 180, 140, 130, 50]
    assert funnel["steps"][1]["lost"] == {"text is null": 12, "row is not JSON": 8}
    assert funnel["steps"][2]["lost"] == {NO_ENTRY: 40}
    assert all(a == b for a, b in lost(funnel))


@pytest.mark.parametrize(
    ("texts", "candidates", "reason"),
    [
        ("one", 60, "another text of the row was chosen"),
        ("one", None, "another text of the row was chosen, or not drawn"),
        ("all", 130, "not drawn"),
    ],
)
def test_rows_of_several_texts_are_accounted_for_in_texts(single, texts, candidates, reason):
    several = piece(rows=50, rows_with_text=48, matched_rows=40, most_texts=3)
    made = report_of(
        single,
        [several, several],
        limits={"": 20.0},
        config={**CONFIG, "texts": texts},
        candidates=candidates,
    )
    assert made["funnel"]["unit"] == "texts"
    assert made["funnel"]["steps"][0]["left"] == 2 * (90 + 10)
    assert made["funnel"]["steps"][-1]["left"] == 50
    assert any(reason in step["lost"] for step in made["funnel"]["steps"])
    assert all(a == b for a, b in lost(made["funnel"]))
    assert "Rows with several texts are counted by text" in report_page(made)


def test_an_unused_text_column_does_not_lose_rows(single):
    """Two text columns of which one is null: a problem, but each row has its text."""
    odd = piece(rows=90, problems={"text is null": 90, NO_ENTRY: 20}, most_texts=1)
    made = report_of(single, [odd], limits={"": 20.0})
    assert made["funnel"]["unit"] == "texts"
    assert all(a == b for a, b in lost(made["funnel"]))


def test_the_first_pass_alone_has_no_draw():
    made = report_of(table({"": (words(50), zipf(50, 300))}))
    assert made["made"] == "counts"
    assert made["kept"] is None
    assert "threshold" in made["languages"][0]
    assert made["languages"][0]["after"] is None
    assert [step["step"] for step in made["funnel"]["steps"]][-1] == "have an id of their own"
    assert all(a == b for a, b in lost(made["funnel"]))
    page = report_page(made)
    assert "Counted pool" in page
    assert 'class="after"' not in page
    assert not any("stay" in line for line in report_lines(made))


# ----------------------------------------------------------------------------------------- languages


def test_languages_each_have_their_threshold_and_an_infinite_one_becomes_null():
    limits = {"de": 5.0, "en": 20.0, "sw": np.inf}
    lists = {
        "de": (words(40, "das "), zipf(40, 60)),
        "en": (words(100, "the "), zipf(100, 4000)),
        "sw": (words(10, "neno "), np.zeros(10, np.int64)),
    }
    made = report_of(table(lists, limits), limits=limits, hashes={name: name * 8 for name in lists})
    json.dumps(made, allow_nan=False)
    assert [(b["language"], b["threshold"]) for b in made["languages"]] == [
        ("en", 20.0),
        ("de", 5.0),
        ("sw", None),
    ]
    assert sum(b["matches"] for b in made["languages"]) == made["total"]["matches"]
    assert made["languages"][1]["largest"][0]["entry"] == "das word 0"
    assert made["languages"][2]["tail"] == made["languages"][2]["largest"] == []
    page = report_page(made)
    assert page.count("<details") == 3
    assert page.count("<svg") == 6  # all, en and de; nothing of sw to draw
    assert "3 languages" in "\n".join(report_lines(made))


# ------------------------------------------------------------------------------------------- examples


def test_example_texts_come_with_names_and_chances():
    columns = table({"": (["cat", "dog", "axolotl"], np.array([200, 40, 3]))}, {"": 20.0})
    seen = piece(
        examples=[
            [0.4, "a cat and a dog", [0, 1]],
            (0.2, "an axolotl and a cat", [0, 2]),
            [0.1, "cat", [0]],
        ],
        unmatched=[[0.3, "IMG_2041.JPG", []]],
    )
    texts = report_of(columns, [seen, seen], limits={"": 20.0})["texts"]
    assert [one["text"] for one in texts["head"]] == ["cat", "a cat and a dog"]  # each once, by draw
    assert texts["head"][1]["chance"] == pytest.approx(1 - 0.9 * 0.5)
    assert [e["entry"] for e in texts["head"][1]["entries"]] == ["dog", "cat"]  # the rarest first
    assert [one["text"] for one in texts["tail"]] == ["an axolotl and a cat"]
    assert texts["tail"][0]["chance"] == 1
    assert texts["unmatched"] == [{"text": "IMG_2041.JPG"}]
    counted = report_of(columns.drop_columns(["probability", "kept"]), [seen])["texts"]
    assert counted["head"] == counted["tail"] == []
    assert [one["chance"] for one in counted["matched"]] == [None] * 3


def test_a_text_of_many_frequent_entries_is_still_of_the_head():
    """Its chance rounds to 1, yet it does not always stay."""
    count = np.full(60, 40)
    columns = table({"": (words(60), count)}, {"": 39.9})
    seen = piece(examples=[[0.1, "all of them", list(range(60))]])
    texts = report_of(columns, [seen], limits={"": 39.9})["texts"]
    assert [one["text"] for one in texts["head"]] == ["all of them"]
    assert texts["head"][0]["more"] == 48
    report_page(report_of(columns, [seen], limits={"": 39.9}))


# ------------------------------------------------------------------------------------------- warnings


def test_warnings_say_what_to_look_at(single):
    assert report_of(single, limits={"": 20.0})["warnings"] == []
    seen = piece(
        without_id=30,
        problems={**piece()["problems"], NO_LIST: 5},
        columns={"texts": ["alt"], "id": None, "language": None},
    )
    made = report_of(single, [piece(), seen], limits={"": 20.0}, failed=["bad.parquet: it is cut off."])
    told = "\n".join(made["warnings"])
    assert "could not be read and are left out: 1." in told
    assert "30 of 200 rows have no id" in told
    assert "file's name" in told
    assert "same columns" in told
    assert "5 texts are in languages without a list" in told
    page = report_page(made)
    assert "bad.parquet: it is cut off." in page
    assert "30 of 200 rows have no id" in page


def test_given_counts_that_lack_entries_of_this_pool():
    count = np.array([500, 0, 0, 3])
    columns = table({"": (["a", "b", "c", "d"], count)}, {"": 20.0})
    columns = columns.set_column(4, "kept", pa.array([20, 7, 0, 3]))
    given = report_of(columns, limits={"": 20.0}, counts_given=True)
    (warning,) = given["warnings"]
    assert warning.startswith("1 of the entries in this pool count 0")
    assert "stays: b." in warning
    assert report_of(columns, limits={"": 20.0})["warnings"] == []


def test_a_threshold_above_every_count_is_told():
    columns = table({"": (words(5), np.array([5, 4, 3, 2, 1]))}, {"": 20_000.0})
    made = report_of(columns, limits={"": 20_000.0})
    assert made["warnings"] == ["No entry counts more than its threshold, so nothing was thinned."]
    report_page(made)


def test_a_set_of_nothing_still_has_a_report():
    columns = table({"en": (words(5), np.array([500, 400, 300, 200, 100]))}, {"en": 1e-6})
    columns = columns.set_column(4, "kept", pa.array([0] * 5))
    nothing = {"texts": 0, "rows": 0, "expected": 1e-4, "bytes": 0}
    made = report_of(columns, limits={"en": 1e-6}, kept=nothing)
    assert made["total"]["kept_head_share"] is None
    assert made["total"]["kept_covering"] == {"50": 0, "90": 0, "99": 0}
    assert "rows stay" in report_page(json.loads(json.dumps(made, allow_nan=False)))
    assert any(line.split()[:3] == ["0", "rows", "stay"] for line in report_lines(made))


def test_no_threshold_at_all():
    columns = table({"": (words(5), np.array([5, 4, 3, 2, 1]))}, {"": np.inf})
    made = report_of(columns, limits={"": np.inf}, config={**CONFIG, "threshold": np.inf})
    json.dumps(made, allow_nan=False)
    assert "No threshold" in "\n".join(report_lines(made))
    assert "no threshold" in report_page(made)


# ----------------------------------------------------------------------------------------------- page

NASTY = "<script>alert(1)</script><img src=x onerror=alert(1)> & \"'\u202egnp.exe\x00\x1b[31m"


def test_the_page_escapes_what_strangers_wrote():
    columns = table({NASTY: ([NASTY, NASTY + "2"], np.array([50, 0]))}, {NASTY: 20.0})
    seen = piece(
        columns={"texts": [NASTY], "id": NASTY, "language": NASTY},
        problems={NASTY: 10, NO_ENTRY: 20},
        examples=[[0.1, NASTY, [0]]],
        unmatched=[[0.1, NASTY, []]],
    )
    made = report_of(
        columns,
        [seen],
        limits={NASTY: 20.0},
        failed=[NASTY],
        metadata=NASTY,
        hashes={NASTY: "0"},
        engine="local",
    )
    page = report_page(made)
    reader = Reader(page)
    assert "script" not in reader.tags
    assert "img" not in reader.tags
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    for bad in ("\u202e", "\x00", "\x1b"):
        assert bad not in page
    assert "<script>alert(1)</script>" in "".join(reader.seen)  # as text


def test_the_page_loads_nothing(single):
    page = report_page(report_of(single, limits={"": 20.0}))
    reader = Reader(page)
    assert page.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "img", "object"} & set(reader.tags)
    assert not any(name in ("src", "href", "action", "data") for name, _ in reader.attributes)
    assert "url(" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page


def test_the_threshold_and_both_curves_are_drawn(single):
    page = report_page(report_of(single, limits={"": 20.0}))
    assert page.count('<polyline class="before"') == page.count('<polyline class="after"') == 2
    assert "threshold 20<" in page
    for x, y in re.findall(r"([\d.]+),([\d.]+)", " ".join(re.findall(r'points="([^"]+)"', page))):
        assert 50 <= float(x) <= 460
        assert 12 <= float(y) <= 260


def test_words_of_other_scripts_keep_their_joiners():
    assert shown_text("می\u200cخواهم") == "می\u200cخواهم"
    assert shown_text("a\u2066b\nc") == "a\\u2066b\\nc"


def test_lines_for_a_terminal_add_up(single):
    lines = report_lines(report_of(single, limits={"": 20.0}))
    assert lines[0].split() == ["200", "rows", "came"]
    assert any("12 text is null" in line for line in lines)
    assert any("Threshold 20:" in line for line in lines)
