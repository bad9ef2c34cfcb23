"""A table larger than the memory it is given: the peak of a fresh process stays under the cap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = 6_000_000
MEMORY = 48 << 20

CHILD = """
import json, re, sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from moviola.engine import LocalEngine

def peak():
    # ru_maxrss of a child starts at its parent's peak; VmHWM is this process's own
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def forbidden(*arguments, **options):
    raise AssertionError("a whole table was read")

pq.read_table = pq.ParquetFile.read = pq.ParquetFile.read_row_group = forbidden
folder, memory = Path(sys.argv[1]), int(sys.argv[2])
parts = sorted(folder.glob("part-*"))
run = LocalEngine(1, memory)
def both(parts, to):
    rows = run.group_count(parts, "id", to / "counts", first=("piece", "row"))
    count = peak()
    joined = run.join(parts, to / "counts", "id", to / "to", how="left")
    return rows, count, sum(one.rows for one in joined), peak()

both([folder / "small.parquet"], folder / "small")  # the libraries' code is in memory after this
base = peak()
rows, count, joined, join = both(parts, folder)
print(json.dumps({"base": base, "count": count, "join": join, "rows": rows, "joined": joined}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_stays_under_the_table(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids_N = random.integers(0, 2**63, ROWS * 9 // 10).astype(np.uint64)
    ids_N = random.permutation(np.concatenate([ids_N, ids_N[: ROWS - len(ids_N)]]))
    schema = pa.schema([("piece", pa.int32()), ("row", pa.int64()), ("id", pa.uint64())])
    for number, start in enumerate(range(0, ROWS, ROWS // 2)):  # row groups larger than the memory too
        ids = ids_N[start : start + ROWS // 2]
        piece = np.full(len(ids), number, np.int32)
        table = pa.table([piece, np.arange(len(ids)), ids], schema=schema)
        pq.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=ROWS // 2)
    pq.write_table(table.slice(0, 1000), tmp_path / "small.parquet")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(MEMORY)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    got = json.loads(done.stdout)
    assert got["rows"] == len(np.unique(ids_N))
    assert got["joined"] == ROWS
    in_memory = ROWS * (8 + 8 + 4 + 8)  # value, count and first of every row
    assert in_memory > 3 * MEMORY
    for step in ("count", "join"):
        # the memory given, and what readers, writers and allocators hold whatever the table's size
        assert got[step] - got["base"] < MEMORY + (72 << 20) < in_memory, got
