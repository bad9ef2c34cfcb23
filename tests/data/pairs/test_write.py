"""The second pass: kept rows come out in the input's format, whole or not at all, the same every time."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.data.pairs import KeptRows, OutputError, PairError, find_pairs, pieces, write_kept
from moviola.data.pairs.jsonl import with_fields
from moviola.data.pairs.streams import json_texts
from moviola.types import UsageError

from .files import ENDINGS, members_of, only_piece, read_all, tar_of, unpacked, write

EXTRA = pa.schema([("matched_entries", pa.list_(pa.string())), ("keep_probability", pa.float64())])


def kept_rows(rows: list[int], step: int = 3) -> Iterator[KeptRows]:
    """Rows with made extras, a few at a time."""
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        extra = pa.RecordBatch.from_pylist([made(row) for row in some], EXTRA)
        yield KeptRows(np.array(some, np.int64), extra)


def made(row: int) -> dict[str, Any]:
    return {
        "matched_entries": [f"entry, {row}", 'a "quote"', "日本"][: row % 4],
        "keep_probability": 1 / (row + 1),
    }


def extras_of(path: Path, rows: list[int]) -> list[dict[str, Any]]:
    """The extra columns of an output, read with the format's own library."""
    data = unpacked(path)
    if ".parquet" in path.name:
        return pq.read_table(path).select(EXTRA.names).to_pylist()
    if ".jsonl" in path.name:
        found = [json.loads(line) for line in data.splitlines()]
    elif ".tar" in path.name or ".tgz" in path.name:
        found = [json.loads(body) for name, body in members_of(data) if name.endswith(".json")]
    else:
        delimiter = "\t" if ".tsv" in path.name else ","
        found = list(csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter=delimiter))
        for row in found:
            row["matched_entries"] = json.loads(row["matched_entries"])
            row["keep_probability"] = float(row["keep_probability"])
    return [{name: row[name] for name in EXTRA.names} for row in found]


@pytest.mark.parametrize(
    "ending", [*ENDINGS, "csv.gz", "tsv.bz2", "jsonl.xz", "jsonl.zst", "tar.gz", "tar.zst", "tgz"]
)
def test_kept_rows_in_every_format(tmp_path: Path, ending: str) -> None:
    rows = [{"key": f"k{i}", "caption": f'a text, "{i}"\nof two lines'} for i in range(500)]
    path = write(tmp_path / "in" / f"t.{ending}", rows)
    piece = only_piece(path)
    stay = [0, 1, 7, *range(100, 140), 498]
    outputs = [tmp_path / "out" / str(i) / "deep" / piece.output for i in range(2)]
    for step, to in zip((3, 1000), outputs):
        assert write_kept(piece, to, kept_rows(stay, step), EXTRA) == len(stay)
    one = outputs[0]
    assert one.read_bytes() == outputs[1].read_bytes()
    assert [p.name for p in one.parent.iterdir()] == [one.name]
    assert oct(one.stat().st_mode & 0o777) == oct(0o666 & ~umask())
    got, ids, problems, count = read_all(one)
    assert [text for _, _, text in got] == [rows[i]["caption"] for i in stay]
    assert (ids, problems, count) == ([rows[i]["key"] for i in stay], {}, len(stay))
    assert extras_of(one, stay) == [made(row) for row in stay]
    nothing = tmp_path / "out" / f"none.{ending}"
    assert write_kept(piece, nothing, [], EXTRA) == 0
    if "parquet" in ending:
        assert pq.read_schema(nothing).names == ["key", "caption", *EXTRA.names]
    elif "csv" in ending or "tsv" in ending:
        assert read_all(nothing)[3] == 0


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_parquet_keeps_types_metadata_codecs_and_row_groups(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("text", pa.dictionary(pa.int32(), pa.string())),
            pa.field("id", pa.uint64(), nullable=False),
            pa.field("when", pa.timestamp("us", "UTC")),
            pa.field("box", pa.struct([("x", pa.float32()), ("y", pa.list_(pa.int8()))])),
            pa.field("wide", pa.large_string(), metadata={"unit": "none"}),
            pa.field("view", pa.string_view()),
            pa.field("image", pa.binary()),
        ],
        metadata={"note": "kept", "huggingface": '{"info": 1}'},
    )
    rows = [
        {
            "text": f"t{i % 5}",
            "id": i,
            "when": i,
            "box": {"x": i / 2, "y": [1]},
            "wide": "w",
            "view": "v" * 20,
            "image": b"J",
        }
        for i in range(1000)
    ]
    table = pa.Table.from_pylist(rows, schema)
    codecs = {"text": "zstd", "id": "none", "when": "gzip", "box.x": "snappy", "box.y.list.element": "zstd"}
    codecs |= {"wide": "zstd", "view": "zstd", "image": "none"}
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=100, compression=codecs)
    made_pieces = pieces(find_pairs([path]), rows=400)
    assert [p.groups for p in made_pieces] == [(0, 4), (4, 8), (8, 10)]
    stay = list(range(0, 400, 2))
    to = tmp_path / "out.parquet"
    assert write_kept(made_pieces[1], to, kept_rows(stay), EXTRA) == 200
    out = pq.read_table(to)
    assert out.schema.metadata == schema.metadata
    assert list(out.schema) == [*schema, *EXTRA]
    # Arrow cannot take from string views yet, so both are compared as plain values
    assert out.select(schema.names).to_pylist() == table.slice(400, 400).to_pylist()[::2]
    meta = pq.read_metadata(to)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [100, 100]
    group = meta.row_group(0)
    used = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    wanted = {name: "UNCOMPRESSED" if codec == "none" else codec.upper() for name, codec in codecs.items()}
    assert used == {**wanted, "matched_entries.list.element": "ZSTD", "keep_probability": "ZSTD"}


def test_csv_records_keep_their_bytes(tmp_path: Path) -> None:
    records = [b'"q,1",a\r\n', b"\xff,b\r\n", b'x""y,"c\nd"\n', b"z, e"]
    path = tmp_path / "t.csv"
    path.write_bytes(b'"text",id\r\n' + b"".join(records[:1]) + b"\r\nbad\r\n" + b"".join(records[1:]))
    rows = [0, 2, 3, 4]
    write_kept(only_piece(path), tmp_path / "o.csv", kept_rows(rows), EXTRA)
    tails = [b",[],1", b',"[""entry, 2"", ""a \\""quote\\""""]",' + repr(1 / 3).encode()]
    tails += [b',"[""entry, 3"", ""a \\""quote\\"""", ""\xe6\x97\xa5\xe6\x9c\xac""]",0.25', b",[],0.2"]
    wanted = b'"text",id,matched_entries,keep_probability\r\n'
    ends = [b"\r\n", b"\r\n", b"\n", b"\r\n"]
    for record, tail, end in zip(records, tails, ends):
        wanted += record.rstrip(b"\r\n") + tail + end
    assert (tmp_path / "o.csv").read_bytes() == wanted


def test_jsonl_lines_keep_their_bytes(tmp_path: Path) -> None:
    lines = [b'{"text" : "a\\u00e9" , "n": 1.0}\r\n', b"{ }  \n", b"[1]\n", b'{"text": "x"\t}']
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join(lines[:1]) + b"\n" + b"".join(lines[1:]))
    write_kept(only_piece(path), tmp_path / "o.jsonl", kept_rows([0, 1, 3]), EXTRA)
    tail = '"matched_entries": {}, "keep_probability": {}'
    assert (tmp_path / "o.jsonl").read_bytes().decode() == (
        '{"text" : "a\\u00e9" , "n": 1.0, ' + tail.format("[]", 1) + "}\r\n"
        "{" + tail.format('["entry, 1"]', 0.5) + " }  \n"
        '{"text": "x", ' + tail.format('["entry, 3", "a \\"quote\\"", "日本"]', 0.25) + "\t}\n"
    )


def test_tar_files_keep_their_bytes(tmp_path: Path) -> None:
    members = [
        ("a/0.jpg", b"J" * 700),
        ("a/0.json", b'{\n "caption": "c"\n}\n'),
        ("a/0.txt", b"t0"),
        ("README", b"not a sample"),
        ("x" * 140 + "/1.jpg", b"K" * 512),
        ("a/2.txt", b"t2"),
        ("a/2.JSON", b"{}"),
    ]
    path = tmp_path / "t.tar"
    path.write_bytes(tar_of(members))
    write_kept(only_piece(path), tmp_path / "o.tar", kept_rows([0, 1]), EXTRA)
    data = (tmp_path / "o.tar").read_bytes()
    long = "x" * 140
    assert members_of(data) == [
        members[0],
        ("a/0.json", b'{\n "caption": "c", "matched_entries": [], "keep_probability": 1\n}\n'),
        members[2],
        members[4],
        (f"{long}/1.json", b'{"matched_entries": ["entry, 1"], "keep_probability": 0.5}'),
    ]
    assert len(data) % 10240 == 0
    assert path.read_bytes()[: 512 + 1024] == data[: 512 + 1024]


TREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), TREE, max_size=3), st.integers(0, 2))
def test_fields_join_any_object(value: dict[str, Any], indent: int) -> None:
    text = json.dumps(value, indent=indent or None).encode() + b" \n" * indent
    assert json.loads(with_fields(text, b'"new": [1]')) == {**value, "new": [1]}
    assert with_fields(text, b"") == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])))))
def test_strings_as_json(values: list[Any]) -> None:
    texts = json_texts(pa.array(values, pa.list_(pa.string()))).to_pylist()
    assert [json.loads(text) for text in texts] == values


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.floats()))
def test_numbers_as_json(values: list[float | None]) -> None:
    got = [json.loads(text) for text in json_texts(pa.array(values, pa.float64())).to_pylist()]
    assert got == [v if v is not None and math.isfinite(v) else None for v in values]


@pytest.mark.parametrize(
    "kind", [pa.uint32(), pa.bool_(), pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.int64())]
)
def test_other_types_as_json(kind: pa.DataType) -> None:
    value: Any = {"uint32": 4_000_000_000, "bool": True}.get(
        str(kind), "x" if pa.types.is_dictionary(kind) else [1, None]
    )
    texts = json_texts(pa.array([value, None], kind)).to_pylist()
    assert [json.loads(text) for text in texts] == [value, None]
    with pytest.raises(UsageError, match=r"struct.*cannot be written as text"):
        json_texts(pa.array([{"a": 1}]))


# --------------------------------------------------------------------------------------------------
# What goes wrong
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_input_that_has_an_extra_column_already(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t.{ending}"
    if ending == "tar":
        path.write_bytes(tar_of([("0.json", b'{"keep_probability": 1}'), ("0.txt", b"t")]))
    else:
        write(path, [{"text": "t", "keep_probability": 0.5}])
    with pytest.raises(PairError, match=r"already has the column 'keep_probability'.*Rename or drop"):
        write_kept(only_piece(path), tmp_path / "o", kept_rows([0]), EXTRA)
    assert not list(tmp_path.glob("*o*.writing"))
    assert not (tmp_path / "o").exists()


def test_a_text_that_only_speaks_of_the_column_is_no_clash(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": '"keep_probability": 1', "in": {"keep_probability": 2}}])
    assert write_kept(only_piece(path), tmp_path / "o.jsonl", kept_rows([0]), EXTRA) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_input_that_changed(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"t.{ending}", [{"key": str(i), "caption": "t"} for i in range(5)])
    for rows in ([1, 5], [5000]):
        with pytest.raises(PairError, match=rf"row {rows[-1]} was matched.*ends after 5 rows: it changed"):
            write_kept(only_piece(path), tmp_path / f"o.{ending}", kept_rows(rows), EXTRA)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_parquet_that_lost_its_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [{"text": "t"}] * 20, row_group_size=5)
    last = pieces(find_pairs([path]), rows=5)[-1]
    write(path, [{"text": "t"}] * 10, row_group_size=5)
    with pytest.raises(PairError, match="has 2 row groups, expected more than 3"):
        read_all(last)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "tar", "parquet", "csv.gz", "jsonl.zst"])
def test_damage_leaves_no_output(tmp_path: Path, ending: str) -> None:
    rows = [{"key": str(i), "caption": f"text {i * 7919 % 10007} " * 20} for i in range(3000)]
    path = write(tmp_path / f"t.{ending}", rows)
    piece = only_piece(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4] + (b'"open' if ending == "csv" else b""))
    if ending == "csv":
        path.write_bytes(data[: data.rindex(b"\r\n", 0, len(data) // 2)] + b'\r\n"open')
    if ending == "jsonl":
        path.unlink()  # a cut line is a bad row, not damage
    with pytest.raises(PairError):
        write_kept(piece, tmp_path / "out" / f"o.{ending}", kept_rows([0, 2999], 1), EXTRA)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("rows", [[3, 2], [1, 1]])
def test_kept_rows_must_ascend(tmp_path: Path, rows: list[int]) -> None:
    path = write(tmp_path / "t.csv", [{"text": str(i)} for i in range(9)])
    for step in (1, 2):
        with pytest.raises(UsageError, match="ascending row numbers, each once"):
            write_kept(only_piece(path), tmp_path / "o.csv", kept_rows(rows, step), EXTRA)
    bad = KeptRows(np.array([1, 2]), pa.RecordBatch.from_pylist([made(1)], EXTRA))
    with pytest.raises(UsageError, match="for each of 2 kept rows, got 1 rows"):
        write_kept(only_piece(path), tmp_path / "o.csv", [bad], EXTRA)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"text": "x"}])
    with pytest.raises(OutputError, match=r"o.csv could not be written.*Choose an output folder"):
        write_kept(only_piece(path), path / "o.csv", kept_rows([0]), EXTRA)


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.data.pairs.test_write import EXTRA, kept_rows, only_piece, write_kept
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in sys.argv[2:]:
    to = Path(sys.argv[1]) / "out" / name
    try:
        write_kept(only_piece(Path(sys.argv[1]) / name), to, kept_rows(list(range(6000)), 1000), EXTRA)
    except Exception as error:
        print(name, type(error).__name__, error)
"""


def test_a_full_disk_stops_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes makes the same error as a disk without room."""
    draw = np.random.default_rng(0)
    rows = [{"key": str(i), "caption": draw.bytes(40).hex()} for i in range(6000)]
    endings = ["parquet", "csv", "csv.bz2", "jsonl.gz", "jsonl.zst", "jsonl.xz", "tar"]
    names = [write(tmp_path / f"t.{ending}", rows).name for ending in endings]
    command = [sys.executable, "-c", FULL, tmp_path, *names]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    for name, line in zip(names, done.stdout.splitlines() or [done.stderr], strict=True):
        assert line.startswith(
            f"{name} OutputError The disk is full: {tmp_path / 'out' / name} could not be"
        ), line
        assert "finished files are kept" in line
    assert not list((tmp_path / "out").iterdir())
