"""Curate a pool of image-text pairs: count its entries, plan a threshold, write the balanced set.

A run lives beside its output, in `FOLDER.partial`, until it is whole; killed at any moment, the same
command goes on from the finished pieces. Then the folder takes its name: `pairs/` holds the kept rows in
the input's own files and columns, `counts.parquet` the entries, `report.html` and `report.json` what
happened, and `match_sample.parquet` what `plan` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.types import MoviolaError, UsageError, printable

if TYPE_CHECKING:
    from moviola.data.metadata import Metadata
    from moviola.data.pairs import PairFile
    from moviola.engine import Engine
    from moviola.systems.curation.metaclip import MetaClipConfig
    from moviola.verbs.curate_stages import MatchTask

SAMPLE_TEXTS = 200_000
"""Match sets kept for planning; the standard error of a set's size is then about 0.1 %."""
PIECE_ROWS = 1_000_000
_SMALL_BYTES = 32 << 20  # below it, starting worker processes costs more than they save
OnProgress = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class Curation:
    """What a run left: its folder, its report (as in `report.json`), and the pieces it could not read."""

    folder: Path
    report: Mapping[str, Any]
    failed: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        from moviola.verbs.curate_report import report_page

        return report_page(self.report)


@dataclass(frozen=True)
class Pool:
    """Where the pairs are and which columns matter. None finds a column by its usual names."""

    sources: Sequence[str | Path]
    texts: Sequence[str] = ()
    id: str | None = None
    language: str | None = None
    piece_rows: int = PIECE_ROWS


def curate(
    sources: str | Path | Sequence[str | Path],
    *,
    metadata: str | Path | Sequence[str],
    to: str | Path,
    threshold: float | None = None,
    tail_share: float | None = None,
    counts: str | Path | None = None,
    text_columns: Sequence[str] = (),
    id_column: str | None = None,
    language_column: str | None = None,
    texts: str = "one",
    seed: int = 0,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    piece_rows: int = PIECE_ROWS,
    on_progress: OnProgress | None = None,
) -> Curation:
    """Write the balanced part of a pool to the folder `to`.

    `metadata`: a file of entries, a list of them, or a folder with one file per language (MetaCLIP 2).
    Of `threshold` and `tail_share` give one (default: the paper's threshold of 20,000). `counts`: the
    `counts.parquet` of another run with the same metadata, instead of counting this pool. `texts`: of a
    row's several matched texts draw for "one" or for "all". Rows with an id that came before are left out.

    A file that cannot be read is left out and named, or stops the run with `strict`. Raises `UsageError`
    when nothing matched, for columns that are not there, when `to` exists, or when an unfinished run with
    other settings stands beside it.
    """
    run = _Run.open(
        Pool(_listed(sources), tuple(text_columns), id_column, language_column, piece_rows),
        metadata=metadata,
        to=Path(to),
        config=_config(threshold, tail_share, texts, seed),
        counts=counts,
        engine=(engine, address, workers),
        strict=strict,
        on_progress=on_progress,
    )
    with run.lock():
        return run.write(run.count())


def count_pool(
    sources: str | Path | Sequence[str | Path],
    *,
    metadata: str | Path | Sequence[str],
    to: str | Path,
    text_columns: Sequence[str] = (),
    id_column: str | None = None,
    language_column: str | None = None,
    texts: str = "one",
    seed: int = 0,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    piece_rows: int = PIECE_ROWS,
    on_progress: OnProgress | None = None,
) -> Curation:
    """The first pass alone: `counts.parquet`, a report and what `plan` needs, without a set."""
    run = _Run.open(
        Pool(_listed(sources), tuple(text_columns), id_column, language_column, piece_rows),
        metadata=metadata,
        to=Path(to),
        config=_config(None, None, texts, seed),
        counts=None,
        engine=(engine, address, workers),
        strict=strict,
        on_progress=on_progress,
        only_count=True,
    )
    with run.lock():
        return run.finish(run.count(), None)


def _listed(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [sources] if isinstance(sources, str | Path) else list(sources)


def _config(threshold: float | None, share: float | None, texts: str, seed: int) -> MetaClipConfig:
    from moviola.systems.curation.metaclip import MetaClipConfig

    if threshold is not None and share is not None:
        raise UsageError("Give a threshold or a tail share, not both.")
    made: dict[str, Any] = {"tail_share": share, "texts": texts, "seed": seed}
    if threshold is not None:
        made["threshold"] = threshold
    return MetaClipConfig.from_json(made)


@dataclass(frozen=True)
class _Counted:
    """The pool after the first pass: matches without duplicates, and counts by entry number."""

    parts: list[Path]
    tasks: list[MatchTask]
    summaries: list[dict[str, Any]]
    count_E: np.ndarray
    duplicates: int
    sample: dict[str, int]
    failed: tuple[str, ...]


@dataclass
class _Run:
    """One run's settings and its folder of unfinished work."""

    files: list[PairFile]
    pool: Pool
    lists: dict[str, Metadata]
    metadata_name: str
    config: MetaClipConfig
    engine: Engine
    strict: bool
    to: Path
    work: Path
    on_progress: OnProgress | None
    started: float
    given_E: np.ndarray | None

    @classmethod
    def open(
        cls,
        pool: Pool,
        *,
        metadata: str | Path | Sequence[str],
        to: Path,
        config: MetaClipConfig,
        counts: str | Path | None,
        engine: tuple[str, str | None, int | None],
        strict: bool,
        on_progress: OnProgress | None,
        only_count: bool = False,
    ) -> _Run:
        from moviola.data.matching import check_entries
        from moviola.data.pairs import find_pairs, pair_columns
        from moviola.engine import engine as open_engine

        if to.exists():
            raise UsageError(f"{printable(to)} exists already.", hint="Choose another folder, or remove it.")
        lists, name = _read_lists(metadata)
        for listed in lists.values():
            check_entries(listed.entries)
        hashes = {language: listed.hash for language, listed in lists.items()}
        given_E = given_counts(Path(counts), hashes) if counts is not None else None
        config = replace(config, languages=len(lists) > 1 or "" not in lists)
        files = find_pairs(pool.sources)
        pair_columns(  # a wrong column shows now, not after hours
            files[0],
            texts=pool.texts or None,
            id=pool.id,
            language=pool.language,
            find_language=len(lists) > 1,
        )
        workers = engine[2]
        if workers is None and engine[0] == "local":
            small = sum(file.path.stat().st_size for file in files) < _SMALL_BYTES
            workers = 1 if small else None
        run = cls(
            files,
            pool,
            lists,
            name,
            config,
            open_engine(engine[0], address=engine[1], workers=workers),
            strict,
            to,
            to.with_name(to.name + ".partial"),
            on_progress,
            time.monotonic(),
            given_E,
        )
        run._claim_folder({"counts": str(counts) if counts else None, "only_count": only_count})
        return run

    # ------------------------------------------------------------------------------ the work folder

    def _claim_folder(self, more: dict[str, Any]) -> None:
        """Take up the unfinished run of the same settings, or begin one."""
        from moviola.files import atomic

        settings = {
            "metadata": {language: listed.hash for language, listed in self.lists.items()},
            "config": self.config.to_json(),
            "columns": [list(self.pool.texts), self.pool.id, self.pool.language],
            "piece_rows": self.pool.piece_rows,
            "files": [[f.name, f.path.stat().st_size, f.path.stat().st_mtime_ns] for f in self.files],
            **more,
        }
        place = self.work / "run.json"
        if place.exists():
            before = json.loads(place.read_bytes())
            changed = sorted(k for k in settings if json.loads(json.dumps(settings[k])) != before.get(k))
            if changed:
                raise UsageError(
                    f"{printable(self.work)} holds an unfinished run with other settings "
                    f"({', '.join(changed)}).",
                    hint="Run it again as it was, choose another --to, or remove that folder.",
                )
            return
        if self.work.exists() and any(p.name != ".lock" for p in self.work.iterdir()):
            raise UsageError(
                f"{printable(self.work)} exists and is no unfinished run.", hint="Choose another --to."
            )
        self.work.mkdir(parents=True, exist_ok=True)
        with atomic(place) as file:
            file.write(json.dumps(settings, indent=1).encode())

    def lock(self) -> Any:
        from filelock import FileLock, Timeout

        lock = FileLock(self.work / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"Another run is writing {printable(self.to)}.", hint="Wait for it, or choose another --to."
            ) from error
        return lock

    def _say(self, stage: str) -> Callable[[int, int], None]:
        def say(done: int, total: int) -> None:
            if self.on_progress:
                self.on_progress(done, total, stage)

        return say

    def _map(
        self,
        stage: str,
        function: Any,
        tasks: Sequence[Any],
        outputs: list[Path],
        key: str,
        *,
        skip: tuple[type[MoviolaError], ...] = (),
    ) -> list[Any]:
        done = 0

        def on_done(index: int, result: Any) -> None:
            nonlocal done
            done += 1
            self._say(stage)(done, len(tasks))

        return self.engine.map(function, tasks, outputs, key=key, skip=skip, on_done=on_done)

    # ------------------------------------------------------------------------------------ first pass

    def _entries(self) -> Path:
        """The lists as one table: an entry's number in the run is its row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from moviola.files import atomic

        place = self.work / "entries.parquet"
        if not place.exists():
            names = [name for name, listed in self.lists.items() for _ in listed.entries]
            entries = [entry for listed in self.lists.values() for entry in listed.entries]
            with atomic(place) as file:
                pq.write_table(pa.table({"language": names, "entry": entries}), file)
        return place

    def count(self) -> _Counted:
        """Match every piece, leave out duplicate ids, count the entries."""
        import pyarrow.parquet as pq

        from moviola.data.pairs import PairError, pieces
        from moviola.engine import Failed
        from moviola.verbs.curate_stages import MatchStage, MatchTask, SampleStage

        tasks = [
            MatchTask(piece, number)
            for number, piece in enumerate(pieces(self.files, rows=self.pool.piece_rows))
        ]
        stage = MatchStage(
            self._entries(), self.config, tuple(self.pool.texts), self.pool.id, self.pool.language
        )
        outputs = [self.work / "match" / f"{task.number:05d}.parquet" for task in tasks]
        skip = () if self.strict else (PairError,)
        results = self._map("matching", stage, tasks, outputs, "match", skip=skip)
        failed = tuple(str(r) for r in results if isinstance(r, Failed))
        good = [n for n, r in enumerate(results) if not isinstance(r, Failed)]
        tasks, parts = [tasks[n] for n in good], [outputs[n] for n in good]
        summaries = [results[n] for n in good]
        if not sum(s["matched_texts"] for s in summaries):
            why = self._why_nothing(summaries, failed)
            shutil.rmtree(self.work)  # other metadata or columns are another run
            raise UsageError(why)

        twice = self.work / "duplicates.parquet"
        rows = self.engine.group_count(
            parts,
            "id",
            twice,
            at_least=2,
            first=("piece", "row"),
            progress=self._say("looking for duplicates"),
        )
        duplicates = 0
        if rows:
            joined = self.engine.join(
                parts, twice, "id", self.work / "distinct", how="distinct",
                progress=self._say("leaving out duplicates"),
            )  # fmt: skip
            duplicates = sum(j.read - j.rows for j in joined)
            parts = [j.path for j in joined]
        size = sum(len(listed) for listed in self.lists.values())
        counted = self.work / "entry_counts.parquet"
        self.engine.group_count(
            parts, "entries", counted, at_least=0, size=size, progress=self._say("counting")
        )
        count_E = pq.read_table(counted)["count"].to_numpy()
        total = max(1, sum(s["matched_texts"] for s in summaries))
        sampling = SampleStage(min(1.0, SAMPLE_TEXTS / total), self.config)
        places = [self.work / "sample" / part.name for part in parts]
        sampled = self._map("sampling", sampling, parts, places, f"sample {sampling.rate}")
        sample = {k: sum(s[k] for s in sampled) for k in ("candidates", "sampled")}
        return _Counted(
            parts,
            tasks,
            summaries,
            count_E if self.given_E is None else self.given_E,
            duplicates,
            sample,
            failed,
        )

    def _why_nothing(self, summaries: Sequence[dict[str, Any]], failed: Sequence[str]) -> str:
        """What a user needs to see when no text held an entry."""
        from moviola.data.matching import Matcher

        if not summaries:
            return f"No file could be read. The first: {failed[0]}"
        problems = merged(s["problems"] for s in summaries)
        texts = [text for s in summaries for _, text, _ in s["unmatched"]][:200]
        entries = [e for listed in self.lists.values() for e in listed.entries]
        told = f"None of {sum(s['texts'] for s in summaries)} texts holds any of {len(entries)} entries."
        if problems:
            told += " " + "; ".join(f"{why}: {many}" for why, many in problems.items()) + "."
        if texts:
            lower = list(dict.fromkeys(e.lower() for e in entries))
            if len(Matcher(lower)([t.lower() for t in texts])):
                told += " They would match in lower case: entries are matched as they are written."
            told += f" A text: {texts[0]!r}; an entry: {entries[0]!r}."
        return told

    # ----------------------------------------------------------------------------------- second pass

    def write(self, counted: _Counted) -> Curation:
        """Draw, write the kept rows, and finish the folder.

        A file that could be read before and cannot now stops the run: what it counted for is counted.
        """
        from moviola.files import atomic
        from moviola.verbs.curate_stages import DrawStage, WriteStage, WriteTask

        prob_E, limits = self._probabilities(counted.count_E)
        place = self.work / "probabilities.npy"
        with atomic(place) as file:
            np.save(file, prob_E)
        key = hashlib.sha256(prob_E.tobytes()).hexdigest()[:16]
        drawn = [self.work / "draw" / part.name for part in counted.parts]
        draws = self._map("drawing", DrawStage(place, self.config), counted.parts, drawn, key)
        kept = self.work / "kept_counts.parquet"
        self.engine.group_count(
            drawn, "entries", kept, at_least=0, size=len(prob_E), progress=self._say("counting what stays")
        )
        several = any(s["most_texts"] > 1 for s in counted.summaries)
        pairs = self.work / "out" / "pairs"
        tasks = [
            WriteTask(task.piece, part, pairs / task.piece.output)
            for task, part in zip(counted.tasks, drawn, strict=True)
        ]
        marks = [self.work / "write" / f"{task.number:05d}" for task in counted.tasks]
        written = self._map("writing", WriteStage(several), tasks, marks, key)
        figures = {
            "texts": sum(d["texts"] for d in draws),
            "rows": sum(d["rows"] for d in draws),
            "expected": sum(d["expected"] for d in draws),
            "bytes": sum(w["bytes"] for w in written),
        }
        return self.finish(counted, (prob_E, limits, kept, figures))

    def _probabilities(self, count_E: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        from moviola.systems.curation.metaclip import probabilities, thresholds

        by_language = self._split(count_E)
        limits = thresholds(by_language, self.config)
        return np.concatenate([probabilities(c, limits[name]) for name, c in by_language.items()]), limits

    def _split(self, values_E: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([len(listed) for listed in self.lists.values()])
        return dict(zip(self.lists, np.split(values_E, ends[:-1]), strict=True))

    # ---------------------------------------------------------------------------------------- the end

    def finish(
        self,
        counted: _Counted,
        drawn: tuple[np.ndarray, dict[str, float], Path, dict[str, Any]] | None,
    ) -> Curation:
        """Counts, sample and report beside the pairs; then the folder takes its name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from moviola.files import atomic
        from moviola.verbs.curate_report import build_report, report_page

        out = self.work / "out"
        out.mkdir(exist_ok=True)
        columns = pq.read_table(self._entries())
        columns = columns.append_column("count", pa.array(counted.count_E, pa.int64()))
        kept_E = None
        if drawn is not None:
            kept_E = pq.read_table(drawn[2])["count"].to_numpy()
            columns = columns.append_column("probability", pa.array(drawn[0]))
            columns = columns.append_column("kept", pa.array(kept_E, pa.int64()))
        about = {
            "metadata": {language: listed.hash for language, listed in self.lists.items()},
            "config": self.config.to_json(),
            "candidates": counted.sample["candidates"],
        }
        with atomic(out / "counts.parquet") as file:
            pq.write_table(columns.replace_schema_metadata({"moviola": json.dumps(about)}), file)
        schema = pa.schema([("entries", pa.list_(pa.uint32()))])
        with atomic(out / "match_sample.parquet") as file, pq.ParquetWriter(file, schema) as writer:
            for part in counted.parts:
                with pq.ParquetFile(self.work / "sample" / part.name) as sample:
                    for batch in sample.iter_batches():
                        writer.write_batch(batch)
        report = build_report(
            columns,
            config=self.config.to_json(),
            metadata=self.metadata_name,
            hashes={language: listed.hash for language, listed in self.lists.items()},
            files=len(self.files),
            summaries=counted.summaries,
            duplicates=counted.duplicates,
            thresholds=drawn[1] if drawn else None,
            kept=drawn[3] if drawn else None,
            counts_given=self.given_E is not None,
            failed=list(counted.failed),
            engine=self.engine.name,
            seconds=time.monotonic() - self.started,
            candidates=counted.sample["candidates"],
        )
        for name, content in (
            ("report.json", json.dumps(report, indent=1)),
            ("report.html", report_page(report)),
        ):
            with atomic(out / name) as file:
                file.write(content.encode())
        out.replace(self.to)
        with suppress(OSError):  # the result is whole; what is left of the work is only in the way
            shutil.rmtree(self.work)
        return Curation(self.to, report, counted.failed)


# --------------------------------------------------------------------------------------------------
# Planning
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRow:
    """What a threshold gives: the set's expected size and how far the real one may be from it, and shares.

    `error` is one standard deviation, of the draws and, where match sets are a sample, of that.
    """

    threshold: float
    tail_share: float
    head_entries: int
    size: float
    error: float


def plan(
    counts: str | Path, *, thresholds: Sequence[float] = (), texts_column: str = "entries"
) -> list[PlanRow]:
    """Set size and tail share over thresholds, from the counts and the sample of match sets beside them.

    `counts`: a `counts.parquet`, or the folder of a run. Without `thresholds`: two a decade up to the
    largest count. With several languages the threshold is English's, the others follow its tail share.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from moviola.data.matching import Matches
    from moviola.systems.curation import metaclip

    path = Path(counts)
    path = path / "counts.parquet" if path.is_dir() else path
    table, about = read_counts(path)
    count_E = table["count"].to_numpy()
    metaclip.check_counts(count_E)
    place = path.with_name("match_sample.parquet")
    if not place.exists():
        raise UsageError(
            f"{printable(place)} is missing: set sizes are told from its sample of match sets.",
            hint="Keep it beside counts.parquet, or count again: moviola curate count",
        )
    lists = pq.read_table(place)[texts_column].combine_chunks()
    sizes = pc.list_value_length(lists).to_numpy()
    sample = Matches(np.repeat(np.arange(len(lists)), sizes), lists.flatten().to_numpy(), len(lists))
    languages = table["language"].to_pylist()
    names = list(dict.fromkeys(languages))
    ends = np.cumsum([languages.count(name) for name in names])
    by_language = dict(zip(names, np.split(count_E, ends[:-1]), strict=True))
    config = metaclip.MetaClipConfig.from_json({**about["config"], "tail_share": None})
    rows = []
    for threshold in thresholds or _usual_thresholds(int(count_E.max())):
        limits = metaclip.thresholds(by_language, replace(config, threshold=threshold))
        prob_E = np.concatenate([metaclip.probabilities(c, limits[n]) for n, c in by_language.items()])
        limit_E = np.concatenate([np.full(len(c), limits[n]) for n, c in by_language.items()])
        keep_U = metaclip.keep_probability(sample, prob_E)
        total = about["candidates"]
        left = max(0.0, 1 - sample.texts / max(total, 1))  # a sample of everything has no error
        sampling = total * float(keep_U.std()) * math.sqrt(left / max(1, sample.texts))
        drawing = math.sqrt(total * float((keep_U * (1 - keep_U)).mean())) if sample.texts else 0.0
        rows.append(
            PlanRow(
                threshold,
                float(count_E[count_E < limit_E].sum() / count_E.sum()),
                int((count_E > limit_E).sum()),
                total * float(keep_U.mean()) if sample.texts else 0.0,
                math.hypot(sampling, drawing),
            )
        )
    return rows


def _usual_thresholds(largest: int) -> list[float]:
    """1, 3, 10, 30 ... up to the first that keeps everything."""
    steps = [float(m * 10**e) for e in range(len(str(largest)) + 1) for m in (1, 3)]
    return [t for n, t in enumerate(steps) if n == 0 or steps[n - 1] < largest]


# --------------------------------------------------------------------------------------------------
# Small things
# --------------------------------------------------------------------------------------------------


def read_counts(path: Path) -> tuple[Any, dict[str, Any]]:
    """The table of a `counts.parquet` and what its run said about it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{printable(path)} is no readable counts.parquet ({error}).") from error
    about = (table.schema.metadata or {}).get(b"moviola")
    if about is None or "count" not in table.column_names:
        raise UsageError(
            f"{printable(path)} is no table of counts.", hint="Expected the counts.parquet of a curate run."
        )
    return table, json.loads(about)


def given_counts(path: Path, hashes: Mapping[str, str]) -> np.ndarray:
    """The counts of another run; `UsageError` unless it had the same metadata."""
    table, about = read_counts(path)
    if about["metadata"] != hashes:
        raise UsageError(
            f"{printable(path)} counts the entries of other metadata.",
            hint="Count again with this metadata: moviola curate count",
        )
    return np.asarray(table["count"].to_numpy())


def merged(tallies: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for tally in tallies:
        for why, many in tally.items():
            total[why] = total.get(why, 0) + many
    return total


def _read_lists(metadata: str | Path | Sequence[str]) -> tuple[dict[str, Metadata], str]:
    """The lists by language ("" for a single one), and how the report names them."""
    from moviola.data.metadata import Metadata, read_languages, read_metadata

    if isinstance(metadata, str | Path):
        path = Path(metadata)
        if path.is_dir():
            return read_languages(path), str(path)
        return {"": read_metadata(path)}, str(path)
    return {"": Metadata(tuple(metadata))}, "a list"
