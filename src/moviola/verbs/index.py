"""`index`: walk folders, embed what is new or changed, and keep it all in a folder that search reads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moviola.types import Dtype, Refusal, StoreError, UsageError, printable

if TYPE_CHECKING:
    import numpy as np

    from moviola.clip.loaded import Model
    from moviola.media import Found
    from moviola.store.feed import Frames, Item, Job
    from moviola.store.format import FileRow, ModelCard, Sampling
    from moviola.verbs.common import Progress

COMMIT_SECONDS = 20.0
"""Work older than this is committed: a kill loses no more than that and one batch."""
_COMMIT_ROWS = 8192
_PICTURE_BYTES = 96 << 20
_SEPARATOR = os.sep.encode()


@dataclass(slots=True)
class IndexReport:
    """What a run did. `failed` and `damaged` hold (path, reason); a damaged file is indexed in part.

    `texts` counts the videos that did not change but the subtitles beside them did.
    """

    index: str
    new: int = 0
    changed: int = 0
    resumed: int = 0
    texts: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    units: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0

    @property
    def done(self) -> int:
        """Files embedded in this run."""
        return self.new + self.changed + self.resumed

    @property
    def ok(self) -> bool:
        """False when something could not be read: the command then exits with a status above 0."""
        return not self.failed and not self.damaged

    def summary(self) -> str:
        """One line of counts, then one line for every file that failed or is damaged."""
        parts = [
            f"{self.done} indexed ({self.new} new, {self.changed} changed, {self.resumed} resumed)",
            f"{self.unchanged} unchanged",
            f"{self.removed} removed",
            f"{len(self.failed)} failed",
        ]
        if self.texts:
            parts.insert(1, f"{self.texts} with other subtitles than before")
        if self.damaged:
            parts.append(f"{len(self.damaged)} damaged")
        lines = [f"{', '.join(parts)}; {self.units} units from {self.seconds:.0f} s of video."]
        lines += [f"  failed: {printable(path)}: {why}" for path, why in self.failed]
        lines += [f"  damaged: {printable(path)}: {why}" for path, why in self.damaged]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "new": self.new,
            "changed": self.changed,
            "resumed": self.resumed,
            "texts": self.texts,
            "unchanged": self.unchanged,
            "removed": self.removed,
            "failed": [{"file": path, "reason": why} for path, why in self.failed],
            "damaged": [{"file": path, "reason": why} for path, why in self.damaged],
            "units": self.units,
            "seconds": round(self.seconds, 3),
            "elapsed": round(self.elapsed, 3),
            "ok": self.ok,
        }


class NothingIndexed(StoreError):
    """A run after which the index holds no picture and no video; `report` says what was skipped."""

    def __init__(self, problem: str, report: IndexReport, *, hint: str | None = None) -> None:
        super().__init__(problem, hint=hint)
        self.report = report


def index(
    paths: str | Path | Sequence[str | Path],
    to: str | Path,
    *,
    model: str | Path | Model | None = None,
    every: float | None = None,
    keyframes: bool = False,
    device: str = "auto",
    dtype: Dtype | None = None,
    batch_size: int = 32,
    tokenizer: str | Path | None = None,
    on_progress: Progress | None = None,
) -> IndexReport:
    """Bring the index at `to` up to date with the pictures and videos under `paths`.

    New and changed files are embedded, subtitles beside a video that were added, changed or removed
    are read again (that leaves its vectors alone), files that vanished from under `paths` are forgotten, all
    others are left alone; files from other paths stay. The run may be killed at any moment: the next
    one goes on, after repeating at most the last `COMMIT_SECONDS` of work.

    model       name, folder or loaded model; default: the index's own, `builtin` for a new index
    every       seconds between frames; default: the index's own, 1 s for a new index
    keyframes   only key frames: many times faster, and moments as coarse as they lie apart
    batch_size  frames or pictures per pass through the model
    tokenizer   a file, for checkpoints that come without one; the index remembers where it lies

    A file that cannot be read never stops the run: it stands in the report, and is tried again next
    time. `NothingIndexed` if the index is empty in the end; `StoreError` for a folder that is not an
    index, one that another process writes, or one made with another model or sampling.
    """
    from moviola.store.format import MANIFEST, read_manifest
    from moviola.store.writer import Writer

    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise UsageError("There is nothing to index.", hint="Name folders or files: moviola index VIDEOS")
    if batch_size < 1:
        raise UsageError(f"The batch size must be at least 1, got {batch_size}.")
    if every is not None and keyframes:
        raise UsageError("Key frames lie where they lie: give --every or --keyframes, not both.")
    if every is not None and not 0.01 <= every <= 3600:
        raise UsageError(f"--every takes seconds between 0.01 and 3600, got {every:g}.")
    folder = Path(to)
    old = read_manifest(folder) if (folder / MANIFEST).exists() else None
    loaded, source = _loaded(model, old.model.source if old else "builtin", device, dtype, tokenizer)
    if loaded.adaptation == "classifier":
        raise Refusal(
            f"The model '{loaded.name}' only adds a classifier; its vectors are those of its base.",
            hint="Index with the base model, or use this one with: moviola classify",
        )
    card = card_of(loaded, source, None if loaded is model else tokenizer)
    asked = every is not None or keyframes
    same = old is not None and old.model.same_vectors(card) and not asked
    sampling = old.sampling if old and same else sampling_for(loaded, every or 1.0, keyframes)
    report = IndexReport(os.fsdecode(folder))
    with Writer(folder, card, sampling) as writer:
        _Run(writer, loaded, sampling, batch_size, report, on_progress).over(paths)
    return report


def _loaded(
    model: str | Path | Model | None,
    default: str,
    device: str,
    dtype: Dtype | None,
    tokenizer: str | Path | None,
) -> tuple[Model, str]:
    """The model and the name under which search can load it again."""
    if model is None or isinstance(model, str | Path):
        from moviola.verbs.load import load

        source = os.fspath(model) if model is not None else default
        if Path(source).exists():
            source = os.path.abspath(source)  # noqa: PTH100 (search may run elsewhere)
        return load(source, device=device, dtype=dtype, tokenizer=tokenizer), source
    return model, model.name


def card_of(model: Model, source: str, tokenizer: str | Path | None = None) -> ModelCard:
    """What the index remembers of a model and of the file its tokenizer was read from, where given."""
    from moviola.store.format import ModelCard

    return ModelCard(
        name=model.name,
        hash=model.hash,
        system=model.system,
        source=source,
        dim=model.dim,
        recipe_hash=model.recipe.hash,
        recipe=model.recipe.to_json(),
        has_text=model.has_text,
        separable=model.separable,
        tokenizer=None if tokenizer is None else os.path.abspath(tokenizer),  # noqa: PTH100 (as source)
    )


def sampling_for(model: Model, every: float, keyframes: bool) -> Sampling:
    """Frames one by one, or windows where the model makes one vector of a fixed number of frames.

    A model of consecutive frames, or of frames at its own rate, decides the distance itself.
    """
    from moviola.parts.fixed_frames import FixedFrames
    from moviola.store.format import Sampling

    spec = model.frame_spec
    # a model that pools the vectors of single frames by query gets these; one that mixes frames, clips
    if spec.count is None or not (model.separable or isinstance(getattr(model, "module", None), FixedFrames)):
        return Sampling(every=0.0 if keyframes else every, keyframes=keyframes)
    if keyframes:
        raise Refusal(
            f"The model '{model.name}' looks at {spec.count} frames in a row, key frames are too far apart.",
            hint="Leave --keyframes out.",
        )
    window = spec.count
    if spec.sampler == "consecutive":
        every, window = 0.0, (spec.count - 1) * spec.stride + 1
    elif spec.sampler == "rate" and spec.rate:
        every = 1.0 / spec.rate
    return Sampling(every=every, window=window, hop=max(1, window // 2))


class _Run:
    """One run of `index`: plans the work, embeds what the feed decodes, commits in between."""

    def __init__(
        self,
        writer: Any,
        model: Model,
        sampling: Sampling,
        batch_size: int,
        report: IndexReport,
        on_progress: Progress | None,
    ) -> None:
        self.writer, self.model, self.sampling = writer, model, sampling
        self.batch_size, self.report, self.on_progress = batch_size, report, on_progress
        self.began = self.committed = time.monotonic()
        self.pictures: list[Any] = []
        self.bytes_total = self.bytes_done = self.files_done = self.files_total = 0
        self.shot = 0
        self.origin: dict[bytes, str] = {}  # what each file to do is for the report: new, changed, resumed
        self.windows: Any = None
        self.broken: bytes | None = None  # the open video, once its vectors turned out to be useless

    # -- the plan --------------------------------------------------------------------------------

    def over(self, paths: Sequence[str | Path]) -> None:
        from moviola.media import sidecar_marks, walk
        from moviola.store.feed import Feed
        from moviola.store.format import absolute_bytes

        skipped: dict[bytes, str] = {}
        found = {
            absolute_bytes(one.path): one
            for one in walk(paths, on_skip=lambda path, why: skipped.update({absolute_bytes(path): why}))
        }
        given = [absolute_bytes(path) for path in paths]
        gone = self._vanished(given, found, skipped)
        self.report.removed = self.writer.remove(gone)
        self.report.failed += [(os.fsdecode(path), why) for path, why in skipped.items() if path not in gone]
        marks = sidecar_marks(one.path for one in found.values() if one.kind == "video")
        jobs = [
            job
            for path, one in found.items()
            if (job := self._job(path, one, marks.get(one.path, ""))) is not None
        ]
        self.files_total = len(jobs)
        self.bytes_total = sum(job.found.size for job in jobs)
        side = self.model.preprocess.decode_hint
        try:
            with Feed(jobs, self.sampling, short_side=side, batch=self.batch_size) as feed:
                for item in feed:
                    self._take(item)
                    self._tell(item.job.path)
            self._flush_pictures()
            if jobs:
                self._tell(jobs[-1].path)
        except KeyboardInterrupt:
            self._commit()
            raise
        self._finish(found)

    def _vanished(
        self, given: Sequence[bytes], found: dict[bytes, Found], skipped: dict[bytes, str]
    ) -> set[bytes]:
        """Indexed files under the given paths that are no longer there.

        What could not be looked at is kept: a folder without permission, or a given folder that is
        missing as a whole (a drive that is not mounted). A given file that is missing is gone.
        """
        gone = set()
        for path in self.writer.files:
            if path in found:
                continue
            missing = path in given and not os.path.lexists(path)
            looked_for = any(_below(path, top) for top in given)
            if missing or (looked_for and not any(_below(path, top) for top in skipped)):
                gone.add(path)
        return gone

    def _job(self, path: bytes, found: Found, sidecars: str) -> Job | None:
        from moviola.store.feed import Job

        row: FileRow | None = self.writer.files.get(path)
        same = row is not None and (row.size, row.mtime_ns) == (found.size, found.mtime_ns)
        texts = found.kind == "video" and row is not None and row.sidecars != sidecars
        if row is not None and same and row.status == "done":
            if texts:
                return Job(found, path, frames=False, sidecars=sidecars)
            self.report.unchanged += 1
            return None
        if row is not None and same and row.status == "partial" and row.units:
            self.origin[path] = "resumed"
            return Job(found, path, row.done_until, texts=texts, sidecars=sidecars)
        self.origin[path] = "new" if row is None or not row.units else "changed"
        return Job(found, path, sidecars=sidecars)

    # -- the work --------------------------------------------------------------------------------

    def _take(self, item: Item) -> None:
        from moviola.store import feed

        if isinstance(item, feed.Picture):
            self.pictures.append(item)
            waiting = sum(one.image.width * one.image.height * 4 for one in self.pictures)
            if len(self.pictures) >= self.batch_size or waiting > _PICTURE_BYTES:
                self._flush_pictures()
        elif isinstance(item, feed.Opened):
            self._open(item)
        elif isinstance(item, feed.Frames):
            if item.job.path != self.broken:
                self._embed(item)
        elif isinstance(item, feed.Closed):
            if item.job.path != self.broken:
                self._close(item)
            self._count(item.job)
        else:
            self._fail(item.job, item.reason)
            self._count(item.job)
        waited = time.monotonic() - self.committed
        if waited >= COMMIT_SECONDS or self.writer.pending_rows >= _COMMIT_ROWS:
            self._flush_pictures()
            self._commit()

    def _begin(self, job: Job, duration: float) -> None:
        """Start the pass over a file, or over its texts, or go on with the one that was cut short."""
        if not job.texts:
            return
        found = job.found
        if job.frames and job.resume_at is None:
            self.writer.begin(
                job.path,
                size=found.size,
                mtime_ns=found.mtime_ns,
                kind=found.kind,
                duration=duration,
                sidecars=job.sidecars,
            )
        else:
            self.writer.begin_texts(job.path, sidecars=job.sidecars)
        name = os.path.basename(job.path).decode("utf-8", "replace")  # noqa: PTH119 (bytes)
        self.writer.add_texts(job.path, [(0.0, duration, name)], "name")

    def _open(self, item: Any) -> None:
        from moviola.store.feed import Windows

        self._begin(item.job, item.duration)
        self.writer.add_texts(item.job.path, item.texts, "subtitle")
        if item.problem:
            self.report.damaged.append((os.fsdecode(item.job.path), item.problem))
        if not item.job.frames:
            self.report.texts += 1
            self._count(item.job)
            return
        self.shot = max(0, self.writer.files[item.job.path].shots - 1)
        self.windows = Windows(self.sampling) if self.sampling.window else None
        self.broken = None

    def _embed(self, item: Frames) -> None:
        import numpy as np

        shot_T = self.shot + np.cumsum(item.new_shot_T)
        self.shot = int(shot_T[-1])
        if self.windows is not None:
            self.windows.add(item, shot_T)
            self._embed_windows(item.job, last=False)
            return
        vectors_TD = self.model.embed_frames(item.frames_THWC, batch_size=self.batch_size, normalize=False)
        self._store(item.job, item.times_T, item.times_T, vectors_TD, item.thumbnails, shot_T)

    def _embed_windows(self, job: Job, *, last: bool) -> None:
        import numpy as np

        ready = self.windows.ready(last=last)
        if ready:
            vectors_MD = self.model.embed_clips(
                [(frames, times) for frames, times, _, _ in ready], normalize=False
            )
            start_M = np.array([times[0] for _, times, _, _ in ready])
            end_M = np.array([times[-1] for _, times, _, _ in ready])
            shot_M = np.array([shot for *_, shot in ready])
            self._store(job, start_M, end_M, vectors_MD, [thumb for _, _, thumb, _ in ready], shot_M)

    def _store(
        self,
        job: Job,
        start_N: np.ndarray,
        end_N: np.ndarray,
        vectors_ND: np.ndarray,
        thumbnails: Sequence[bytes],
        shot_N: np.ndarray,
    ) -> None:
        before = self.writer.files[job.path].done_until
        try:
            self.writer.add_units(job.path, start_N, end_N, vectors_ND, thumbnails, shot_N)
        except ValueError as error:
            self._fail(job, str(error))
            self.broken = job.path
            return
        self.report.units += len(start_N)
        if job.found.kind == "video" and len(end_N):
            self.report.seconds += max(0.0, float(end_N[-1]) - max(0.0, before))

    def _close(self, item: Any) -> None:
        path = item.job.path
        if self.windows is not None:
            self._embed_windows(item.job, last=True)
        if self.broken == path:
            return
        if not self.writer.files[path].units:
            self._fail(item.job, item.damage or "not one frame could be sampled")
            return
        self._done(item.job, item.damage)
        if item.damage:
            self.report.damaged.append((os.fsdecode(path), item.damage))

    def _flush_pictures(self) -> None:
        import numpy as np

        if not self.pictures:
            return
        pictures, self.pictures = self.pictures, []
        vectors_ND = self.model.embed_pictures(
            [one.image for one in pictures], batch_size=self.batch_size, normalize=False
        )
        zero = np.zeros(1)
        for one, vector_D in zip(pictures, vectors_ND, strict=True):
            self._begin(one.job, 0.0)
            self._store(one.job, zero, zero, vector_D[None], [one.thumbnail], np.zeros(1, np.int32))
            if self.broken != one.job.path:
                self._done(one.job)
            self.broken = None
            self._count(one.job)

    def _done(self, job: Job, damage: str = "") -> None:
        self.writer.finish(job.path, reason=damage)
        origin = self.origin[job.path]
        setattr(self.report, origin, getattr(self.report, origin) + 1)

    def _fail(self, job: Job, reason: str) -> None:
        """Remember why a file gave nothing; the rows of an earlier pass over it stop counting."""
        self.report.failed.append((os.fsdecode(job.path), reason))
        if not job.frames:
            return  # only its subtitles were to be read; what is known of its frames stays
        row: FileRow | None = self.writer.files.get(job.path)
        if row is None or row.status != "partial":
            found = job.found
            self.writer.begin(job.path, size=found.size, mtime_ns=found.mtime_ns, kind=found.kind)
        self.writer.finish(job.path, status="failed", reason=reason)

    def _count(self, job: Job) -> None:
        self.files_done += 1
        self.bytes_done += job.found.size

    # -- commits and the end ---------------------------------------------------------------------

    def _commit(self) -> None:
        if not self.writer.is_new or any(row.units for row in self.writer.files.values()):
            self.writer.commit()
        self.committed = time.monotonic()

    def _finish(self, found: dict[bytes, Found]) -> None:
        self._commit()
        self.report.elapsed = time.monotonic() - self.began
        if any(row.status == "done" for row in self.writer.files.values()):
            self.writer.tidy()
            return
        if self.report.failed:
            what = f"none of the {len(self.report.failed)} files could be read"
            why = f"{self.report.failed[0][1]} ({printable(self.report.failed[0][0])})"
            raise NothingIndexed(f"Nothing was indexed: {what}. The first: {why}", self.report)
        raise NothingIndexed(
            "Nothing was indexed: there are no pictures or videos under the given paths.",
            self.report,
            hint="Name a folder that holds files like .jpg or .mp4.",
        )

    def _tell(self, path: bytes) -> None:
        """Files done, each weighed by its bytes, so that the time left is right for long videos too."""
        if self.on_progress is None:
            return
        row = self.writer.files.get(path)
        part = 0.0
        if row is not None and row.status == "partial" and row.duration > 0:
            part = min(1.0, max(0.0, row.done_until) / row.duration) * row.size
        share = min(1.0, (self.bytes_done + part) / max(1, self.bytes_total))
        speed = self.report.seconds / max(time.monotonic() - self.began, 1e-6)
        name = printable(os.path.basename(os.fsdecode(path)))  # noqa: PTH119 (any bytes)
        note = f"{name}, {speed:.0f}x real time" if self.report.seconds else name
        self.on_progress(share * self.files_total, self.files_total, note)


def _below(path: bytes, top: bytes) -> bool:
    return path == top or path.startswith(top.rstrip(_SEPARATOR) + _SEPARATOR)


# --------------------------------------------------------------------------------------------------
# list, remove, stats
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A line of `moviola index list`."""

    file: str
    kind: str
    duration: float
    units: int
    status: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "kind": self.kind,
            "duration": round(self.duration, 3),
            "units": self.units,
            "status": self.status,
            "reason": self.reason,
        }


def index_list(index: str | Path) -> list[IndexedFile]:
    """The files of an index, sorted by path, with those that failed and why."""
    from moviola.store.index import Index

    return [
        IndexedFile(row.file, row.kind, row.duration, row.units, row.status, row.reason)
        for row in Index(index).files
    ]


def index_remove(index: str | Path, files: Iterable[str | Path]) -> int:
    """Forget files, or all files below folders; how many. `UsageError` for a name that matches none."""
    from moviola.store.format import absolute_bytes, read_manifest
    from moviola.store.writer import Writer

    old = read_manifest(Path(index))
    with Writer(index, old.model, old.sampling) as writer:
        gone: set[bytes] = set()
        for name in files:
            top = absolute_bytes(name)
            matches = {path for path in writer.files if _below(path, top)}
            if not matches:
                raise UsageError(
                    f"The index holds no file {printable(name)}.",
                    hint=f"See what it holds with: moviola index list {printable(index)}",
                )
            gone |= matches
        count = writer.remove(gone)
        writer.tidy()
    return count


def index_stats(index: str | Path) -> dict[str, Any]:
    """Counts, sizes, model and sampling of an index, ready for JSON."""
    from moviola.store.index import Index

    opened = Index(index)
    files, manifest = opened.files, opened.manifest
    videos = [row for row in files if row.kind == "video" and row.status != "failed"]
    return {
        "index": os.fsdecode(index),
        "files": len(files),
        "videos": len(videos),
        "pictures": sum(row.kind == "picture" and row.status == "done" for row in files),
        "partial": sum(row.status == "partial" for row in files),
        "failed": sum(row.status == "failed" for row in files),
        "seconds": round(sum(row.duration for row in videos), 3),
        "units": len(opened.units),
        "texts": len(opened.texts),
        "bytes": opened.bytes_on_disk,
        "segments": len(manifest.units) + len(manifest.texts),
        "model": manifest.model.name,
        "model_hash": manifest.model.hash,
        "recipe_hash": manifest.model.recipe_hash,
        "dim": manifest.model.dim,
        "sampling": str(manifest.sampling),
        "made_by": manifest.made_by,
    }
