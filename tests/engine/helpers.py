"""Parts, plain answers and task functions for the engine's tests. Functions here travel to workers."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moviola.files import atomic
from moviola.types import MediaError, UsageError

SCHEMA = pa.schema(
    [
        ("piece", pa.int32()),
        ("row", pa.int64()),
        ("id", pa.uint64()),
        ("language", pa.dictionary(pa.int32(), pa.string())),
        ("entries", pa.list_(pa.uint32())),
    ]
)


def make_rows(count: int, seed: int = 0, ids: int | None = None) -> list[dict[str, Any]]:
    """Rows of one world, whatever the number of parts: (piece, row) name a row's place in it."""
    random = np.random.default_rng(seed)
    values = random.integers(0, ids or max(1, count // 2), count).astype(np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    return [
        {
            "piece": int(n % 3) - 1,
            "row": n // 3,
            "id": int(values[n]) if n % 11 else None,
            "language": ("en", "de", "zürich")[int(random.integers(3))],
            "entries": [int(e) for e in random.integers(0, 40, int(random.integers(0, 5)))],
        }
        for n in range(count)
    ]


def write_parts(folder: Path, rows: list[dict[str, Any]], parts: int, group: int = 100) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for number in range(parts):
        start, end = len(rows) * number // parts, len(rows) * (number + 1) // parts
        path = folder / f"part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[start:end], schema=SCHEMA), path, row_group_size=group)
        out.append(path)
    return out


def plain_count(
    rows: list[dict[str, Any]], column: str, first: tuple[str, ...] = ()
) -> list[tuple[Any, ...]]:
    counts: dict[Any, int] = defaultdict(int)
    least: dict[Any, tuple[int, ...]] = {}
    for row in rows:
        values = row[column] if isinstance(row[column], list) else [row[column]]
        for value in values:
            if value is None:
                continue
            counts[value] += 1
            mine = tuple(row[name] for name in first)
            least[value] = min(least.get(value, mine), mine)
    order = sorted(counts, key=lambda v: v.encode() if isinstance(v, str) else v)
    return [(value, counts[value], *least[value]) for value in order]


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


# --------------------------------------------------------------------------------------------------
# Task functions
# --------------------------------------------------------------------------------------------------


def square(task: int, output: Path) -> dict[str, int]:
    with atomic(output) as file:
        file.write(str(task * task).encode())
    return {"task": task, "square": task * task}


def refuse_odd(task: int, output: Path) -> int:
    if task % 2:
        raise MediaError(f"file-{task}", "it is odd.", hint="Make it even.")
    square(task, output)
    return task


def wrong_usage(task: int, output: Path) -> int:
    if task == 3:
        raise UsageError("Three is not allowed.", hint="Leave it out.")
    square(task, output)
    return task


def full_disk(task: int, output: Path) -> int:
    raise OSError(28, "No space left on device", str(output))


def writes_nothing(task: int, output: Path) -> int:
    return task


@dataclass
class DieOnce:
    """Kills its own process on one task, the first time."""

    marker: Path
    fatal: int

    def __call__(self, task: int, output: Path) -> int:
        if task == self.fatal and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        square(task, output)
        return os.getpid()


@dataclass
class Slow:
    """Notes every start in a file, so that a test sees which tasks ran."""

    log: Path
    seconds: float

    def __call__(self, task: int, output: Path) -> int:
        with self.log.open("a") as file:
            file.write(f"{task}\n")
        time.sleep(self.seconds)
        square(task, output)
        return task
