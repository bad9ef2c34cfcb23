"""Tables of pairs: every format gives the same rows, and what is wrong is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.data.readers import Table, read_pairs
from moviola.types import Clip, TimeSpan, UsageError

ROWS = [
    {"path": "a.jpg", "caption": 'a cat, "asleep"'},
    {"path": "sub/b c.png", "caption": "zwei Hunde\nund ein Vogel"},
    {"path": "d.mp4", "caption": "日本 café"},
]


def write(path: Path, rows: list[dict]) -> Path:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows([row.get(name, "") for name in columns] for row in rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_pairs(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"t.{ending}", ROWS)
    pairs = list(read_pairs(path))
    assert [pair.media for pair in pairs] == [Clip(tmp_path / row["path"]) for row in ROWS]
    assert [pair.texts for pair in pairs] == [(row["caption"],) for row in ROWS]
    assert [pair.id for pair in pairs] == [f"t.{ending}:{n}" for n in (1, 2, 3)]
    other = next(iter(read_pairs(path, media_root="/elsewhere")))
    assert other.media == Clip(Path("/elsewhere/a.jpg"))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda t: t.strip()),
        min_size=1,
        max_size=5,
    )
)
def test_any_text_survives_every_format(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [{"path": f"{i}.jpg", "caption": text} for i, text in enumerate(texts)]
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        got = [pair.texts[0] for pair in read_pairs(write(folder / f"t.{ending}", rows))]
        assert got == [text.strip() for text in texts], ending


def test_bytes_structs_lists_ids_and_times(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "image": b"\x89PNG", "captions": ["one", " ", "two "]},
        {"id": 8, "image": b"JPG", "captions": ["three"]},
    ]
    pairs = list(read_pairs(write(tmp_path / "a.parquet", rows)))
    assert [(p.id, p.media, p.texts) for p in pairs] == [
        ("7", b"\x89PNG", ("one", "two")),
        ("8", b"JPG", ("three",)),
    ]
    rows = [
        {"image": {"bytes": b"X", "path": "a.jpg"}, "text": "t"},
        {"image": {"bytes": None, "path": "b.jpg"}, "text": "t"},
    ]
    pairs = list(read_pairs(write(tmp_path / "b.parquet", rows)))
    assert [p.media for p in pairs] == [b"X", Clip(tmp_path / "b.jpg")]
    rows = [
        {"video": "v.mp4", "start": 1.5, "end": 4, "sentence": "s"},
        {"video": "v.mp4", "start": "", "end": "", "sentence": "s"},
    ]
    pairs = list(read_pairs(write(tmp_path / "c.csv", rows)))
    assert [p.media for p in pairs] == [Clip(tmp_path / "v.mp4", TimeSpan(1.5, 4)), Clip(tmp_path / "v.mp4")]


def test_several_tables_and_named_columns(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", [{"weird": "a.jpg", "words": "x", "nr": "p"}])
    two = write(tmp_path / "two.jsonl", [{"weird": "b.jpg", "words": "y", "nr": "q"}])
    pairs = read_pairs([one, two], media_column="weird", text_column="words", id_column="nr")
    assert [pair.id for pair in pairs] == ["p", "q"]


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"url": "a.jpg", "words": "x"}])
    with pytest.raises(
        UsageError, match=r"names itself pictures or videos. Its columns: 'url', 'words'.*media_column="
    ):
        read_pairs(path)
    with pytest.raises(UsageError, match=r"no column 'caption'. Its columns"):
        read_pairs(path, media_column="url", text_column="caption")
    with pytest.raises(UsageError, match="no column 'nr'"):
        read_pairs(path, media_column="url", text_column="words", id_column="nr")


def test_bad_rows_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "path,caption\na.jpg,one\nb.jpg,too,many\n,three\nd.jpg,\nhttps://x/e.jpg,five\nf.jpg,six\n"
    )
    skipped: list[tuple[str, str]] = []
    pairs = list(read_pairs(path, on_skip=lambda where, why: skipped.append((where, why))))
    assert [pair.texts[0] for pair in pairs] == ["one", "six"]
    assert [where for where, _ in skipped] == ["t.csv:2", "t.csv:3", "t.csv:4", "t.csv:5"]
    assert "expected 2 cells" in skipped[0][1]
    assert "web address" in skipped[3][1]
    with pytest.raises(UsageError, match=r"t\.csv:2: expected 2 cells.*on_skip"):
        list(read_pairs(path))
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"path": "a.jpg", "caption": "one"}\n[1]\n{broken\n{"path": "b.jpg", "caption": "two"}\n'
    )
    skipped.clear()
    pairs = list(read_pairs(path, on_skip=lambda where, why: skipped.append((where, why))))
    assert [pair.id for pair in pairs] == ["t.jsonl:1", "t.jsonl:4"]
    assert [where for where, _ in skipped] == ["t.jsonl:2", "t.jsonl:3"]


@pytest.mark.parametrize(
    ("start", "end", "why"), [("x", "2", "seconds"), ("3", "2", "0 <= start"), ("nan", "2", "0 <= start")]
)
def test_times_that_cannot_be(tmp_path: Path, start: str, end: str, why: str) -> None:
    path = write(tmp_path / "t.csv", [{"video": "v.mp4", "start": start, "end": end, "text": "t"}])
    with pytest.raises(UsageError, match=why):
        list(read_pairs(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"a,a\n1,2\n", "names a twice"),
        ("t.csv", b"path,caption\na.jpg,\xff\xfe\n", "no readable CSV"),
        ("t.jsonl", b"\n", "no JSON object"),
        ("t.json", b"{}", "expected a list of rows"),
        ("t.json", b"{", "no JSON"),
        ("t.parquet", b"PAR1", "no readable Parquet"),
        ("t.xlsx", b"", "not a table"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(read_pairs(tmp_path / name))


def test_missing_tables(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_pairs(tmp_path / "gone.csv")
    with pytest.raises(UsageError, match="is a folder"):
        read_pairs(tmp_path)
    with pytest.raises(UsageError, match="no table to read"):
        read_pairs([])


def test_parquet_reads_only_the_columns_it_needs_and_in_pieces(tmp_path: Path) -> None:
    rows = [{"image": bytes([i % 256]) * 50, "name": str(i)} for i in range(1000)]
    table = Table(write(tmp_path / "t.parquet", rows))
    number, row = next(table.rows(["name"]))
    assert (number, row) == (1, {"name": "0"})
    assert [n for n, _ in table.rows(["name"])] == list(range(1, 1001))
