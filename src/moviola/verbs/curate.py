"""Curate a pool of image-text pairs: count its entries, plan a threshold, write the balanced set.

A run lives beside its output, in `FOLDER.partial`, until it is whole; killed at any moment, the same
command goes on from the finished pieces. Then the folder takes its name: `pairs/` holds the kept rows in
the input's own files and columns, `counts.parquet` the entries, `report.html` and `report.json` what
happened, and `match_sample.parquet` what `plan` reads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.types import MoviolaError, UsageError, printable
from moviola.verbs.curate_plan import counts_file, given_counts

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
_LOOKED_AT = 100  # files that may be damaged before one shows its columns
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
    when nothing matched, for columns that are not there, when `to` exists or lies among the pairs, when an
    unfinished run with other settings stands beside it (another threshold or tail share may go on from
    it), or when a file changed while it ran.
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
    with run.working():
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
    with run.working():
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
    settings: dict[str, Any]

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
        from moviola.data.pairs import check_name, find_pairs
        from moviola.engine import engine as open_engine

        if to.exists() or to.is_symlink():  # a link to nowhere could not be replaced at the end
            raise UsageError(f"{printable(to)} exists already.", hint="Choose another folder, or remove it.")
        check_name(to)
        lists, name = _read_lists(metadata)
        for listed in lists.values():
            check_entries(listed.entries)
        hashes = {language: listed.hash for language, listed in lists.items()}
        given_E = given_counts(counts_file(counts), hashes) if counts is not None else None
        config = replace(config, languages=len(lists) > 1 or "" not in lists)
        if len(lists) > 1 and "en" not in lists and config.tail_share is None and not only_count:
            raise UsageError(
                f"{name} has no list en, whose threshold the other languages follow.",
                hint="Add en, or give --tail-share instead of a threshold.",
            )
        work = to.with_name(to.name + ".partial")
        _check_outside(pool.sources, to)
        files = find_pairs(pool.sources)
        if any(file.path.resolve().is_relative_to(work.resolve()) for file in files):
            raise _inside(to)
        _check_columns(files, pool, several=len(lists) > 1, strict=strict, only_count=only_count)
        stats = [file.path.stat() for file in files]
        settings = {
            "metadata": {language: listed.hash for language, listed in lists.items()},
            # what has not been drawn yet may be drawn by another threshold
            "config": {k: v for k, v in config.to_json().items() if k not in ("threshold", "tail_share")},
            "columns": [list(pool.texts), pool.id, pool.language],
            "piece_rows": pool.piece_rows,
            "files": [[f.name, stat.st_size, stat.st_mtime_ns] for f, stat in zip(files, stats, strict=True)],
            "counts": str(counts) if counts else None,
            "only_count": only_count,
        }
        workers = engine[2]
        if workers is None and engine[0] == "local":
            small = sum(stat.st_size for stat in stats) < _SMALL_BYTES
            workers = 1 if small else None
        return cls(
            files,
            pool,
            lists,
            name,
            config,
            open_engine(engine[0], address=engine[1], workers=workers),
            strict,
            to,
            work,
            on_progress,
            time.monotonic(),
            given_E,
            settings,
        )

    # ------------------------------------------------------------------------------ the work folder

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the work folder: no other run has it, and what was finished there is of these settings."""
        from filelock import FileLock, Timeout

        from moviola.data.pairs import OutputError

        place = self.work / "run.json"
        try:
            if not place.exists() and any(self.work.glob("[!.]*")):
                raise UsageError(
                    f"{printable(self.work)} exists and is no unfinished run.", hint="Choose another --to."
                )
            self.work.mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / ".lock", timeout=0):
                self._claim(place)
                yield
        except Timeout as error:
            raise UsageError(
                f"Another run is writing {printable(self.to)}.", hint="Wait for it, or choose another --to."
            ) from error
        except OSError as error:  # reading has errors of its own
            raise OutputError(
                f"{printable(self.to)} could not be written ({error.strerror or error}).",
                hint="Put it right and run the same command again: finished pieces are kept.",
            ) from error

    def _claim(self, place: Path) -> None:
        """Take up the unfinished run of the same settings, or begin one."""
        from moviola.files import atomic

        if not place.exists():
            with atomic(place) as file:
                file.write(json.dumps(self.settings, indent=1).encode())
            return
        before, now = json.loads(place.read_bytes()), json.loads(json.dumps(self.settings))
        changed = sorted(name for name in now if now[name] != before.get(name))
        if changed:
            raise UsageError(
                f"{printable(self.work)} holds an unfinished run with other settings ({', '.join(changed)}).",
                hint="Run it again as it was, choose another --to, or remove that folder.",
            )

    def _check_unchanged(self, counted: _Counted) -> None:
        """What was matched must be what was written: a file may not change between the two."""
        told = {name: rest for name, *rest in self.settings["files"]}
        for file in {task.piece.file for task in counted.tasks}:
            stat = file.path.stat() if file.path.exists() else None
            if stat is None or [stat.st_size, stat.st_mtime_ns] != told[file.name]:
                raise UsageError(
                    f"{printable(file.path)} changed during the run.",
                    hint=f"Remove {printable(self.work)} and run again.",
                )

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
        """The lists as one table: an entry's number in the run is its row.

        Named by its content, since workers and notebooks keep what they opened under its name.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from moviola.files import atomic

        place = self.work / f"entries-{_hash(json.dumps(self.settings['metadata']).encode())}.parquet"
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
            self._entries(),
            self.config,
            tuple(self.pool.texts),
            self.pool.id,
            self.pool.language,
            extra=_added(self.settings["only_count"]),
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
            hint = "`moviola metadata check` lists entries that no text can hold." if summaries else None
            raise UsageError(why, hint=hint)

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
        from moviola.verbs.curate_report import merged

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
        key = _hash(prob_E.tobytes())
        place = self.work / f"probabilities-{key}.npy"  # named by its content, as the entries
        with atomic(place) as file:
            np.save(file, prob_E)
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
        if len(by_language) > 1 and self.config.tail_share is None and not by_language["en"].any():
            raise UsageError(
                "No text holds an entry of the list en, whose threshold the other languages follow.",
                hint="Give --tail-share instead of a threshold, or look at --language-column.",
            )
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

        self._check_unchanged(counted)
        out = self.work / "out"
        out.mkdir(exist_ok=True)
        columns = pq.read_table(self._entries())
        columns = columns.append_column("count", pa.array(counted.count_E, pa.int64()))
        if drawn is not None:
            columns = columns.append_column("probability", pa.array(drawn[0]))
            columns = columns.append_column("kept", pq.read_table(drawn[2])["count"])
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
# Small things
# --------------------------------------------------------------------------------------------------


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _check_outside(sources: Sequence[str | Path], to: Path) -> None:
    """Among the pairs, the output would be read as pairs by the next run."""
    for source in sources:
        path = Path(str(source).partition("**")[0]) if "**" in str(source) else Path(source)
        if path.is_dir() and to.resolve().is_relative_to(path.resolve()):
            raise _inside(to)


def _inside(to: Path) -> UsageError:
    return UsageError(
        f"{printable(to)} lies among the pairs, so a later run would read it as pairs.",
        hint="Choose a --to beside their folder.",
    )


def _added(only_count: bool) -> Any:
    from moviola.verbs.curate_stages import WriteStage

    return None if only_count else WriteStage(several=False).extra


def _check_columns(
    files: Sequence[PairFile], pool: Pool, *, several: bool, strict: bool, only_count: bool
) -> None:
    """A wrong column shows now, not after hours: in the first file that can be read."""
    from moviola.data.pairs import PairError, pair_columns

    first: PairError | None = None
    for file in files[: 1 if strict else _LOOKED_AT]:
        try:
            columns = pair_columns(
                file,
                texts=pool.texts or None,
                id=pool.id,
                language=pool.language,
                find_language=several,
                extra=_added(only_count),
            )
        except PairError as error:
            first = first or error
            continue
        if several and columns.language is None:
            raise UsageError(
                f"There are lists for several languages, and {printable(file.path)} has no column that names "
                "itself a language.",
                hint="Name it with --language-column, or give one list as --metadata.",
            )
        return
    if first is not None:
        raise first


def _read_lists(metadata: str | Path | Sequence[str]) -> tuple[dict[str, Metadata], str]:
    """The lists by language ("" for a single one), and how the report names them."""
    from moviola.data.metadata import Metadata, read_languages, read_metadata

    if isinstance(metadata, str | Path):
        path = Path(metadata)
        if path.is_dir():
            return read_languages(path), str(path)
        return {"": read_metadata(path)}, str(path)
    return {"": Metadata(tuple(metadata))}, "a list"
