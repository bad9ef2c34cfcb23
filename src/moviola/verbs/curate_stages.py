"""The steps of a curation run: small objects that an engine can send anywhere. One task, one file.

`MatchStage`   a piece of the pool            -> its matches: piece, row, text, id, entries
`DrawStage`    matches of a piece             -> the texts that stay, with their probability
`SampleStage`  matches of a piece             -> an even sample of match sets, for planning
`WriteStage`   a piece and its texts that stay -> rows in the input's own format

Every stage streams; what it holds is one batch, one list of entries and their probabilities.

Axis letters: U texts, M matches, E entries, R rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moviola.data.hashing import hash_strings, hash_uint64, hash_uniform, mix
from moviola.data.matching import Matcher, Matches
from moviola.data.pairs import (
    KeptRows,
    PairBatch,
    PairColumns,
    Piece,
    pair_columns,
    read_texts,
    write_kept,
)
from moviola.files import atomic
from moviola.systems.curation.metaclip import MetaClipConfig, choose_texts, keep, keep_probability

MATCH_SCHEMA = pa.schema(
    [
        ("piece", pa.int32()),
        ("row", pa.int64()),
        ("text", pa.int32()),
        ("id", pa.uint64()),
        ("entries", pa.list_(pa.uint32())),
    ]
)
DRAW_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("text", pa.int32()),
        ("entries", pa.list_(pa.uint32())),
        ("keep_probability", pa.float64()),
    ]
)
NO_ENTRY, NO_LIST = "text holds no entry", "text's language has no metadata"
_EXAMPLES, _EXAMPLE_LENGTH = 24, 200
_STREAM_EXAMPLE, _STREAM_SAMPLE = 3, 4


@lru_cache(maxsize=1)
def open_entries(path: Path, languages: bool) -> tuple[dict[str, tuple[int, Matcher]], int]:
    """Language -> (number of its first entry, matcher), and how many entries there are.

    Kept for the life of a worker, which runs many pieces with the same list.
    """
    table = pq.read_table(path, columns=["language", "entry"])
    names = table["language"].to_pylist()
    entries = table["entry"].to_pylist()
    starts = [i for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    matchers = {
        names[start]: (start, Matcher(entries[start:stop], languages=languages))
        for start, stop in zip(starts, [*starts[1:], len(entries)], strict=True)
    }
    return matchers, len(entries)


@lru_cache(maxsize=1)
def open_probabilities(path: Path) -> np.ndarray:
    return np.load(path)


@dataclass(frozen=True)
class MatchTask:
    """A piece and its number in the run."""

    piece: Piece
    number: int


@dataclass(frozen=True)
class MatchStage:
    """Find every text's entries, and note how many came, what matched and why others did not.

    A row's draw hangs on its id; without one, on its file's name and its row in it.
    """

    entries: Path
    config: MetaClipConfig
    texts: tuple[str, ...] = ()
    id: str | None = None
    language: str | None = None
    extra: pa.Schema | None = None
    """Columns that will be added: a file that has one is refused now, not when it is written."""

    def __call__(self, task: MatchTask, output: Path) -> dict[str, Any]:
        matchers, _ = open_entries(self.entries, self.config.languages)
        columns = pair_columns(
            task.piece.file,
            texts=self.texts or None,
            id=self.id,
            language=self.language,
            find_language=len(matchers) > 1,
            extra=self.extra,
        )
        tally = _Tally(columns)
        with atomic(output) as file, pq.ParquetWriter(file, MATCH_SCHEMA, compression="zstd") as writer:
            for batch in read_texts(task.piece, columns):
                found, reasons = match_batch(batch, matchers, strip=self.config.languages)
                rows = _match_rows(batch, found, task)
                tally.add(batch, found, reasons, rows)
                if rows.num_rows:
                    writer.write_batch(rows)
        return tally.summary()


@dataclass
class _Tally:
    """What the summary of a piece says; all of it adds up over pieces."""

    columns: PairColumns
    rows: int = 0
    texts: int = 0
    matched_texts: int = 0
    matched_rows: int = 0
    rows_with_text: int = 0
    most_texts: int = 0
    without_id: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[float, list[int]]] = field(default_factory=dict)
    unmatched: dict[str, tuple[float, list[int]]] = field(default_factory=dict)

    def add(self, batch: PairBatch, found: Matches, reasons: Mapping[str, int], rows: pa.RecordBatch) -> None:
        per_text = found.per_text()
        self.rows += batch.rows
        self.texts += len(batch.texts)
        self.matched_texts += int((per_text > 0).sum())
        self.matched_rows += len(np.unique(batch.row_U[per_text > 0]))
        self.rows_with_text += len(np.unique(batch.row_U))
        self.most_texts = max(self.most_texts, int(batch.text_U.max()) + 1 if len(batch.text_U) else 0)
        if batch.ids is None:
            self.without_id += batch.rows
        else:
            self.without_id += int(pc.sum(pc.equal(batch.ids, "")).as_py() or 0)
        for why, many in (*batch.problems.items(), *reasons.items()):
            self.problems[why] = self.problems.get(why, 0) + many
        draw_U = hash_uniform(0, hash_strings(batch.texts), _STREAM_EXAMPLE)
        offsets = found.offsets()
        for place, kept in ((per_text > 0, self.examples), (per_text == 0, self.unmatched)):
            some = np.flatnonzero(place)
            _, first = np.unique(draw_U[some], return_index=True)  # a text that comes often shows once
            for u in some[first[:_EXAMPLES]]:
                text = batch.texts[int(u)].as_py()[:_EXAMPLE_LENGTH]
                kept[text] = float(draw_U[u]), found.entry_M[offsets[u] : offsets[u + 1]].tolist()
            least = sorted(kept.items(), key=lambda item: item[1][0])[:_EXAMPLES]
            kept.clear()
            kept.update(least)

    def summary(self) -> dict[str, Any]:
        return {
            "columns": {
                "texts": self.columns.texts,
                "id": self.columns.id,
                "language": self.columns.language,
            },
            "rows": self.rows,
            "texts": self.texts,
            "matched_texts": self.matched_texts,
            "matched_rows": self.matched_rows,
            "rows_with_text": self.rows_with_text,
            "most_texts": self.most_texts,
            "without_id": self.without_id,
            "problems": self.problems,
            "examples": [(draw, text, entries) for text, (draw, entries) in self.examples.items()],
            "unmatched": [(draw, text, entries) for text, (draw, entries) in self.unmatched.items()],
        }


def match_batch(
    batch: PairBatch, matchers: Mapping[str, tuple[int, Matcher]], *, strip: bool = False
) -> tuple[Matches, dict[str, int]]:
    """Entry numbers of the whole list for each text, by the list of its row's language.

    A single list matches every text. A language without a list takes the one called `other`, if there
    is one. `strip` takes blanks off both ends, as MetaCLIP 2 does.
    """
    texts = pc.utf8_trim_whitespace(batch.texts) if strip else batch.texts
    if len(matchers) == 1 and batch.languages is None:
        first, matcher = next(iter(matchers.values()))
        found = matcher(texts)
        missed = len(texts) - len(np.unique(found.text_M))
        return Matches(found.text_M, found.entry_M + np.uint32(first), len(texts)), _some({NO_ENTRY: missed})
    if batch.languages is None:
        codes = pa.array([""] * len(texts), pa.string())
    else:
        codes = batch.languages.take(pa.array(batch.row_U))
    encoded = codes.dictionary_encode()
    code_U, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    text_M, entry_M, missing = [], [], 0
    for number, name in enumerate(names):
        places = np.flatnonzero(code_U == number)
        listed = list_for(name, matchers)
        if listed is None:
            missing += len(places)
            continue
        first, matcher = matchers[listed]
        found = matcher(texts.take(pa.array(places)))
        text_M.append(places[found.text_M])
        entry_M.append(found.entry_M + np.uint32(first))
    if not text_M:
        return Matches(np.empty(0, np.int64), np.empty(0, np.uint32), len(texts)), _some({NO_LIST: missing})
    texts_M, entries_M = np.concatenate(text_M), np.concatenate(entry_M)
    order = np.argsort(texts_M, kind="stable")  # each text is of one language, its entries are in order
    matches = Matches(texts_M[order], entries_M[order], len(texts))
    missed = len(texts) - missing - len(np.unique(texts_M))
    return matches, _some({NO_ENTRY: missed, NO_LIST: missing})


def _some(reasons: dict[str, int]) -> dict[str, int]:
    return {why: many for why, many in reasons.items() if many}


def list_for(language: str, lists: Mapping[str, Any]) -> str | None:
    """`en-US` and `EN` take the list `en`; what has none takes `other`, or None."""
    name = language.strip().lower().replace("_", "-")
    for wanted in (name, name.partition("-")[0], "other"):
        if wanted in lists:
            return wanted
    return None


def _match_rows(batch: PairBatch, found: Matches, task: MatchTask) -> pa.RecordBatch:
    """The texts that matched, as rows of `MATCH_SCHEMA`."""
    per_text = found.per_text()
    some_U = np.flatnonzero(per_text > 0)
    row_U = batch.row_U[some_U]
    rows, place = np.unique(row_U, return_inverse=True)
    ids = row_ids(batch, rows, task)[place]
    offsets = np.concatenate([[0], np.cumsum(per_text[some_U])]).astype(np.int32)
    return pa.record_batch(
        [
            pa.array(np.full(len(some_U), task.number, np.int32)),
            pa.array(row_U + batch.first),
            pa.array(batch.text_U[some_U].astype(np.int32)),
            pa.array(ids),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(found.entry_M)),
        ],
        schema=MATCH_SCHEMA,
    )


def row_ids(batch: PairBatch, rows: np.ndarray, task: MatchTask) -> np.ndarray:
    """The hash that stands for each of these rows of a batch: of its id, or of its place."""
    file = int(hash_strings(pa.array([task.piece.file.name]))[0])
    places = hash_uint64(file, rows + batch.first + task.piece.first_row)
    if batch.ids is None:
        return places
    ids = batch.ids.take(pa.array(rows))
    given = pc.not_equal(ids, "").to_numpy(zero_copy_only=False)
    return np.where(given, hash_strings(ids), places)


# --------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------


def _whole_rows(path: Path) -> Iterator[pa.RecordBatch]:
    """A part in batches that never cut a row's texts apart."""
    rest: pa.RecordBatch | None = None
    with pq.ParquetFile(path, memory_map=True) as file:
        for read in file.iter_batches(1 << 16):
            batch = read if rest is None else pa.concat_batches([rest, read])
            row_U = batch["row"].to_numpy()
            cut = int(np.searchsorted(row_U, row_U[-1])) if len(row_U) else 0
            rest = batch.slice(cut)
            if cut:
                yield batch.slice(0, cut)
        if rest is not None and rest.num_rows:
            yield rest


def _match_batches(path: Path) -> Iterator[tuple[Matches, dict[str, np.ndarray]]]:
    """Match sets with the other columns; the texts of a row never lie in two batches."""
    return map(_as_matches, _whole_rows(path))


def _as_matches(batch: pa.RecordBatch) -> tuple[Matches, dict[str, np.ndarray]]:
    lists = batch["entries"]
    sizes = pc.list_value_length(lists).to_numpy()
    text_M = np.repeat(np.arange(len(lists)), sizes)
    matches = Matches(text_M, lists.flatten().to_numpy(), len(lists))
    return matches, {name: batch[name].to_numpy() for name in ("row", "text", "id")}


@dataclass(frozen=True)
class DrawStage:
    """Which texts of a piece stay. Each row has one draw, a hash of (seed, id).

    With `texts="one"` a row's matched texts first come down to one, drawn evenly; with "all" each text
    has its own draw, and a row stays with those that stay.
    """

    probabilities: Path
    config: MetaClipConfig

    def __call__(self, matches: Path, output: Path) -> dict[str, Any]:
        prob_E, seed = open_probabilities(self.probabilities), self.config.seed
        texts = rows = 0
        expected = 0.0
        with atomic(output) as file, pq.ParquetWriter(file, DRAW_SCHEMA, compression="zstd") as writer:
            for found, column in _match_batches(matches):
                keep_U = keep_probability(found, prob_E)
                candidates, ids = candidate_texts(column, self.config)
                expected += float(keep_U[candidates].sum())
                chosen = candidates[keep(keep_U[candidates], ids, seed=seed)]
                texts += len(chosen)
                rows += len(np.unique(column["row"][chosen]))
                if len(chosen):
                    writer.write_batch(_drawn_rows(found, column, keep_U, chosen))
        return {"texts": texts, "rows": rows, "expected": expected}


def candidate_texts(
    column: Mapping[str, np.ndarray], config: MetaClipConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The texts that are drawn for, rising, and the hash that each draw hangs on."""
    if config.texts == "all":
        own = mix(column["id"] ^ mix(column["text"].astype(np.uint64)))
        return np.arange(len(own)), own
    matched_U = np.ones(len(column["row"]), bool)
    chosen = choose_texts(column["row"], matched_U, column["id"], seed=config.seed)
    return chosen, column["id"][chosen]


def _drawn_rows(
    found: Matches, column: Mapping[str, np.ndarray], keep_U: np.ndarray, chosen: np.ndarray
) -> pa.RecordBatch:
    entries = found.to_arrow().take(pa.array(chosen))
    arrays = [column["row"][chosen], column["text"][chosen], None, keep_U[chosen]]
    return pa.record_batch(
        [entries if a is None else pa.array(a) for a in arrays],
        schema=DRAW_SCHEMA,
    )


@dataclass(frozen=True)
class SampleStage:
    """An even sample of the match sets that are drawn for: it tells set sizes for any threshold."""

    rate: float
    config: MetaClipConfig

    def __call__(self, matches: Path, output: Path) -> dict[str, Any]:
        candidates = sampled = 0
        schema = pa.schema([MATCH_SCHEMA.field("entries")])
        with atomic(output) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for found, column in _match_batches(matches):
                texts, ids = candidate_texts(column, self.config)
                chosen = texts[hash_uniform(0, ids, _STREAM_SAMPLE) < self.rate]
                if len(chosen):
                    entries = found.to_arrow().take(pa.array(chosen))
                    writer.write_batch(pa.record_batch([entries], schema=schema))
                candidates += len(texts)
                sampled += len(chosen)
        return {"candidates": candidates, "sampled": sampled}


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriteTask:
    """A piece, its drawn texts, and where its kept rows go."""

    piece: Piece
    drawn: Path
    to: Path


@dataclass(frozen=True)
class WriteStage:
    """Read a piece again and write the rows that stay, with what was found in them.

    `several`: some row of the pool has several texts, so `kept_texts` says which of them stay.
    """

    several: bool

    @property
    def extra(self) -> pa.Schema:
        columns = [("matched_entries", pa.list_(pa.uint32())), ("keep_probability", pa.float64())]
        return pa.schema([*columns, ("kept_texts", pa.list_(pa.int32()))] if self.several else columns)

    def __call__(self, task: WriteTask, output: Path) -> dict[str, Any]:
        task.to.parent.mkdir(parents=True, exist_ok=True)
        rows = write_kept(task.piece, task.to, map(self._rows, _whole_rows(task.drawn)), self.extra)
        summary = {"rows": rows, "bytes": task.to.stat().st_size}
        with atomic(output) as file:
            file.write(json.dumps(summary).encode())
        return summary

    def _rows(self, batch: pa.RecordBatch) -> KeptRows:
        """One row for each row that stays; several kept texts give the union of their entries."""
        row_R, first_R = np.unique(batch["row"].to_numpy(), return_index=True)
        ends_R = np.append(first_R[1:], batch.num_rows)
        entries, chance = batch["entries"], batch["keep_probability"]
        if len(row_R) < batch.num_rows:
            missed = 1 - chance.to_numpy()
            chance = pa.array(1 - np.multiply.reduceat(missed, first_R))
            entries = pa.array(
                [
                    np.unique(entries.slice(a, b - a).flatten().to_numpy())
                    for a, b in zip(first_R.tolist(), ends_R.tolist(), strict=True)
                ],
                pa.list_(pa.uint32()),
            )
        arrays = [entries, chance]
        if self.several:
            offsets = np.append(first_R, batch.num_rows).astype(np.int32)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), batch["text"]))
        return KeptRows(row_R, pa.record_batch(arrays, schema=self.extra))
