"""`RowSource`: the rows of several files by number, their order in an epoch, and what identifies them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from moviola.data.hashing import hash_uint64
from moviola.data.rows.fingerprint import content_hash
from moviola.data.rows.shards import MEDIA, Shard, as_media, joined, plain
from moviola.data.tables import ID_COLUMNS, TEXT_COLUMNS
from moviola.types import UsageError, printable

_CAPTIONS = (*TEXT_COLUMNS, "txt", *(f"json.{name}" for name in TEXT_COLUMNS))
_IDS = (*ID_COLUMNS, "uuid", "sample_id", "__key__")
_BLOCKS, _ROWS = 0x5EED01, 0x5EED02  # streams of the hash: which block comes when, which row in a window


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a Parquet source is shuffled, and held in memory, at a time: whichever is reached first."""

    bytes: int = 256 << 20
    rows: int = 1 << 20

    def __post_init__(self) -> None:
        if self.bytes < 1 or self.rows < 1:
            raise UsageError(f"A window needs at least one row and one byte, got {self.rows}, {self.bytes}.")


class RowSource:
    """Rows of files by number; make one with `open_rows`.

    Columns have the names they are stored under, or those of `columns=`. `image` and `video`, where there
    are any, are always structs of `bytes` and `path` (absolute), one of them null. A file without a
    column gives nulls. It holds no open file when it is pickled.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        renames: Mapping[str, str],
        window: Window,
        rows: np.ndarray | None = None,
    ) -> None:
        self._shards = list(shards)
        self._renames = dict(renames)
        self.window = window
        self._rows = rows
        counts = [shard.count for shard in self._shards]
        self._first_S = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        filled = [(i, shard) for i, shard in enumerate(self._shards) if shard.count]
        # blocks of all shards: first row of all, shard, number within it, bytes
        self._start_K = _row_numbers([self._first_S[i] + shard.start_K for i, shard in filled])
        self._shard_K = _row_numbers([np.full(len(shard.start_K), i) for i, shard in filled])
        self._number_K = _row_numbers([np.arange(len(shard.start_K)) for _, shard in filled])
        self._bytes_K = _row_numbers([shard.bytes_K for _, shard in filled])
        self._group_K = self._groups()
        self.columns = self._column_names()
        self._cache: OrderedDict[int, tuple[frozenset[str], pa.Table]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first_S[-1]) if self._rows is None else len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    # ------------------------------------------------------------------------------- the columns

    def _column_names(self) -> tuple[str, ...]:
        there: dict[str, None] = {}
        for kind in ("image", "video"):
            if any(kind in shard.media for shard in self._shards):
                there[kind] = None
        stored = {name for shard in self._shards for name in shard.columns}
        for name, other in self._renames.items():
            if other not in stored:
                listed = ", ".join(map(repr, sorted(stored)[:30])) or "none"
                raise UsageError(
                    f"No file has the column {other!r} that {name!r} is to be. Columns there: {listed}.",
                    hint="Name one of them.",
                )
            there[name] = None
        hidden = set(self._renames.values())
        for shard in self._shards:
            there.update(dict.fromkeys(name for name in shard.columns if name not in hidden))
        return tuple(there)

    @property
    def captions(self) -> tuple[str, ...]:
        """The columns that hold captions, likeliest first: those renamed so, then those with usual names."""
        lower: dict[str, str] = {}
        for name in self.columns:
            lower.setdefault(name.lower(), name)
        named = [name for name in self._renames if name.lower() in _CAPTIONS]
        return tuple(dict.fromkeys([*named, *(lower[name] for name in _CAPTIONS if name in lower)]))

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns that name rows, likeliest first."""
        return tuple(name for name in _IDS if name in self.columns)

    def _stored(self, shard: Shard, name: str) -> str | None:
        """The stored column behind a name, None where this shard has none."""
        found = shard.media.get(name) if name in ("image", "video") else self._renames.get(name, name)
        return found if found in shard.columns else None

    # ------------------------------------------------------------------------------- rows

    def read(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The columns of some rows, in the order asked; rows may repeat.

        `UsageError` for a column that no file has or a row that is not there, `PairError` where a file
        is damaged or has changed.
        """
        names = list(dict.fromkeys(columns))
        unknown = [name for name in names if name not in self.columns]
        if unknown:
            listed = ", ".join(map(repr, self.columns[:50])) or "none"
            raise UsageError(
                f"The data has no column {', '.join(map(repr, unknown))}. Its columns: {listed}.",
                hint="Name one of them, or say which it is with columns={'new': 'stored'}.",
            )
        base = self._base(rows)
        if not len(base):
            return pa.table(
                {name: pa.array([], MEDIA if name in ("image", "video") else pa.null()) for name in names}
            )
        block_N = np.searchsorted(self._start_K, base, side="right") - 1
        heavy_N = self._bytes_K[block_N] > 0
        # what is held already comes first, so that making room never drops what this read still needs
        held = [k for k in self._cache if heavy_N.any() and (block_N == k).any()]
        fresh = self._turns([k for k in dict.fromkeys(block_N[heavy_N].tolist()) if k not in self._cache])
        parts: list[tuple[np.ndarray, Shard, pa.Table]] = []
        for block in [*held, *fresh]:
            at = np.flatnonzero(block_N == block)
            shard = self._shards[int(self._shard_K[block])]
            table = self._block(block, shard, names)
            parts.append((at, shard, table.take(pa.array(base[at] - self._start_K[block]))))
        shard_N = self._shard_K[block_N]
        for number in dict.fromkeys(shard_N[~heavy_N].tolist()):
            at = np.flatnonzero((shard_N == number) & ~heavy_N)
            shard = self._shards[int(number)]
            stored = sorted({s for name in names if (s := self._stored(shard, name)) is not None})
            parts.append((at, shard, shard.take(base[at] - self._first_S[int(number)], stored)))
        back = np.argsort(np.concatenate([at for at, _, _ in parts]), kind="stable")
        made = {}
        for name in names:
            cells = [self._cells(shard, name, table, len(at)) for at, shard, table in parts]
            made[name] = joined(cells, name).take(pa.array(back))
        return pa.table(made).replace_schema_metadata(self.metadata or None)

    def all_metadata(self) -> list[Mapping[bytes, bytes]]:
        """The key-value metadata of each file's schema; empty where its format has none."""
        return [getattr(shard, "metadata", {}) for shard in self._shards]

    @cached_property
    def metadata(self) -> dict[bytes, bytes]:
        """The metadata that all files have alike; it comes with what `read` returns."""
        first, *others = self.all_metadata() or [{}]
        own = (b"ARROW:schema", b"pandas")  # they describe columns that may have been left out
        return {k: v for k, v in first.items() if k not in own and all(o.get(k) == v for o in others)}

    def _cells(self, shard: Shard, name: str, table: pa.Table, count: int) -> pa.Array:
        stored = self._stored(shard, name)
        if name in ("image", "video"):
            return pa.nulls(count, MEDIA) if stored is None else as_media(table[stored], shard, stored)
        return pa.nulls(count) if stored is None else plain(table[stored])

    def _block(self, block: int, shard: Shard, names: Sequence[str]) -> pa.Table:
        """A block's columns, from the cache where they are in it. It holds one window, measured as it is."""
        wanted = frozenset(s for name in names if (s := self._stored(shard, name)) is not None)
        held = self._cache.get(block)
        if held is not None and wanted <= held[0]:
            self._cache.move_to_end(block)
            return held[1]
        if held is not None:
            wanted |= self._cache.pop(block)[0]
        self._make_room(int(self._bytes_K[block]))
        if not wanted:  # no column of this file: its rows still count
            ends = np.append(self._start_K, self._first_S[-1])
            table = pa.table({"": pa.nulls(int(ends[block + 1] - ends[block]))})
        else:
            table = shard.block(int(self._number_K[block]), sorted(wanted))
        self._cache[block] = wanted, table
        return table

    def _groups(self) -> np.ndarray:
        """For each block the first block of its row group: itself, except where a row group was cut."""
        group_K = np.arange(len(self._start_K))
        for index, shard in enumerate(self._shards):
            inner = getattr(shard, "group_K", None)
            at = np.flatnonzero(self._shard_K == index)
            if inner is not None and len(at):
                _, first, back = np.unique(inner, return_index=True, return_inverse=True)
                group_K[at] = at[0] + first[back]
        return group_K

    def _turns(self, blocks: list[int]) -> list[int]:
        """Blocks to load, as the rows come, but those of one row group forwards, as they are decoded."""
        waiting: dict[int, list[int]] = {}
        for block in sorted(blocks, reverse=True):
            waiting.setdefault(int(self._group_K[block]), []).append(block)
        return [waiting[int(self._group_K[block])].pop() for block in blocks]

    def _make_room(self, size: int) -> None:
        total = size + sum(int(self._bytes_K[k]) for k in self._cache)
        while self._cache and total > self.window.bytes:
            block, _ = self._cache.popitem(last=False)
            total -= int(self._bytes_K[block])
            shard = int(self._shard_K[block])
            if not any(int(self._shard_K[k]) == shard for k in self._cache):
                self._shards[shard].close()

    def _base(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise UsageError(f"Rows run from 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}.")
        return rows if self._rows is None else self._rows[rows]

    def where(self, row: int) -> str:
        """How messages name a row, and its id where the file has none: `pairs.parquet:7`, from 1 on."""
        base = int(self._base(np.array([row]))[0])
        shard = int(np.searchsorted(self._first_S, base, side="right") - 1)
        return f"{printable(self._shards[shard].name)}:{base - int(self._first_S[shard]) + 1}"

    def near(self, row: int) -> tuple[int, int]:
        """Rows [start, stop) that are read together with this one."""
        block = int(np.searchsorted(self._start_K, self._base(np.array([row]))[0], side="right") - 1)
        ends = np.append(self._start_K, self._first_S[-1])
        if self._rows is None:
            return int(ends[block]), int(ends[block + 1])
        start, stop = np.searchsorted(self._rows, [ends[block], ends[block + 1]])
        return int(start), int(stop)

    # ------------------------------------------------------------------------------- order

    def blocks(self) -> np.ndarray:
        """The first row of each block that is read together, rising; block k ends where k + 1 begins."""
        if self._rows is None:
            return self._start_K if len(self) else np.zeros(0, np.int64)
        return np.unique(np.searchsorted(self._rows, self._start_K))[: len(self)]

    @property
    def dear(self) -> bool:
        """Whether reading a row means reading a block that does not fit the window with all others."""
        weight = int(self._bytes_K.sum())
        return weight > self.window.bytes or (weight > 0 and len(self) > self.window.rows)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All rows as an epoch has them: a permutation that is a hash of (seed, epoch).

        Where any row is read by itself, or all fit the window, rows are shuffled freely. Otherwise
        blocks (row groups) come in a hashed order and rows are shuffled within windows of several
        blocks, so that a reader that goes through the epoch reads every row group once.
        """
        count = len(self)
        key_N = hash_uint64(seed, np.arange(count, dtype=np.uint64), stream=_ROWS + (epoch << 24))
        if not self.dear:
            return np.argsort(key_N, kind="stable")
        rows_K, block_N = self._rows_of_blocks()
        window_K = self._windows(seed, epoch, rows_K)
        window_N = window_K[block_N]
        return np.lexsort((key_N, window_N))

    def _rows_of_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """How many rows of this source lie in each block, and the block of each row."""
        if self._rows is None:
            rows_K = np.diff(np.append(self._start_K, self._first_S[-1]))
            return rows_K, np.repeat(np.arange(len(rows_K)), rows_K)
        block_N = np.searchsorted(self._start_K, self._rows, side="right") - 1
        return np.bincount(block_N, minlength=len(self._start_K)), block_N

    def _windows(self, seed: int, epoch: int, rows_K: np.ndarray) -> np.ndarray:
        """The window of each block. Stretches of one row group stay one after the other."""
        group_K = self._group_K
        key_K = hash_uint64(seed, group_K.astype(np.uint64), stream=_BLOCKS + (epoch << 24))
        turn_K = np.lexsort((np.arange(len(rows_K)), group_K, key_K))
        window_K = np.zeros(len(rows_K), np.int64)
        window, bytes_held, rows_held = 0, 0, 0
        sizes, counts = self._bytes_K[turn_K].tolist(), rows_K[turn_K].tolist()
        for block, size, many in zip(turn_K.tolist(), sizes, counts):
            if not many:
                continue
            full = bytes_held + size > self.window.bytes or rows_held + many > self.window.rows
            if rows_held and full:
                window, bytes_held, rows_held = window + 1, 0, 0
            window_K[block] = window
            bytes_held += size
            rows_held += many
        return window_K

    # ------------------------------------------------------------------------------- identity

    def subset(self, rows: np.ndarray) -> RowSource:
        """A source of some rows only, in rising order; its rows are numbered from 0."""
        wanted = np.unique(np.asarray(rows, dtype=np.int64))
        return RowSource(
            self._shards, renames=self._renames, window=self.window, rows=self._base(wanted).copy()
        )._with_content(self.content)

    def _with_content(self, content: str) -> RowSource:
        self.__dict__["content"] = content
        return self

    @cached_property
    def content(self) -> str:
        """16 hex digits over the names, sizes and samples of all files."""
        return content_hash([file for shard in self._shards for file in shard.files])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change when the data does: files, rows or which column is which.

        Of each file its name, its size, its head, its tail and 16 spots between are looked at; where
        there are very many files (pictures of a folder), all names and sizes and some contents.
        """
        digest = hashlib.sha256(self.content.encode())
        digest.update(repr(sorted(self._renames.items())).encode())
        if self._rows is not None:
            digest.update(self._rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def _row_numbers(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
