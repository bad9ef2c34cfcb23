"""Counts in bounded memory equal a plain Counter's, whatever the memory and the order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.data import tally
from moviola.data.tally import Runs, Tally, best, merged, read_tables, with_counts, write_tables

words = st.text(st.characters(codec="utf-8"), max_size=3)


def rows(path):
    return [tuple(row.values()) for t in read_tables(path) for row in t.to_pylist()]


def counted(folder, strings, *, limit=None):
    made = Tally(folder / "runs")
    if limit is not None:
        made._limit = limit
    for string in strings:
        made.add([string])
    made.finish(folder / "out.parquet")
    return rows(folder / "out.parquet")


def by_bytes(counts):
    return sorted(counts.items(), key=lambda item: item[0].encode())


@settings(max_examples=40, deadline=None)
@given(strings=st.lists(words, max_size=60), limit=st.integers(1, 9), block=st.integers(1, 5))
def test_equals_a_counter_for_any_memory(tmp_path_factory, strings, limit, block):
    folder = tmp_path_factory.mktemp("tally")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "BLOCK", block)
        patch.setattr(tally, "FAN_IN", 3)
        assert counted(folder, strings, limit=limit) == by_bytes(Counter(strings))
    assert not (folder / "runs").exists()


def test_the_file_does_not_depend_on_order_or_memory(tmp_path):
    strings = [str(n % 97) for n in range(1000)]
    shuffled = random.Random(1).sample(strings, len(strings))
    for name, given_strings, limit in (("a", strings, None), ("b", shuffled, 20)):
        (tmp_path / name).mkdir()
        counted(tmp_path / name, given_strings, limit=limit)
    assert (tmp_path / "a/out.parquet").read_bytes() == (tmp_path / "b/out.parquet").read_bytes()


def test_runs_sum_every_column(tmp_path):
    runs = Runs(tmp_path / "r", ("count", "first"))
    runs._limit = 2
    for value, count in (("b", 1), ("a", 2), ("b", 3), ("c", 4), ("a", 5)):
        runs.add(pa.table({"value": [value], "count": [count], "first": [10 * count]}))
    table = pa.concat_tables(runs.merged())
    assert table.to_pydict() == {"value": ["a", "b", "c"], "count": [7, 4, 4], "first": [70, 40, 40]}


@settings(max_examples=40, deadline=None)
@given(
    counts=st.dictionaries(words, st.integers(1, 99), max_size=30),
    asked=st.lists(words, max_size=30),
    block=st.integers(1, 6),
)
def test_merge_join_equals_a_dictionary(counts, asked, block):
    known = by_bytes(counts)
    asked = sorted(asked, key=str.encode)
    blocks = [
        pa.table(
            {"value": [v for v, _ in known[i : i + block]], "count": [c for _, c in known[i : i + block]]}
        )
        for i in range(0, len(known), block)
    ]
    tables = [pa.table({"word": asked[i : i + 4]}) for i in range(0, len(asked), 4)]
    found = [
        (row["word"], row["n"])
        for t in with_counts(tables, iter(blocks), "word", "n")
        for row in t.to_pylist()
    ]
    assert found == [(word, counts[word]) for word in asked if word in counts]


def test_best_keeps_the_greatest_and_orders_equals_by_value(monkeypatch):
    monkeypatch.setattr(tally, "BLOCK", 2)
    tables = [pa.table({"value": [f"w{n:02d}"], "count": [n % 5]}) for n in range(30)]
    found = best(iter(tables), "count", least=2, most=7)
    assert found["value"].to_pylist() == ["w04", "w09", "w14", "w19", "w24", "w29", "w03"]
    assert best(iter([]), "count", least=1).num_rows == 0


def test_a_file_is_whole_or_not_there(tmp_path):
    def breaks():
        yield pa.table({"value": ["a"], "count": [1]})
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_tables(breaks(), tmp_path / "out.parquet", ("count",))
    assert list(tmp_path.iterdir()) == []


def test_no_files_give_no_rows():
    assert list(merged([])) == []


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """Ten times the strings take no more memory, once everything has been used once."""
    script = """
import sys
from pathlib import Path
from moviola.data.tally import Tally
def peak():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) >> 10
for count in (200_000, 2_000_000):
    t = Tally(Path(sys.argv[1]) / 'runs', memory=16 << 20)
    for n in range(0, count, 1000):
        t.add(f'{(n + k) * 2654435761 % 4294967291:x} some words' for k in range(1000))
    print(t.finish(Path(sys.argv[1]) / 'out.parquet'), peak())
"""
    if not os.path.exists("/proc/self/status"):  # noqa: PTH110
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=250
    )
    (few, before), (many, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (200_000, 2_000_000)
    assert after - before < 80  # MB; a dictionary of them all takes over 300
