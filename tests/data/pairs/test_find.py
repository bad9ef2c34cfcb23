"""Finding pair files, cutting them into pieces, and telling their columns."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moviola.data.pairs import PairColumns, PairError, PairFile, find_pairs, pair_columns, pieces, read_texts
from moviola.types import UsageError

from .files import read_all, tar_of, write

ROWS = [{"key": "a", "caption": "a cat"}, {"key": "b", "caption": "a dog"}]


def test_folders_globs_and_files_in_natural_order(tmp_path: Path) -> None:
    for name in ("10.csv", "2.csv", "1.jsonl.gz", "sub/3.tar", "sub/deep/4.parquet"):
        write(tmp_path / "pool" / name, ROWS)
    (tmp_path / "pool" / "notes.md").write_text("no pairs")
    (tmp_path / "pool" / "stats.json").write_text("{}")
    write(tmp_path / "pool" / ".hidden.csv", ROWS)
    write(tmp_path / "pool" / ".cache" / "5.csv", ROWS)
    files = find_pairs([tmp_path / "pool"])
    assert [f.name for f in files] == ["1.jsonl.gz", "2.csv", "10.csv", "sub/3.tar", "sub/deep/4.parquet"]
    assert [f.format for f in files] == ["jsonl", "csv", "csv", "webdataset", "parquet"]
    assert [f.compression for f in files] == ["gzip", None, None, None, None]
    assert [f.name for f in find_pairs([str(tmp_path / "pool" / "*.csv")])] == ["2.csv", "10.csv"]
    assert [f.name for f in find_pairs([str(tmp_path / "*" / "**" / "*.parquet")])] == [
        "pool/sub/deep/4.parquet"
    ]
    assert [f.name for f in find_pairs([str(tmp_path / "po*")])] == ["pool/" + f.name for f in files]
    one = tmp_path / "pool" / "10.csv"
    assert [f.name for f in find_pairs([one, tmp_path / "pool"])][:2] == ["10.csv", "1.jsonl.gz"]
    assert len(find_pairs([one, str(one), tmp_path / "pool"])) == 5


def test_names_stay_unique(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "0.csv", ROWS)
    names = [f.name for f in find_pairs([tmp_path / "a", tmp_path / "b"])]
    assert names == ["a/0.csv", "b/0.csv"]
    odd = write(tmp_path / "odd [1].csv", ROWS)
    assert find_pairs([odd])[0].name == "odd [1].csv"


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("x.tgz", "webdataset", "gzip"),
        ("x.tar.xz", "webdataset", "xz"),
        ("x.TSV.zst", "tsv", "zstd"),
        ("x.v2.ndjson.bz2", "jsonl", "bz2"),
        ("x.pq", "parquet", None),
        ("x.tab", "tsv", None),
    ],
)
def test_formats_by_name(tmp_path: Path, name: str, kind: str, compression: str | None) -> None:
    (tmp_path / name).write_bytes(b"")
    (file,) = find_pairs([tmp_path / name])
    assert (file.format, file.compression) == (kind, compression)


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "x.xlsx").write_text("")
    (tmp_path / "x.parquet.gz").write_text("")
    for sources, message in [
        ([], "no pairs to read"),
        ([tmp_path / "gone.csv"], r"gone.csv does not exist\. Check the path"),
        ([tmp_path / "empty"], r"holds no pair files. Expected names ending in \.parquet"),
        ([str(tmp_path / "*.csv")], r"\*.csv holds no pair files"),
        ([tmp_path / "x.json"], r"no pair file.*write one object a line, as \.jsonl"),
        ([tmp_path / "x.xlsx"], "no pair file"),
        ([tmp_path / "x.parquet.gz"], r"no pair file.*all but Parquet"),
    ]:
        with pytest.raises(UsageError, match=message):
            find_pairs(sources)


def test_a_table_beside_each_tar_is_not_read_twice(tmp_path: Path) -> None:
    write(tmp_path / "00000.tar", ROWS)
    write(tmp_path / "00000.parquet", ROWS)
    with pytest.raises(UsageError, match=r"same name in two formats, 00000.parquet and 00000.tar.*\*\.tar"):
        find_pairs([tmp_path])
    assert len(find_pairs([str(tmp_path / "*.tar")])) == 1


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"t{i}"} for i in range(100)]
    path = write(tmp_path / "p.parquet", rows, row_group_size=15)
    files = find_pairs([path])
    made = pieces(files, rows=40)
    assert [p.groups for p in made] == [(0, 2), (2, 4), (4, 7)]
    assert [p.output for p in made][:2] == ["p-00000-of-00003.parquet", "p-00001-of-00003.parquet"]
    columns = pair_columns(files[0])
    got = []
    for piece in made:
        texts, ids, _, count = read_all(piece, columns)
        assert [row for row, _, _ in texts] == list(range(count))
        got += list(zip(ids or [], [text for _, _, text in texts]))
    assert got == [(r["id"], r["text"]) for r in rows]
    (whole,) = pieces(files, rows=100)
    assert (whole.groups, whole.output) == (None, "p.parquet")
    assert len(pieces(files, rows=1)) == 7
    with pytest.raises(UsageError, match="at least 1 row"):
        pieces(files, rows=0)
    clash = [*files, PairFile(tmp_path / "q", "p-00001-of-00003.parquet", "parquet")]
    with pytest.raises(UsageError, match=r"would both be written to p-00001-of-00003\.parquet"):
        pieces(clash, rows=40)


def test_an_unreadable_footer_is_told_when_its_piece_is_read(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    write(tmp_path / "good.parquet", [{"text": "x"}])
    bad, good = pieces(find_pairs([tmp_path]))
    with pytest.raises(PairError, match=r"bad.parquet: is no readable Parquet file.*Copy it again") as caught:
        list(read_texts(bad, PairColumns(("text",))))
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - errors cross processes
    assert (str(again), again.path, again.hint) == (str(caught.value), caught.value.path, caught.value.hint)
    with pytest.raises(PairError, match="no readable Parquet"):
        pair_columns(bad.file)
    assert read_all(good)[0] == [(0, 0, "x")]


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl"])
def test_columns_by_name_and_by_usual_names(tmp_path: Path, ending: str) -> None:
    (file,) = find_pairs(
        [write(tmp_path / f"t.{ending}", [{"URL": "u", "TEXT": "x", "alt": "y", "lang": "en"}])]
    )
    assert pair_columns(file) == PairColumns(("TEXT",), "URL", None)
    assert pair_columns(file, find_language=True).language == "lang"
    assert pair_columns(file, texts=["alt", "TEXT", "alt"], id="lang", language="URL") == PairColumns(
        ("alt", "TEXT"), "lang", "URL"
    )
    there = r"t\.\w+: has no column 'nope'. Its columns: 'URL', 'TEXT', 'alt', 'lang'"
    for asked in ({"texts": "nope"}, {"id": "nope"}, {"language": "nope"}):
        with pytest.raises(PairError, match=there):
            pair_columns(file, **asked)  # type: ignore[arg-type]
    (file,) = find_pairs([write(tmp_path / f"u.{ending}", [{"a": "u", "b": "x"}])])
    with pytest.raises(PairError, match=r"names itself a text. Its columns: 'a', 'b'.*--text-column"):
        pair_columns(file)
    assert pair_columns(file, texts="b").id is None


def test_columns_of_tars_are_members_and_json_fields(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar_of(
            [("x/0.jpg", b"J"), ("x/0.JSON", b'{"caption": "c", "uid": 7, "lang": "de"}'), ("x/1.cls", b"3")]
        )
    )
    (file,) = find_pairs([tmp_path / "a.tar"])
    assert pair_columns(file, find_language=True) == PairColumns(("json.caption",), "__key__", "json.lang")
    assert pair_columns(file, id="json.uid").id == "json.uid"
    with pytest.raises(
        PairError, match=r"no column 'txt'. Its columns: '__key__', 'jpg', 'json', 'json.caption'"
    ):
        pair_columns(file, texts="txt")


def test_mixed_schemas_resolve_each_file_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"caption": "one", "uid": 1}])
    write(tmp_path / "b.csv", [{"text": "two", "id": "x"}])
    write(tmp_path / "c.parquet", [{"title": ["three", "3"], "url": "u"}])
    got = []
    for piece in pieces(find_pairs([tmp_path])):
        texts, ids, _, _ = read_all(piece)
        got.append(([text for _, _, text in texts], ids))
    assert got == [(["one"], ["1"]), (["two"], ["x"]), (["three", "3"], ["u"])]


@pytest.mark.parametrize(
    ("table", "asked", "message"),
    [
        (pa.table({"text": [1, 2]}), {}, "its column 'text' holds int64, expected text or lists of texts"),
        (pa.table({"text": [[1], [2]]}), {}, "holds list<.*int64.*expected text"),
        (pa.table({"text": ["a"], "k": [["b"]]}), {"id": "k"}, "its column 'k' holds list<.*text or numbers"),
    ],
)
def test_columns_of_the_wrong_type(
    tmp_path: Path, table: pa.Table, asked: dict[str, str], message: str
) -> None:
    pq.write_table(table, tmp_path / "t.parquet")
    (file,) = find_pairs([tmp_path / "t.parquet"])
    with pytest.raises(PairError, match=message):
        pair_columns(file, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty, expected a header"),
        ("t.csv", b"\n\n", "is empty, expected a header"),
        ("t.csv", b"a,a\n1,2\n", "names 'a' twice"),
        ("t.csv", b"te\xffxt,b\n1,2\n", "header is not UTF-8"),
        ("t.csv", "text,b\n1,2\n".encode("utf-16-le"), "no UTF-8 text"),
        ("t.csv.gz", b"text\n1\n", "is damaged"),
        ("t.csv.zst", b"text\n1\n", "is damaged"),
        ("t.csv.bz2", b"text\n1\n", "is damaged"),
        ("t.csv.xz", b"text\n1\n", "is damaged"),
        ("t.jsonl", b"", "is empty, it holds no JSON object"),
        ("t.jsonl", b"[1]\n2\n{\n", "no JSON object"),
        ("t.tar", b"", "holds no samples"),
        ("t.tar", tar_of([("README", b"x"), (".hid.txt", b"y"), ("__a.info__", b"z")]), "holds no samples"),
        ("t.tar", b"x" * 2000, "no header at byte 0"),
        ("t.parquet", b"", "no readable Parquet"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (file,) = find_pairs([tmp_path / name])
    with pytest.raises(PairError, match=message):
        pair_columns(file)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet", "t.jsonl", "t.tar", "t.csv.zst"):
        path = tmp_path / name
        path.write_bytes(b"")
        (file,) = find_pairs([path])
        path.unlink()
        with pytest.raises(PairError, match="does not exist"):
            pair_columns(file)
