"""group_count against a plain dict; memory, resumption and the same bytes from any split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moviola.engine import LocalEngine
from moviola.engine import counting as c
from moviola.types import MoviolaError, UsageError
from tests.engine.helpers import make_rows, plain_count, rows_of, write_parts

KINDS = {
    "uint64": (pa.uint64(), st.integers(0, 2**64 - 1) | st.integers(0, 3)),
    "int32": (pa.int32(), st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 2)),
    "string": (pa.string(), st.text(max_size=3) | st.sampled_from(["", "a", "é", "\U0001f600", "\uffff"])),
}


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_values_as_a_dict_counts_them(kind: str, data: st.DataObject, tmp_path_factory) -> None:
    arrow, values = KINDS[kind]
    rows = data.draw(
        st.lists(st.tuples(values | st.none(), st.integers(-3, 3), st.integers(0, 2)), max_size=40)
    )
    least = data.draw(st.integers(1, 3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    folder = tmp_path_factory.mktemp("count")
    parts = []
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        chunk = rows[start:end]
        table = pa.table(
            {
                "v": pa.array([r[0] for r in chunk], arrow),
                "a": pa.array([r[1] for r in chunk], pa.int16()),
                "b": pa.array([r[2] for r in chunk], pa.uint8()),
            }
        )
        parts.append(folder / f"{number}.parquet")
        pq.write_table(table, parts[-1])
    got = LocalEngine(1).group_count(parts, "v", folder / "to", at_least=least, first=("a", "b"))
    named = [{"v": v, "a": a, "b": b} for v, a, b in rows]
    expected = [row for row in plain_count(named, "v", ("a", "b")) if row[1] >= least]
    assert rows_of(folder / "to") == expected
    assert got == len(expected)
    assert pq.read_schema(folder / "to").types == [arrow, pa.int64(), pa.int16(), pa.uint8()]


def test_spills_and_merges_give_the_same_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(6000)
    parts = write_parts(tmp_path / "in", rows, 5)
    LocalEngine(1).group_count(parts, "id", tmp_path / "a", first=("piece", "row"))
    # blocks of 16 rows and buffers of a few hundred: many spills, merges of merges
    spilled: list[Path] = []
    real = c.write_run

    def counted(path: Path, schema: pa.Schema, batches, **options: bool) -> int:
        spilled.append(path)
        return real(path, schema, batches, **options)

    monkeypatch.setattr(c, "BLOCK_ROWS", 16)
    monkeypatch.setattr(c, "buffer_bytes", lambda memory: 2048)
    monkeypatch.setattr(c, "fan_in", lambda memory, what: 3)
    monkeypatch.setattr(c, "write_run", counted)
    LocalEngine(1).group_count(parts, "id", tmp_path / "b", first=("piece", "row"))
    assert sum("spill" in path.name for path in spilled) > 20
    assert sum("merged" in path.name for path in spilled) > 5
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert rows_of(tmp_path / "a") == plain_count(rows, "id", ("piece", "row"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.json", "b", "b.json", "in"]


@pytest.mark.parametrize(
    ("column", "options"),
    [
        ("id", {"first": ("piece", "row")}),
        ("entries", {}),
        ("entries", {"size": 50, "at_least": 0}),
        ("language", {}),
    ],
)
def test_same_bytes_from_any_number_of_parts_and_workers(tmp_path: Path, column: str, options: dict) -> None:
    rows = make_rows(3000)
    seen = set()
    for count in (1, 2, 7):
        parts = write_parts(tmp_path / f"in{count}", rows, count)
        for workers in (1, 2) if count == 7 and column == "id" else (1,):
            to = tmp_path / f"{count}-{workers}"
            LocalEngine(workers, memory=32 << 20).group_count(parts, column, to, **options)
            seen.add(to.read_bytes())
    assert len(seen) == 1
    expected = plain_count(rows, column, options.get("first", ()))
    if "size" in options:
        counts = dict(expected)
        expected = [(n, counts.get(n, 0)) for n in range(50)]
    assert rows_of(tmp_path / "7-1") == expected


def test_dense_and_sorted_counts_agree(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "in", make_rows(2000), 3)
    LocalEngine(1).group_count(parts, "entries", tmp_path / "dense", size=40)
    LocalEngine(1).group_count(parts, "entries", tmp_path / "sorted")
    assert (tmp_path / "dense").read_bytes() == (tmp_path / "sorted").read_bytes()


def test_a_finished_count_is_not_made_again_unless_parts_or_settings_change(tmp_path: Path) -> None:
    rows = make_rows(500)
    parts = write_parts(tmp_path / "in", rows, 2)
    engine = LocalEngine(1)
    to = tmp_path / "to"
    first = engine.group_count(parts, "id", to)
    before = to.stat().st_mtime_ns
    assert engine.group_count(parts, "id", to) == first
    assert to.stat().st_mtime_ns == before
    assert engine.group_count(parts, "id", to, at_least=2) < first
    write_parts(tmp_path / "in", rows[:100], 2)
    engine.group_count(parts, "id", to)
    assert rows_of(to) == plain_count(rows[:100], "id")


def test_after_a_failure_finished_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(900)
    parts = write_parts(tmp_path / "in", rows, 3)
    monkeypatch.setattr(c, "buffer_bytes", lambda memory: 4000)  # one task per part
    good = parts[2].read_bytes()
    chunk = pq.read_metadata(parts[2]).row_group(0).column(4)
    assert chunk.path_in_schema.startswith("entries")
    start = chunk.dictionary_page_offset
    parts[2].write_bytes(good[:start] + b"x" * 50 + good[start + 50 :])
    engine = LocalEngine(1)
    with pytest.raises(MoviolaError, match="part-00002"):
        engine.group_count(parts, "entries", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert next(tmp_path.glob(".to.*.work/run-00001.json")).exists()
    parts[2].write_bytes(good)  # another time of change: a new request, old work goes
    engine.group_count(parts, "entries", tmp_path / "to")
    assert rows_of(tmp_path / "to") == plain_count(rows, "entries")
    assert not list(tmp_path.glob(".to.*"))


def test_nothing_but_nulls(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"v": pa.array([[], None, [None]], pa.list_(pa.uint32()))}), path)
    assert LocalEngine(1).group_count([path], "v", tmp_path / "to") == 0
    assert pq.read_schema(tmp_path / "to").names == ["v", "count"]
    assert LocalEngine(1).group_count([path], "v", tmp_path / "dense", size=3, at_least=0) == 3


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        ("nothing", {}, "It has: piece, row, id"),
        ("id", {"at_least": 0}, "1 or more"),
        ("id", {"first": ("language",)}, "must be integers"),
        ("entries", {"size": 10}, "outside 0 to 9"),
        ("entries", {"size": 10**9}, "Give more memory"),
        ("language", {"size": 10}, "integers"),
        ("id", {"size": 10, "first": ("row",)}, "together"),
    ],
)
def test_refusals(tmp_path: Path, column: str, options: dict, message: str) -> None:
    parts = write_parts(tmp_path / "in", make_rows(60), 1)
    with pytest.raises(MoviolaError, match=message):
        LocalEngine(1).group_count(parts, column, tmp_path / "to", **options)
    assert not (tmp_path / "to").exists()


def test_parts_whose_types_differ_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"v": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"v": pa.array([1], pa.int64())}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"int32 in .*a.parquet but int64 in .*b.parquet"):
        LocalEngine(1).group_count([tmp_path / "a.parquet", tmp_path / "b.parquet"], "v", tmp_path / "to")


def test_least_tuple_of_values_met_once_and_often() -> None:
    schema = pa.schema(
        [("v", pa.uint64()), ("count", pa.int64()), ("first_a", pa.int32()), ("first_b", pa.int64())]
    )
    columns = [
        np.array([7, 5, 7, 9, 7], np.uint64),
        np.array([1, 2, 3, 4, 5]),
        np.array([2, 0, 1, 9, 1], np.int32),
        np.array([0, 0, 8, 9, 3]),
    ]
    got = c.aggregate(pa.RecordBatch.from_arrays([pa.array(one) for one in columns], schema=schema))
    assert [tuple(r.values()) for r in got.to_pylist()] == [(5, 2, 0, 0), (7, 9, 1, 3), (9, 4, 9, 9)]
