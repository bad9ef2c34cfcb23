"""Writing an index: one writer at a time, whole commits or none, segments merged as they pile up."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import filelock
import numpy as np
import pyarrow as pa

from moviola.store.format import (
    LOCK,
    MANIFEST,
    OUR_PREFIXES,
    TEXTS_SCHEMA,
    FileRow,
    Manifest,
    ModelCard,
    Sampling,
    Segment,
    files_from,
    files_table,
    open_segment,
    read_manifest,
    units_schema,
)
from moviola.store.scan import to_halves
from moviola.types import StoreError, printable

# Eight segments of about one size become one, until a segment has this many rows: an index of a
# million frames is some twenty files, and every row is rewritten a few times at most.
_FAN = 8
_LARGEST = 1 << 16
# Rows copied at once when segments are merged: this bounds its memory, not the index's size.
_COPY_ROWS = 2048
# A segment is rewritten when this share of its rows no longer counts.
_DEAD = 0.3

_FULL = {errno.ENOSPC, errno.EDQUOT}


class Writer:
    """The only writer of an index; use it in a `with`. Everything added counts from `commit` on.

    Opening makes a new index where the folder is missing or empty (it appears with the first
    commit), and refuses at once when another process writes, when the folder holds something else,
    or when the index was made with another model, recipe or sampling.
    """

    def __init__(self, folder: str | Path, model: ModelCard, sampling: Sampling) -> None:
        self.folder = Path(folder)
        try:
            self._made_folder = not self.folder.exists()
            self._check_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._write_error(error) from error
        self._lock = filelock.FileLock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise StoreError(
                f"Another process is writing the index {printable(self.folder)} "
                f"(it holds the lock {printable(self.folder / LOCK)}).",
                hint="Wait until it has finished, or stop it, and run the same command again.",
            ) from None
        except OSError as error:
            raise self._write_error(error) from error
        try:
            self.is_new = not (self.folder / MANIFEST).exists()
            if self.is_new:
                self.manifest = Manifest(model=model, sampling=sampling)
                self.files: dict[bytes, FileRow] = {}
            else:
                self.manifest = read_manifest(self.folder)
                self._check_same(model, sampling)
                self.files = files_from(open_segment(self.folder, self.manifest.files))
            self._next_take = self.manifest.next_take
            self._serial = self._last_serial()
            self._units: list[pa.RecordBatch] = []
            self._texts: list[pa.RecordBatch] = []
            self._dirty = self._learn_tokenizer(model)
            self._sweep()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock. What was not committed is dropped; a folder without an index goes too."""
        if not (self.folder / MANIFEST).exists():
            self._sweep()
            if self._made_folder:
                (self.folder / LOCK).unlink(missing_ok=True)
                self._lock.release()
                if not any(self.folder.iterdir()):
                    self.folder.rmdir()
                return
        self._lock.release()

    # -- what counts as ours ---------------------------------------------------------------------

    def _check_folder(self) -> None:
        where = printable(self.folder)
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise StoreError(
                f"{where} is a file; an index is a folder.", hint="Choose another name after --to."
            )
        if (self.folder / MANIFEST).exists():
            return
        strange = [path for path in self.folder.iterdir() if not path.name.startswith(OUR_PREFIXES)]
        if strange:
            raise StoreError(
                f"{where} is not a Moviola index and not empty (it holds {printable(strange[0].name)}).",
                hint="Choose a new folder after --to.",
            )

    def _check_same(self, model: ModelCard, sampling: Sampling) -> None:
        where, mine = printable(self.folder), self.manifest
        if not mine.model.same_vectors(model):
            raise StoreError(
                f"The index {where} was made with the model {mine.model}; "
                f"vectors of {model} cannot be mixed with it.",
                hint=f"Use --model {mine.model.source}, or write a new index with another --to.",
            )
        if mine.sampling != sampling:
            raise StoreError(
                f"The index {where} was made with {mine.sampling}; this run asks for {sampling}.",
                hint="Leave --every and --keyframes out to go on as before, or write a new index "
                "with another --to.",
            )

    def _learn_tokenizer(self, model: ModelCard) -> bool:
        """Remember the tokenizer of this run where it lies elsewhere now, or none was known; True if so."""
        mine = self.manifest.model
        if model.tokenizer is None or model.tokenizer == mine.tokenizer:
            return False
        mine = replace(mine, tokenizer=model.tokenizer, recipe=model.recipe, recipe_hash=model.recipe_hash)
        self.manifest = replace(self.manifest, model=mine)
        return True

    # -- adding ----------------------------------------------------------------------------------

    def begin(
        self,
        path: bytes,
        *,
        size: int,
        mtime_ns: int,
        kind: str,
        duration: float = 0.0,
        sidecars: str | None = None,
    ) -> FileRow:
        """Start a pass over a file. From the next commit on its earlier rows do not count."""
        row = FileRow(self._next_take, path, size, mtime_ns, kind, duration, sidecars=sidecars)
        self._next_take += 1
        return self._stage(row)

    def begin_texts(self, path: bytes, *, sidecars: str | None) -> FileRow:
        """Read a file's texts again: its earlier texts stop counting, its units stay."""
        row = replace(self.files[path], text_take=self._next_take, sidecars=sidecars)
        self._next_take += 1
        return self._stage(row)

    def _stage(self, row: FileRow) -> FileRow:
        self.files[row.path] = row
        self._dirty = True
        return row

    def add_units(
        self,
        path: bytes,
        start_N: np.ndarray,
        end_N: np.ndarray,
        vectors_ND: np.ndarray,
        thumbnails: Sequence[bytes | None],
        shot_N: np.ndarray,
    ) -> FileRow:
        """Embedded units of a file that was begun; `ValueError` if the vectors are not finite."""
        row, dim = self.files[path], self.manifest.model.dim
        if vectors_ND.shape != (len(start_N), dim):
            raise StoreError(
                f"Expected {len(start_N)} vectors of {dim} numbers, got an array of {vectors_ND.shape}."
            )
        if len(start_N) == 0:
            return row
        halves_ND, norm_N = to_halves(vectors_ND)
        columns = [
            pa.array(np.full(len(start_N), row.take, dtype=np.int64)),
            pa.array(np.asarray(start_N, dtype=np.float64)),
            pa.array(np.asarray(end_N, dtype=np.float64)),
            pa.array(np.asarray(shot_N, dtype=np.int32)),
            pa.array(norm_N),
            pa.FixedSizeListArray.from_arrays(pa.array(halves_ND.reshape(-1)), dim),
            pa.array(list(thumbnails), pa.binary()),
        ]
        self._units.append(pa.RecordBatch.from_arrays(columns, schema=units_schema(dim)))
        return self._stage(
            replace(
                row,
                units=row.units + len(start_N),
                done_until=float(start_N[-1]),
                shots=max(row.shots, int(shot_N[-1]) + 1),
            )
        )

    def add_texts(self, path: bytes, texts: Iterable[tuple[float, float, str]], source: str) -> None:
        """Words that belong to a file: (start, end, text) with source `name` or `subtitle`."""
        rows = [(start, end, text) for start, end, text in texts if text.strip()]
        if rows:
            take = self.files[path].texts_of
            starts, ends, words = zip(*rows, strict=True)
            columns = [[take] * len(rows), starts, ends, words, [source] * len(rows)]
            self._texts.append(
                pa.RecordBatch.from_arrays(
                    [pa.array(c, f.type) for c, f in zip(columns, TEXTS_SCHEMA, strict=True)],
                    schema=TEXTS_SCHEMA,
                )
            )
            self._dirty = True

    def finish(self, path: bytes, *, status: str = "done", reason: str = "") -> FileRow:
        """The pass over a file is over: `done`, or `failed` (then its rows are dropped)."""
        row = replace(self.files[path], status=status, reason=reason)
        if status == "failed":
            # A new take: whatever was stored for this pass no longer counts.
            row = replace(
                row, take=self._next_take, units=0, shots=0, done_until=-1.0, text_take=None, sidecars=None
            )
            self._next_take += 1
        return self._stage(row)

    def remove(self, paths: Iterable[bytes]) -> int:
        """Forget files; how many there were."""
        gone = [path for path in paths if self.files.pop(path, None) is not None]
        self._dirty = self._dirty or bool(gone)
        return len(gone)

    @property
    def pending_rows(self) -> int:
        return sum(batch.num_rows for batch in self._units)

    # -- committing ------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make everything added so far count, in one step. `StoreError` when the disk is full.

        After an error the index is as it was before this commit, and readable.
        """
        if not self._dirty:
            return
        try:
            self._commit()
        except StoreError:
            self._sweep()  # half a commit would only keep a full disk full
            raise
        self._units, self._texts, self._dirty = [], [], False
        self._merge_tiers()

    def _commit(self) -> None:
        units, texts = list(self.manifest.units), list(self.manifest.texts)
        if self._units:
            units.append(self._write_batches("units", units_schema(self.manifest.model.dim), self._units))
        if self._texts:
            texts.append(self._write_batches("texts", TEXTS_SCHEMA, self._texts))
        self._publish(units, texts)

    def tidy(self) -> None:
        """Rewrite segments in which many rows no longer count. Called at the end of a run."""
        self.commit()
        for kind in ("units", "texts"):
            takes_F = self._takes(kind)
            for segment in getattr(self.manifest, kind):
                alive = int(np.isin(self._take_column(segment), takes_F).sum())
                if segment.rows - alive > _DEAD * segment.rows:
                    self._replace(kind, [segment])

    def _publish(self, units: Sequence[Segment], texts: Sequence[Segment]) -> None:
        """Write the files table and the manifest; the rename of the manifest is the commit."""
        files = self._write_batches("files", None, files_table(list(self.files.values())).to_batches())
        manifest = replace(
            self.manifest,
            generation=self.manifest.generation + 1,
            next_take=self._next_take,
            files=files.name,
            units=tuple(units),
            texts=tuple(texts),
        )
        temporary = self.folder / f"{MANIFEST}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / MANIFEST)
            self._sync_folder()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._write_error(error) from error
        self.manifest = manifest
        self.is_new = False
        self._sweep()

    def _write_batches(
        self, kind: str, schema: pa.Schema | None, batches: Iterable[pa.RecordBatch]
    ) -> Segment:
        """A new segment on disk, flushed. Nothing refers to it until `_publish`."""
        self._serial += 1
        name = f"{kind}-{self._serial:08d}.arrow"
        rows = 0
        try:
            with (self.folder / name).open("wb") as file:
                schema = schema or files_table([]).schema
                with pa.ipc.new_file(file, schema) as writer:
                    for batch in _joined(batches, schema):
                        writer.write_batch(batch)
                        rows += batch.num_rows
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            (self.folder / name).unlink(missing_ok=True)
            raise self._write_error(error) from error
        return Segment(name, rows)

    def _takes(self, kind: str) -> np.ndarray:
        """The takes whose rows count."""
        rows = self.files.values()
        return np.array([row.texts_of if kind == "texts" else row.take for row in rows], dtype=np.int64)

    def _take_column(self, segment: Segment) -> np.ndarray:
        return open_segment(self.folder, segment.name)["take"].to_numpy()

    def _merge_tiers(self) -> None:
        for kind in ("units", "texts"):
            merged = True
            while merged:
                merged = False
                tiers: dict[int, list[Segment]] = {}
                for segment in getattr(self.manifest, kind):
                    if segment.rows < _LARGEST:
                        tiers.setdefault(int(np.log(max(segment.rows, 1)) / np.log(_FAN)), []).append(segment)
                for tier in sorted(tiers):
                    if len(tiers[tier]) >= _FAN:
                        self._replace(kind, tiers[tier])
                        merged = True
                        break

    def _replace(self, kind: str, old: list[Segment]) -> None:
        """Copy the rows of `old` that still count into one segment and publish it in their place."""
        takes_F = self._takes(kind)
        schema = TEXTS_SCHEMA if kind == "texts" else units_schema(self.manifest.model.dim)

        def live() -> Iterable[pa.RecordBatch]:
            for segment in old:
                table = open_segment(self.folder, segment.name)
                for begin in range(0, table.num_rows, _COPY_ROWS):
                    part = table.slice(begin, _COPY_ROWS)
                    mask = pa.array(np.isin(part["take"].to_numpy(), takes_F))
                    yield from part.filter(mask).to_batches()

        new = self._write_batches(kind, schema, live())
        kept = {"units": list(self.manifest.units), "texts": list(self.manifest.texts)}
        place = kept[kind].index(old[0])
        kept[kind] = [one for one in kept[kind] if one not in old]
        if new.rows:
            kept[kind].insert(min(place, len(kept[kind])), new)
        self._publish(kept["units"], kept["texts"])

    def _sweep(self) -> None:
        """Delete what the manifest does not name: replaced files, and what a killed run left."""
        keep = {*self.manifest.names, MANIFEST, LOCK}
        for path in self.folder.iterdir():
            if path.name not in keep and path.name.startswith(OUR_PREFIXES):
                try:
                    path.unlink(missing_ok=True)
                except PermissionError:
                    # Windows keeps files that a reader has mapped; the next sweep takes them.
                    continue

    def _last_serial(self) -> int:
        numbers = [path.stem.rpartition("-")[2] for path in self.folder.glob("*.arrow")]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def _sync_folder(self) -> None:
        if os.name == "posix":
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _write_error(self, error: OSError) -> StoreError:
        where = printable(self.folder)
        if error.errno in _FULL:
            return StoreError(
                f"The disk is full: the index {where} could not be written. "
                "It is readable as it was at the last commit.",
                hint="Free some space and run the same command again; it goes on from there.",
            )
        return StoreError(
            f"The index {where} could not be written ({error.strerror or error}).",
            hint="Check that the folder may be written, then run the same command again.",
        )


def _joined(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterable[pa.RecordBatch]:
    """The same rows in batches of about `_COPY_ROWS`, so that readers meet few and even pieces."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= _COPY_ROWS:
            yield from pa.Table.from_batches(waiting, schema).combine_chunks().to_batches()
            waiting, rows = [], 0
    if rows:
        yield from pa.Table.from_batches(waiting, schema).combine_chunks().to_batches()
