"""Joins against a plain dict, in one slice and in many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moviola.engine import LocalEngine, tables
from moviola.engine import joining as j
from moviola.types import UsageError
from tests.engine.helpers import make_rows, rows_of, write_parts


def plain_join(rows: list[tuple], table: dict[int, tuple], how: str) -> list[tuple]:
    """Rows are (key, a, b); the table's values are (count, first_a, first_b)."""
    out = []
    for row in rows:
        match = table.get(row[0])
        if how == "anti":
            out += [] if match else [row]
        elif how == "distinct":
            out += [row] if match is None or match[1:] == row[1:] else []
        elif match or how == "left":
            out.append((*row, *(match or (None, None, None))))
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 9) | st.none(), st.integers(-2, 2), st.integers(0, 2)), max_size=30
    ),
    keys=st.dictionaries(
        st.integers(0, 9), st.tuples(st.integers(1, 9), st.integers(-2, 2), st.integers(0, 2))
    ),
    how=st.sampled_from(["inner", "left", "anti", "distinct"]),
    batch=st.integers(1, 7),
)
def test_any_rows_as_a_dict_joins_them(rows, keys, how, batch, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("join")
    part, table = folder / "p.parquet", folder / "t.parquet"
    pq.write_table(
        pa.table(
            {
                "k": pa.array([r[0] for r in rows], pa.uint64()),
                "a": pa.array([r[1] for r in rows], pa.int32()),
                "b": pa.array([r[2] for r in rows], pa.int64()),
            }
        ),
        part,
    )
    order = sorted(keys)
    pq.write_table(
        pa.table(
            {
                "k": pa.array(order, pa.uint64()),
                "count": pa.array([keys[k][0] for k in order], pa.int64()),
                "first_a": pa.array([keys[k][1] for k in order], pa.int32()),
                "first_b": pa.array([keys[k][2] for k in order], pa.int64()),
            }
        ),
        table,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "READ_ROWS", batch)
        (got,) = LocalEngine(1).join([part], table, "k", folder / "to", how=how)
    expected = plain_join(rows, keys, how)
    assert rows_of(got.path) == expected
    assert (got.read, got.rows) == (len(rows), len(expected))


@pytest.mark.parametrize("how", ["inner", "left", "anti", "distinct"])
def test_slices_of_the_table_and_workers_change_nothing(
    tmp_path: Path, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(30_000)
    parts = write_parts(tmp_path / "in", rows, 3, group=5000)
    table = tmp_path / "twice"
    engine = LocalEngine(1)
    engine.group_count(parts, "id", table, at_least=2, first=("piece", "row"))
    engine.join(parts, table, "id", tmp_path / "a", how=how)
    LocalEngine(2).join(parts, table, "id", tmp_path / "b", how=how)

    class Small(j.Probe):  # slices of 4096 rows of the table, groups of keys of one batch
        def __post_init__(self) -> None:
            self.memory = 1

    monkeypatch.setattr(j, "Probe", Small)
    monkeypatch.setattr(tables, "READ_ROWS", 1000)
    engine.join(parts, table, "id", tmp_path / "c", how=how)
    for part in parts:
        first = rows_of(tmp_path / "a" / part.name)
        assert rows_of(tmp_path / "c" / part.name) == first
        assert (tmp_path / "a" / part.name).read_bytes() == (tmp_path / "b" / part.name).read_bytes()
    assert not list(tmp_path.glob("**/*.work"))
    assert not list(tmp_path.glob("**/*.matches"))


def test_distinct_keeps_the_first_row_of_every_id(tmp_path: Path) -> None:
    rows = make_rows(4000)
    parts = write_parts(tmp_path / "in", rows, 4)
    engine = LocalEngine(1)
    engine.group_count(parts, "id", tmp_path / "twice", at_least=2, first=("piece", "row"))
    joined = engine.join(parts, tmp_path / "twice", "id", tmp_path / "to", how="distinct")
    least: dict[int, tuple[int, int]] = {}
    for row in rows:
        place = (row["piece"], row["row"])
        if row["id"] is not None:
            least[row["id"]] = min(least.get(row["id"], place), place)
    expected = [r for r in rows if r["id"] is None or least[r["id"]] == (r["piece"], r["row"])]
    got = [row for one in joined for row in pq.read_table(one.path).to_pylist()]
    assert got == expected
    assert pq.read_schema(joined[0].path).names == pq.read_schema(parts[0]).names
    assert sum(one.read for one in joined) == len(rows)


def test_a_finished_part_is_kept(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "in", make_rows(600), 3)
    engine = LocalEngine(1)
    engine.group_count(parts, "id", tmp_path / "t")
    first = engine.join(parts, tmp_path / "t", "id", tmp_path / "to")
    before = {one.path: one.path.stat().st_mtime_ns for one in first}
    content = first[1].path.read_bytes()
    first[1].path.unlink()
    assert engine.join(parts, tmp_path / "t", "id", tmp_path / "to") == first
    after = {one.path: one.path.stat().st_mtime_ns for one in first}
    assert {p for p in before if before[p] != after[p]} == {first[1].path}
    assert first[1].path.read_bytes() == content


def test_refusals(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "in", make_rows(60), 2)
    engine = LocalEngine(1)
    table = tmp_path / "t"
    engine.group_count(parts, "id", table)

    def refused(match: str, **other: Any) -> None:
        arguments = {"parts": parts, "table": table, "column": "id", "to": tmp_path / "to"} | other
        with pytest.raises(UsageError, match=match):
            engine.join(**arguments)

    refused("inner, left, anti, distinct", how="outer")
    refused("no column 'row'", column="row")
    refused("starts with 'first_'", how="distinct")
    refused("over its own parts", to=tmp_path / "in")
    refused("the name part-00000", parts=[parts[0], parts[0]])
    wrong = tmp_path / "wrong"
    for values, match in (([2, 1], "not sorted"), ([1, 1], "each value once"), ([1, None], "nulls")):
        pq.write_table(pa.table({"id": pa.array(values, pa.uint64())}), wrong)
        refused(match, table=wrong)
    pq.write_table(pa.table({"id": pa.array([1], pa.int64())}), wrong)
    refused("uint64 in the parts but int64", table=wrong)
    pq.write_table(pa.table({"id": pa.array([1], pa.uint64()), "row": [1]}), wrong)
    refused("has a column 'row' already", table=wrong)
