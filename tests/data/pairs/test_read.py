"""Texts out of every format: exact, in bounded batches, with what is bad counted and not fatal."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moviola.data.pairs import PROBLEMS, PairColumns, PairError, find_pairs, pair_columns, read_texts
from moviola.data.pairs import lines as pair_lines
from moviola.data.pairs.lines import blocks, cells

from .files import ENDINGS, only_piece, packed, read_all, tar_of, write

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_TEXT.filter(lambda t: t.strip("\0 ")), min_size=1, max_size=6))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, ending: str, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / f"t.{ending}"
    write(path, [{"key": f"k{i}", "caption": text} for i, text in enumerate(texts)])
    got, ids, problems, rows = read_all(path)
    blank = [i for i, text in enumerate(texts) if i not in {row for row, _, _ in got}]
    assert got == [(i, 0, text) for i, text in enumerate(texts) if i not in blank]
    assert all(not text.strip() for i, text in enumerate(texts) if i in blank)
    assert problems == ({"text is empty": len(blank)} if blank else {})
    assert (rows, ids) == (len(texts), [f"k{i}" for i in range(len(texts))])


RAW_CSV = st.text(st.sampled_from('a",\n\r '), max_size=40)


@settings(max_examples=250, deadline=None)
@given(RAW_CSV, st.integers(1, 9))
@example('"a""\r\n",b\r\n', 1)
@example("a\r", 1)
@example('""', 1)
@example('a,"b\rc"\r\n\r"', 3)
def test_csv_records_are_those_of_pythons_reader(
    tmp_path_factory: pytest.TempPathFactory, text: str, block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(text.encode())
    (file,) = find_pairs([path])
    wanted = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    got = []
    try:
        for block in blocks(file, b",", block_bytes):
            assert block.first == len(got)
            places = zip(block.start_R.tolist(), block.end_R.tolist())
            got += [[c.decode() for c in cells(block.data[start:end], b",")] for start, end in places]
    except PairError:
        # a quote stays open: for Python too, what follows the text still belongs to its last cell
        longer = [row for row in csv.reader(io.StringIO(text + "\nmore", newline="")) if row]
        assert longer[-1][-1].endswith("\nmore")
        assert len(got) == len(longer) - 1
        wanted = wanted[: len(got)]
    assert got == wanted


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('ab",\n\r \xff'), max_size=60))
def test_csv_texts_are_those_of_pythons_reader(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(b"text,id\r\n" + text.encode("latin-1"))
    wanted = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    try:
        got, ids, problems, rows = read_all(path)
    except PairError:
        # a quote stays open: what follows the text still belongs to its last cell
        longer = [row for row in csv.reader(io.StringIO(text + "\nmore", newline="")) if row]
        assert len(longer) == len(wanted)
        assert longer[-1][-1].endswith("\nmore")
        return
    assert rows == len(wanted)
    good = [(i, row) for i, row in enumerate(wanted) if len(row) == 2]
    assert problems.get("row has the wrong number of cells", 0) == len(wanted) - len(good)
    readable = [(i, 0, row[0]) for i, row in good if "\xff" not in row[0] and row[0].strip()]
    assert got == readable
    assert problems.get("text is not valid UTF-8", 0) == sum("\xff" in row[0] for _, row in good)
    kept_ids = [row[1].encode("latin-1") for _, row in good]
    told = [v.decode() if b"\xff" not in v else v.hex() for v in kept_ids]
    assert [ids[i] for i, _ in good] == told  # type: ignore[index]


@pytest.mark.parametrize(
    "ending", ["csv.gz", "tsv.bz2", "jsonl.xz", "jsonl.zst", "tar.gz", "tgz", "tar.zst", "csv.zstd"]
)
def test_compressed_files_read_as_plain_ones(tmp_path: Path, ending: str) -> None:
    rows = [{"key": f"k{i}", "caption": f'text "{i}"\nmore' * 50} for i in range(1000)]
    got, ids, problems, count = read_all(write(tmp_path / f"t.{ending}", rows))
    assert [text for _, _, text in got] == [row["caption"] for row in rows]
    assert (problems, count, (ids or [])[-1]) == ({}, 1000, "k999")


@pytest.mark.parametrize("ending", ["csv.gz", "csv.bz2", "csv.xz", "csv.zst", "tar.gz"])
def test_several_compressed_members_are_one_file_and_cut_ones_are_damage(tmp_path: Path, ending: str) -> None:
    rows = [{"key": f"k{i}", "caption": f"text {i * 7919 % 10007}"} for i in range(2000)]
    plain = write(tmp_path / ("p." + ending.split(".")[0]), rows).read_bytes()
    half = len(plain) // 2
    path = tmp_path / f"t.{ending}"
    path.write_bytes(packed(plain[:half], ending) + packed(plain[half:], ending))
    assert len(read_all(path)[0]) == 2000
    whole = packed(plain, ending)
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(PairError, match="is damaged"):
        read_all(path, PairColumns(("txt" if "tar" in ending else "caption",)))


@pytest.mark.parametrize("batch_bytes", [1, 100, 10_000, 1 << 24])
@pytest.mark.parametrize("ending", ENDINGS)
def test_batches_hold_about_their_bytes_and_every_row_once(
    tmp_path: Path, ending: str, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"key": f"k{i}", "caption": "x" * (i % 90)} for i in range(400)]
    rows[123]["caption"] = "long " * 5000
    path = write(tmp_path / f"t.{ending}", rows)
    piece = only_piece(path)
    columns = pair_columns(piece.file)
    got, ids, problems, count = read_all(piece, columns, batch_bytes=batch_bytes)
    assert got == [(i, 0, row["caption"]) for i, row in enumerate(rows) if row["caption"]]
    assert ids == [row["key"] for row in rows]
    assert (problems, count) == ({"text is empty": 5}, 400)
    for batch in read_texts(piece, columns, batch_bytes=batch_bytes):
        size = sum(len(text) for text in batch.texts.to_pylist())
        assert size <= batch_bytes or len(batch.texts) == 1


def test_megabyte_texts_are_read_whole(tmp_path: Path) -> None:
    long = "a very long text, " * 700_000  # 12 MB: more than a block
    for ending in ENDINGS:
        rows = [{"key": "a", "caption": "x"}, {"key": "b", "caption": long}, {"key": "c", "caption": "y"}]
        got, _, _, _ = read_all(write(tmp_path / f"t.{ending}", rows))
        assert [len(text) for _, _, text in got] == [1, len(long), 1]
        assert got[1][2] == long


def test_a_record_without_end_is_damage_and_not_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_lines, "MOST_RECORD_BYTES", 8 << 20)
    (tmp_path / "t.csv").write_bytes(b'text,b\nx,y\n"' + b"open, quote\n" * 2_000_000)
    with pytest.raises(PairError, match=r"record 3 is longer than 8 MB.*quote that is never closed"):
        read_all(tmp_path / "t.csv")
    (tmp_path / "u.csv").write_bytes(b'text,b\nx,y\n"open,z\n1,2\n')
    with pytest.raises(PairError, match="a quote opens in record 3 and is never closed"):
        read_all(tmp_path / "u.csv")
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * (20 << 20))
    with pytest.raises(PairError, match="record 2 is longer than 8 MB"):
        read_all(tmp_path / "t.jsonl", PairColumns(("text",)))


# --------------------------------------------------------------------------------------------------
# Parquet
# --------------------------------------------------------------------------------------------------

TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.list_(pa.string()),
    pa.large_list(pa.large_string()),
    pa.list_(pa.dictionary(pa.int8(), pa.string())),
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_parquet_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    texts: list[Any] = ["a cat", None, "", "日本 café", "  \t", "a cat"]
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    values = [[t, "second"] for t in texts] if is_list else texts
    inner = kind.value_type if is_list else kind
    plain = pa.large_list(pa.string()) if is_list else pa.string()
    array = pa.array(values, plain)
    if pa.types.is_dictionary(inner):
        made = (array.flatten() if is_list else array).dictionary_encode().cast(inner)
        array = (
            type(pa.array([], kind)).from_arrays(array.offsets.cast(pa.int32()), made) if is_list else made
        )
    else:
        array = array.cast(kind)
    pq.write_table(pa.table({"text": array}), tmp_path / "t.parquet")
    got, ids, problems, rows = read_all(tmp_path / "t.parquet")
    first = [(i, 0, t) for i, t in enumerate(texts) if t and t.strip()]
    wanted = sorted(first + [(i, 1, "second") for i in range(6)]) if is_list else first
    assert got == wanted
    assert (ids, rows) == (None, 6)
    assert problems == {"text is null": 1, "text is empty": 2}


def test_parquet_lists_of_any_shape(tmp_path: Path) -> None:
    table = pa.table(
        {
            "a": pa.array([["x", None, "y"], [], None, ["", "z"]], pa.list_(pa.string())),
            "b": pa.array(["p", "q", None, "r"], pa.string()),
            "c": pa.array([["f", "g"]] * 4, pa.list_(pa.string(), 2)),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    got, _, problems, _ = read_all(only_piece(tmp_path / "t.parquet"), PairColumns(("a", "b", "c")))
    assert got == [
        *[(0, 0, "x"), (0, 2, "y"), (0, 3, "p"), (0, 4, "f"), (0, 5, "g")],
        *[(1, 0, "q"), (1, 1, "f"), (1, 2, "g")],
        *[(2, 2, "f"), (2, 3, "g")],
        *[(3, 1, "z"), (3, 2, "r"), (3, 3, "f"), (3, 4, "g")],
    ]
    assert problems == {"text is null": 3, "text is empty": 1, "row has an empty list of texts": 1}
    # cut into single rows, the same
    assert read_all(only_piece(tmp_path / "t.parquet"), PairColumns(("a", "b", "c")), batch_bytes=1)[0] == got


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (pa.array([1, -5, None]), ["1", "-5", ""]),
        (pa.array([2**64 - 1, 0, None], pa.uint64()), [str(2**64 - 1), "0", ""]),
        (pa.array(["a", "", None], pa.large_string()), ["a", "", ""]),
        (pa.array([b"\x01\xff", b"ok", None], pa.binary()), ["01ff", "ok", ""]),
        (pa.array([b"\x01\xff", b"ok", None], pa.binary(2)), ["01ff", "6f6b", ""]),
        (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b", ""]),
        (pa.array([1.5, 1e300, None]), ["1.5", "1e+300", ""]),
    ],
)
def test_parquet_ids(tmp_path: Path, values: pa.Array, wanted: list[str]) -> None:
    pq.write_table(
        pa.table({"id": values, "text": ["x", "y", "z"], "lang": ["en", None, "de"]}), tmp_path / "t.pq"
    )
    piece = only_piece(tmp_path / "t.pq")
    columns = pair_columns(piece.file, find_language=True)
    assert read_all(piece, columns)[1] == wanted
    (batch,) = read_texts(piece, columns)
    assert batch.languages.to_pylist() == ["en", "", "de"]


def test_parquet_texts_that_are_not_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"\xff\xfe", None, b"\xc3", "é".encode()], pa.binary())
    for kind in (pa.string(), pa.binary()):
        pq.write_table(pa.table({"text": bad.view(kind)}), tmp_path / "t.parquet")
        got, _, problems, _ = read_all(tmp_path / "t.parquet")
        assert got == [(0, 0, "good"), (4, 0, "é")]
        assert problems == {"text is not valid UTF-8": 2, "text is null": 1}


def test_parquet_damage_in_the_middle(tmp_path: Path) -> None:
    rows = [{"text": f"some text {i * 7919 % 10007}"} for i in range(20_000)]
    path = write(tmp_path / "t.parquet", rows, row_group_size=5000, write_page_checksum=True)
    piece = only_piece(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)
    seen: list[int] = []
    with pytest.raises(PairError, match=r"t.parquet: is damaged.*leave it out"):
        seen.extend(batch.rows for batch in read_texts(piece, PairColumns(("text",))))
    assert sum(seen) in (5000, 10_000)


def test_parquet_reads_only_its_columns(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "id": i, "image": bytes([i % 256]) * 10_000} for i in range(500)]
    path = write(tmp_path / "t.parquet", rows, compression="none", use_dictionary=False)
    piece = only_piece(path)
    columns = pair_columns(piece.file)
    meta = pq.read_metadata(path).row_group(0)
    image = next(meta.column(i) for i in range(3) if meta.column(i).path_in_schema == "image")
    data = bytearray(path.read_bytes())
    start = image.data_page_offset
    data[start : start + image.total_compressed_size] = b"\xee" * image.total_compressed_size
    path.write_bytes(data)  # the pictures are garbled: who reads them falls over
    assert len(read_all(piece, columns)[0]) == 500
    with pytest.raises(PairError, match="is damaged"):
        read_all(piece, PairColumns(("image",)))


# --------------------------------------------------------------------------------------------------
# CSV and JSON Lines
# --------------------------------------------------------------------------------------------------


def test_csv_bad_rows_are_counted(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbftext,id\none,1\ntwo\nthree,3,4\n\n"four\r\nlines",4\n'
    data += b'\xff\xfe,5\n,6\n  ,7\nNA,\xfe\n"ei""ght",8'
    (tmp_path / "t.csv").write_bytes(data)
    got, ids, problems, rows = read_all(tmp_path / "t.csv")
    assert got == [(0, 0, "one"), (3, 0, "four\r\nlines"), (7, 0, "NA"), (8, 0, 'ei"ght')]
    assert ids == ["1", "", "", "4", "5", "6", "7", "fe", "8"]
    assert rows == 9
    assert problems == {
        "row has the wrong number of cells": 2,
        "text is not valid UTF-8": 1,
        "text is empty": 2,
    }
    assert set(problems) <= set(PROBLEMS)


def test_csv_needs_only_a_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text,id")
    assert read_all(tmp_path / "t.csv") == ([], [], {}, 0)


def test_jsonl_bad_rows_are_counted(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "one", "id": 7}',
        b'{"text": null}',
        b'{"id": "x"}',
        b"{broken",
        b"[1, 2]",
        b"",
        b"   ",
        b'{"text": "\xff"}',
        b'{"text": 5, "id": 1.5}',
        b'{"text": ["a", "", null, 3, "b"], "id": [1]}',
        b'{"text": []}',
        b'{"text": "\\ud800", "id": "\\ud800"}',
        b'{"text": "\\u0000 \\ud83d\\ude00", "id": true}\r',
        b'{"text": {"en": "x"}, "id": ""}',
        b"[" * 100_000,
        b'{"text": "last", "id": 123456789012345678901234567890}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    got, ids, problems, rows = read_all(tmp_path / "t.jsonl")
    assert got == [(0, 0, "one"), (8, 0, "a"), (8, 4, "b"), (11, 0, "\0 😀"), (14, 0, "last")]
    assert rows == 15
    assert ids == [
        "7",
        "",
        "x",
        "",
        "",
        "",
        "",
        "1.5",
        "[1]",
        "",
        "\\ud800",
        "true",
        "",
        "",
        "1" * 0 + "123456789012345678901234567890",
    ]
    assert problems == {
        "text is null": 3,
        "text is empty": 1,
        "text is not a string": 3,
        "text is not valid UTF-8": 1,
        "row has an empty list of texts": 1,
        "row is not JSON": 2,
        "row is not a JSON object": 1,
        "row is not valid UTF-8": 1,
    }


def test_jsonl_is_what_json_says(tmp_path: Path) -> None:
    rows = [{"text": [f"a{i}", f"b{i}"] if i % 3 else f"c{i}", "alt": f"d{i}"} for i in range(50)]
    piece = only_piece(write(tmp_path / "t.jsonl", rows))
    got, _, _, _ = read_all(piece, PairColumns(("text", "alt")))
    wanted = []
    for i, row in enumerate(rows):
        several = row["text"] if isinstance(row["text"], list) else [row["text"]]
        wanted += [(i, nth, text) for nth, text in enumerate([*several, row["alt"]])]
    assert got == wanted


# --------------------------------------------------------------------------------------------------
# WebDataset
# --------------------------------------------------------------------------------------------------


def test_tar_samples_by_the_usual_rule(tmp_path: Path) -> None:
    members = [
        ("./a/000.jpg", b"J" * 700),
        ("./a/000.txt", b"first"),
        ("./a/000.seg.txt", b"not this"),
        ("./b.c/000.TXT", "zweite é".encode()),
        ("README", b"no ending"),
        (".hidden.txt", b"hidden"),
        ("x" * 150 + "/001.txt", b"long name"),
        ("d/002.jpg", b"no text"),
        ("d/003.txt", b"\xff\xfe"),
        ("d/004.txt", b" \n"),
        ("d/005.txt", b"once"),
        ("d/005.txt", b"twice"),
        ("d/006.txt", b"end"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "t.tar").write_bytes(tar_of(members, form))
        got, ids, problems, rows = read_all(only_piece(tmp_path / "t.tar"), PairColumns(("txt",), "__key__"))
        assert got == [(0, 0, "first"), (1, 0, "zweite é"), (2, 0, "long name"), (7, 0, "end")]
        keys = ["./a/000", "./b.c/000", "x" * 150 + "/001", *(f"d/00{i}" for i in range(2, 7))]
        assert (ids, rows) == (keys, 8)
        assert problems == {
            "text is null": 1,
            "text is not valid UTF-8": 1,
            "text is empty": 1,
            "text comes twice in its sample": 1,
        }


def test_tar_json_fields(tmp_path: Path) -> None:
    def members(i: int, value: bytes) -> list[tuple[str, bytes]]:
        return [(f"{i}.jpg", b"J"), (f"{i}.json", value), (f"{i}.txt", b"t%d" % i)]

    values = [
        json.dumps({"caption": "c0", "uid": 10, "alts": ["p", "q"]}).encode(),
        b'{\n  "caption": 5,\n  "uid": "u1"\n}\n',
        b"[]",
        b"{",
        b'{"caption": "\xff"}',
    ]
    data = tar_of([m for i, value in enumerate(values) for m in members(i, value)])
    (tmp_path / "t.tar").write_bytes(data)
    columns = PairColumns(("json.alts", "txt", "json.caption"), "json.uid")
    got, ids, problems, _ = read_all(only_piece(tmp_path / "t.tar"), columns)
    assert got == [(0, 0, "p"), (0, 1, "q"), (0, 2, "t0"), (0, 3, "c0"), (1, 1, "t1")]
    assert ids == ["10", "u1", "", "", ""]
    assert problems == {
        "text is null": 1,
        "text is not a string": 1,
        "row is not a JSON object": 1,
        "row is not JSON": 1,
        "row is not valid UTF-8": 1,
    }


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_tar_damage_is_noticed(tmp_path: Path, packing: str) -> None:
    members = [(f"{i:03d}.{ending}", b"x" * 2000) for i in range(20) for ending in ("jpg", "txt")]
    whole = tar_of(members)
    path = tmp_path / f"t.tar{packing}"

    def read(data: bytes) -> int:
        path.write_bytes(packed(data, path.name))
        return len(read_all(only_piece(path), PairColumns(("txt",)))[0])

    assert read(whole) == 20
    header = whole.index(b"010.jpg")
    for data, message in [
        (whole[: header + 900], "it ends inside a file"),
        (whole[: header + 300], "it ends inside a header"),
        (whole[:header] + b"\x01" * 512 + whole[header + 512 :], "no header at byte"),
        (whole[: header + 3] + b"x" + whole[header + 4 :], f"the header at byte {header} is garbled"),
    ]:
        with pytest.raises(PairError, match=message):
            read(data)
    # a last file without its padding, and no end mark, is whole all the same
    assert read(whole[: whole.rindex(b"x" * 2000) + 2000]) == 20


def test_tar_links_and_folders_are_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("d.x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("d.x/0.txt")
        link.type, link.linkname, link.size = tarfile.LNKTYPE, "y" * 200, 0
        tar.addfile(link)
        info = tarfile.TarInfo("d.x/1.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    (tmp_path / "t.tar").write_bytes(out.getvalue())
    assert read_all(tmp_path / "t.tar")[:2] == ([(0, 0, "ok")], ["d.x/1"])


def test_arrow_still_tells_csv_cells_as_python_does() -> None:
    """The exactness above rests on it: a change in Arrow's quoting must be seen."""
    table = pa_csv.read_csv(
        pa.BufferReader(b'"a"b"c,5" y\n'),
        pa_csv.ReadOptions(column_names=["a", "b"]),
        pa_csv.ParseOptions(newlines_in_values=True),
    )
    assert table.to_pylist() == [{"a": 'ab"c', "b": '5" y'}]


def test_batches_cover_rows_without_texts(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", [{"text": ""} for _ in range(5)])
    (batch,) = read_texts(only_piece(tmp_path / "t.jsonl"), PairColumns(("text",)))
    assert (batch.rows, len(batch.texts), batch.row_U.dtype) == (5, 0, np.int64)
