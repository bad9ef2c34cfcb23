"""Memory depends on the batch, not on the file: the peak is the same for 100,000 and 2,000,000 rows."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .files import tar_of

CODE = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from moviola.data.pairs import parquet
from moviola.data.pairs import KeptRows, find_pairs, pair_columns, pieces, read_texts, write_kept
piece, = pieces(find_pairs([sys.argv[1]]), rows=1 << 40)
parquet._GROUP_BYTES = 4 << 20  # kept rows wait up to this for their row group: a constant, made small
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
rows = sum(batch.rows for batch in read_texts(piece, pair_columns(piece.file)))
reading = peak()
schema = pa.schema([("keep_probability", pa.float64())])
def kept():
    for start in range(0, rows, 10_000):
        some = np.arange(start, min(rows, start + 10_000), 2)
        yield KeptRows(some, pa.record_batch([pa.array(np.full(len(some), 0.5))], schema=schema))
written = write_kept(piece, Path(sys.argv[2]), kept(), schema)
print(rows, written, reading, peak())
"""


def make(path: Path, rows: int) -> None:
    """`rows` rows of about 100 bytes, in one row group where there are such."""
    draw = np.random.default_rng(0)
    some = 1000
    texts = [draw.bytes(30).hex() for _ in range(some)]
    if path.suffix == ".parquet":
        table = pa.table({"id": [f"id-{i:020d}" for i in range(some)], "caption": texts})
        whole = pa.concat_tables([table] * (rows // some))
        pq.write_table(whole, path, row_group_size=rows, use_dictionary=False)
    elif path.suffix == ".tar":
        members = [(f"{i:06d}.{e}", t.encode()) for i, t in enumerate(texts) for e in ("jpg", "txt")]
        block = tar_of(members)[: 2 * some * 1024]
        with path.open("wb") as file:
            for _ in range(rows // some):
                file.write(block)
            file.write(bytes(1024))
    else:
        csv = path.name.startswith("csv")
        lines = [
            f'"{i}","{t}\n"\n' if csv else f'{{"id": {i}, "caption": "{t}"}}\n' for i, t in enumerate(texts)
        ]
        block = "".join(lines).encode()
        with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
            file.write(b"id,caption\n" if csv else b"")
            for _ in range(rows // some):
                file.write(block)


def peaks(tmp_path: Path, name: str, rows: int) -> tuple[float, float]:
    path = tmp_path / f"{rows}" / name
    path.parent.mkdir()
    make(path, rows)
    command = [sys.executable, "-c", CODE, path, path.with_name("out-" + name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read, written, reading, writing = done.stdout.split()
    assert (int(read), int(written)) == (rows, rows // 2)
    return float(reading), float(writing)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["t.parquet", "csv.csv", "t.jsonl", "t.jsonl.gz", "t.tar"])
def test_peak_memory_is_flat(tmp_path: Path, name: str) -> None:
    many = 200_000 if name == "t.tar" else 2_000_000
    small, large = peaks(tmp_path, name, 100_000), peaks(tmp_path, name, many)
    print(f"{name}: {small} MB at 100,000 rows, {large} MB at {many:,}")
    # the file grows by 150 MB and more; tens of MB are the allocator's, and stop growing at 500,000 rows
    assert large[0] < small[0] + 48
    assert large[1] < small[1] + 48
