"""The engine Daft: native on one machine, or on a Ray cluster whose machines see the same paths.

Group-by, join and sort are Daft's own; what it finds is streamed into the same writer as everywhere, so
the files have the same bytes. Wide columns never cross a shuffle: a join moves (key, part, row) only.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moviola.engine import counting as c
from moviola.engine import joining as j
from moviola.engine.local import MEMORY
from moviola.engine.requests import CountRequest, Joined, JoinRequest, steps, work_folder
from moviola.engine.tables import batches, open_part
from moviola.engine.tasks import Function, Ledger, OnDone, Outcome, Progress, run_task
from moviola.types import MissingExtra, MoviolaError, UsageError

_QUIET = {
    "DO_NOT_TRACK": "1",
    "DAFT_ANALYTICS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_started: str | None = None  # Daft takes one runner per process
NATIVE = "native"
_DEATH = ("UDF process closed", "UDF process has terminated", "WorkerCrashedError", "worker died")
"""What Daft and Ray say when a worker process has gone."""


def _load(address: str | None) -> Any:
    """Import Daft without its telemetry and choose its runner."""
    global _started
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import daft
    except ModuleNotFoundError as error:
        if error.name != "daft":
            raise
        raise MissingExtra("daft", "daft" if address is None else "ray") from error
    wanted = address or NATIVE
    if _started is not None:
        if _started != wanted:
            raise UsageError(
                f"Daft runs on '{_started}' in this process and cannot change to '{wanted}'.",
                hint="Start a new process for another engine.",
            )
        return daft
    if address is None:
        daft.set_runner_native()
    else:
        try:
            import ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise MissingExtra("ray", "ray") from error
        if not ray.is_initialized():
            try:
                ray.init(
                    None if address == "local" else address,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            except (ConnectionError, ValueError) as error:
                raise UsageError(
                    f"No Ray cluster answers at '{address}' ({error}).",
                    hint="Give host:port, ray://host:port, or 'local' for this machine.",
                ) from error
        daft.set_runner_ray(noop_if_initialized=True)
    _started = wanted
    return daft


@lru_cache(maxsize=1)
def _unpacked(setup: bytes) -> Any:
    """The function as it was sent, once per worker: it may keep state between its tasks."""
    return pickle.loads(setup)  # noqa: S301 - from our own parent process


def _run_packed(setup: bytes, packed: bytes) -> str:
    function, key, skip = _unpacked(setup)
    index, task, output = pickle.loads(packed)  # noqa: S301 - from our own parent process
    return f"{index} {run_task(function, task, output, key, skip).to_json()}"


class DaftEngine:
    """`address` None runs in this process; "local" or a cluster's address runs on Ray.

    One process can use only one of the two. `memory` bounds what this process holds for a dense count;
    Daft looks after its own.
    """

    def __init__(self, address: str | None = None, memory: int = MEMORY) -> None:
        self.name = "daft" if address is None else "ray"
        self.memory = memory
        self._address = address
        self._daft = _load(address)

    def map(
        self,
        function: Function,
        tasks: Sequence[Any],
        outputs: Sequence[Path],
        *,
        key: str = "",
        skip: tuple[type[MoviolaError], ...] = (),
        on_done: OnDone | None = None,
    ) -> list[Any]:
        """`Engine.map`, the tasks as rows of a table and the function as Daft's user function."""
        ledger = Ledger(tasks, outputs, key, on_done)
        if not ledger.left:
            return ledger.results
        daft = self._daft
        setup = pickle.dumps((function, key, skip))

        # the native runner's threads would share one interpreter lock; Ray's workers are processes already
        @daft.func.batch(
            return_dtype=daft.DataType.string(),
            batch_size=1,
            use_process=True if self.name == "daft" else None,
        )
        def run(tasks: Any) -> list[str]:
            return [_run_packed(setup, packed) for packed in tasks.to_pylist()]

        rows = [pickle.dumps((index, tasks[index], Path(outputs[index]))) for index in ledger.left]
        frame = daft.from_pydict({"task": rows})
        if self.name == "ray":
            frame = frame.into_partitions(len(rows))
        frame = frame.select(run(daft.col("task")).alias("outcome"))
        try:
            for batch in frame.to_arrow_iter():
                for line in batch.column(0).to_pylist():
                    index, outcome = line.split(" ", 1)
                    ledger.take(int(index), Outcome.from_json(outcome))
        except RuntimeError as error:
            if any(sign in str(error) for sign in _DEATH):
                raise ledger.died() from error
            raise
        return ledger.results

    def group_count(
        self,
        parts: Sequence[Path],
        column: str,
        to: Path,
        *,
        at_least: int = 1,
        size: int | None = None,
        first: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> int:
        """`Engine.group_count` by Daft's group-by and sort."""
        request = CountRequest.of(parts, column, to, at_least, size, first, self.memory)
        if request.done is not None:
            return request.done
        what = request.what
        daft = self._daft
        value = daft.col("value")
        frame = daft.read_parquet([str(part) for part in request.parts])
        kept = [daft.col(column).alias("value")]
        if first:
            kept.append(_packed(daft, [daft.col(name) for name in first]).alias("first"))
        frame = frame.select(*kept)
        if what.listed:
            frame = frame.explode("value")
        frame = frame.where(value.not_null())
        found = [value.count().alias("count")]
        if first:
            found.append(daft.col("first").min().alias("first"))
        frame = frame.groupby("value").agg(*found)
        if at_least > 1:
            frame = frame.where(daft.col("count") >= at_least)
        frame = frame.sort("value")

        def rows() -> Iterator[pa.RecordBatch]:
            for batch in frame.to_arrow_iter():
                columns = [batch.column("value").cast(what.kind), batch.column("count").cast(pa.int64())]
                if first:
                    columns += unpack(batch.column("first"), what.first_kinds)
                yield pa.RecordBatch.from_arrays(columns, schema=what.schema)

        if size is None:
            total = request.finish(rows())
        else:
            counts_S = np.zeros(size, np.int64)
            for batch in rows():
                values_N = batch.column(0).to_numpy()
                c.check_range(values_N, size, "the parts", column)
                counts_S[values_N] = batch.column(1).to_numpy()
            total = request.finish_dense(counts_S)
        if progress is not None:
            progress(1, 1)
        return total

    def join(
        self,
        parts: Sequence[Path],
        table: Path,
        column: str,
        to: Path,
        *,
        how: j.How = "inner",
        progress: Progress | None = None,
    ) -> list[Joined]:
        """`Engine.join`: Daft joins (key, part, row) with the table, then each part meets its matches."""
        request = JoinRequest.of(parts, table, column, to, how)
        if request.done is not None:
            return request.done
        for _ in j.check_rising(request.table, column):
            pass
        daft = self._daft
        what = request.what
        col = daft.col
        with work_folder(request.to / "join", request.key) as work:
            places = [work / f"matches-{number:05d}" for number in range(len(request.parts))]
            left = (
                daft.from_pydict(row_groups(request.parts))
                .select(
                    col("part"),
                    _keys(daft, column, what.key_kind)(col("path"), col("group"), col("first")).alias("at"),
                )
                .explode("at")
                .where(col("at").not_null())
                .select(col("part"), col("at").get("key").alias("key"), col("at").get("row").alias("row"))
            )
            right = daft.read_parquet(str(request.table)).select(
                col(column).alias("key"), *(col(name).alias(f"c{i}") for i, name in enumerate(what.names))
            )
            both = left.join(right, on="key", how="inner")
            names = [f"c{i}" for i in range(len(what.names))]
            frame = both.select("part", "row", *names).sort(["part", "row"])
            write_matches(frame.to_arrow_iter(), names, places, what)
            found = self.map(
                j.ZipTask(what),
                list(zip(request.parts, places, strict=True)),
                request.outputs,
                key=request.key,
                on_done=steps(progress, len(places)),
            )
            return request.results(found)


# --------------------------------------------------------------------------------------------------
# Least tuples: as bytes that order like the tuple, since Daft's least value is of one column
# --------------------------------------------------------------------------------------------------


def pack(columns: Sequence[pa.Array]) -> pa.Array:
    """Integer columns -> one binary column whose byte order is the tuples' order."""
    parts = []
    for column in columns:
        numbers_N = column.to_numpy(zero_copy_only=False)
        if numbers_N.dtype.kind == "i":  # the sign bit turned over puts negative numbers first
            numbers_N = numbers_N.astype(np.int64).view(np.uint64) ^ np.uint64(1 << 63)
        big_N = numbers_N.astype(">u8")
        parts.append(big_N.view(np.uint8).reshape(len(big_N), 8))
    packed_NW = np.ascontiguousarray(np.concatenate(parts, axis=1))
    width = pa.binary(packed_NW.shape[1])
    return pa.Array.from_buffers(width, len(packed_NW), [None, pa.py_buffer(packed_NW)]).cast(
        pa.large_binary()
    )


def unpack(packed: pa.Array, kinds: Sequence[pa.DataType]) -> list[pa.Array]:
    """What `pack` packed."""
    width = 8 * len(kinds)
    flat = np.frombuffer(b"".join(packed.to_pylist()), np.uint8).reshape(-1, width)
    columns = []
    for index, kind in enumerate(kinds):
        numbers_N = np.ascontiguousarray(flat[:, 8 * index : 8 * index + 8]).view(">u8").ravel()
        numbers_N = numbers_N.astype(np.uint64)
        if pa.types.is_signed_integer(kind):
            numbers_N = (numbers_N ^ np.uint64(1 << 63)).view(np.int64)
        columns.append(pa.array(numbers_N).cast(kind))
    return columns


def _packed(daft: Any, columns: Sequence[Any]) -> Any:
    @daft.func.batch(return_dtype=daft.DataType.binary())
    def packed(*series: Any) -> pa.Array:
        return pack([one.to_arrow() for one in series])

    return packed(*columns)


# --------------------------------------------------------------------------------------------------
# Keys of a join with their places
# --------------------------------------------------------------------------------------------------


def row_groups(parts: Sequence[Path]) -> dict[str, list[Any]]:
    """Every row group of the parts: the part's number and path, the group and its first row."""
    table: dict[str, list[Any]] = {"part": [], "path": [], "group": [], "first": []}
    for number, path in enumerate(parts):
        with open_part(path) as file:
            first = 0
            for group in range(file.metadata.num_row_groups):
                for name, value in zip(table, (number, str(path), group, first), strict=True):
                    table[name].append(value)
                first += file.metadata.row_group(group).num_rows
    return table


def keys_of(path: str, group: int, first: int, column: str) -> pa.Array:
    """(key, row of the part) of one row group, rows without a key left out."""
    found = []
    for batch in batches(Path(path), [column], group=group):
        keys = batch.column(0)
        rows = pa.array(np.arange(first, first + len(keys)))
        first += len(keys)
        there = keys.is_valid()
        found.append(pa.StructArray.from_arrays([keys.filter(there), rows.filter(there)], ["key", "row"]))
    return pa.concat_arrays(found)


def _keys(daft: Any, column: str, kind: pa.DataType) -> Any:
    of_row = daft.DataType.struct({"key": daft.DataType.from_arrow_type(kind), "row": daft.DataType.int64()})

    @daft.func.batch(return_dtype=daft.DataType.list(of_row), batch_size=1)
    def keys(paths: Any, groups: Any, firsts: Any) -> pa.Array:
        found = [
            keys_of(path, group, first, column)
            for path, group, first in zip(
                paths.to_pylist(), groups.to_pylist(), firsts.to_pylist(), strict=True
            )
        ]
        ends = np.cumsum([0, *map(len, found)])
        return pa.LargeListArray.from_arrays(pa.array(ends), pa.concat_arrays(found))

    return keys


def write_matches(
    rows: Iterator[pa.RecordBatch], names: Sequence[str], places: Sequence[Path], what: j.Joining
) -> None:
    """Rows sorted by (part, row) -> one file of matches per part, also for parts without any."""
    schema = what.match_schema
    waiting: list[tuple[int, pa.RecordBatch]] = []

    def pieces() -> Iterator[tuple[int, pa.RecordBatch]]:
        for batch in rows:
            parts_N = batch.column("part").to_numpy()
            edges = np.flatnonzero(np.diff(parts_N)) + 1
            for start, end in zip([0, *edges], [*edges, len(parts_N)], strict=True):
                if end > start:
                    columns = [batch.column(name).slice(start, end - start) for name in ("row", *names)]
                    cast = [one.cast(field.type) for one, field in zip(columns, schema, strict=True)]
                    yield int(parts_N[start]), pa.RecordBatch.from_arrays(cast, schema=schema)

    source = pieces()

    def of_part(number: int) -> Iterator[pa.RecordBatch]:
        while True:
            if not waiting:
                piece = next(source, None)
                if piece is None:
                    return
                waiting.append(piece)
            if waiting[0][0] != number:
                return
            yield waiting.pop()[1]

    for number, place in enumerate(places):
        c.write_run(place, schema, of_part(number))
