"""`clean_clips`: raw clips to single scenes with people in them, as TikTokActions was made of TikTok's.

Four steps, each with its counts: what can be read; equal files once; of each clip its longest scene; scenes
in which a detector sees people. The result is a table that `moviola train` reads.

Qian et al., arXiv 2402.08875. There PySceneDetect finds scenes and YOLOv8 people; here scenes are
`moviola.media.shots`', and any callable is the detector. How clips are chosen before (hashtags) is not part.

Axis letters: T frames, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moviola.files import atomic
from moviola.types import MediaError, TimeSpan, UsageError, printable
from moviola.verbs.common import Progress, Skipped, summary

Detector = Callable[[np.ndarray], Any]
"""uint8 frames_THWC of one scene -> how many people (or whether) in each frame, or one number for all."""
TABLE, FACTS, REPORT, CUTS = "clips.jsonl", "facts.jsonl", "report.json", "clips"
_SHORT_SIDE = 480  # of the frames that a detector sees
Item = TypeVar("Item")
Made = TypeVar("Made")


class NoClipsLeft(UsageError):
    """Every clip was dropped; `report` says where."""

    def __init__(self, report: CleanReport) -> None:
        counts = ", ".join(f"{step.name} {step.before} -> {step.after}" for step in report.steps)
        first = f" The first that could not be read: {report.failed[0]}." if report.failed else ""
        super().__init__(
            f"No clip is left: {counts}.{first}",
            hint="Loosen the step that dropped them, or name other clips.",
        )
        self.report = report


@dataclass(frozen=True)
class Step:
    """How many clips came in and how many went on; `note` says why the step did nothing."""

    name: str
    before: int
    after: int
    note: str = ""


@dataclass(frozen=True)
class CleanReport:
    """`table` has a row a clip: video, start, end (seconds), scenes in the file, people (if looked for).

    Where clips were cut out, `video` is the new file, and `source`, `source_start`, `source_end` where it is
    from.
    """

    table: Path
    steps: tuple[Step, ...]
    seconds: float
    failed: tuple[Skipped, ...] = ()

    @property
    def clips(self) -> int:
        return self.steps[-1].after

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "table": self.table.name,
            "clips": self.clips,
            "seconds": round(self.seconds, 3),
            "steps": [asdict(step) for step in self.steps],
            "failed": [one.to_json() for one in self.failed],
        }

    def __str__(self) -> str:
        lines = [
            f"{step.name}: {step.before} -> {step.after}{f' ({step.note})' if step.note else ''}"
            for step in self.steps
        ]
        lines += summary(self.failed, "could not be read")
        return "\n".join([*lines, f"{self.clips} clips, {self.seconds:.1f} s: {printable(self.table)}"])


@dataclass(frozen=True)
class _Scene:
    span: TimeSpan
    scenes: int


def clean_clips(
    sources: str | Path | Iterable[str | Path],
    to: str | Path,
    *,
    detector: Detector | None = None,
    detector_name: str | None = None,
    looks: int = 8,
    shortest: float = 0.0,
    threshold: float = 3.0,
    floor: float = 30.0,
    cut: bool = False,
    workers: int = 2,
    on_progress: Progress | None = None,
) -> CleanReport:
    """Clean the videos under `sources` into the folder `to`; its `clips.jsonl` is the result.

    detector      called with up to `looks` frames of each scene (short side 480); a clip stays where it
                  counts a person in any of them. None: the step is left out, and the report says so
    detector_name what its findings are kept under; by default its own name, and where it has none (a
                  lambda) they are not kept
    shortest      seconds that a longest scene must last
    threshold, floor   of the shot detection: higher finds fewer cuts (`moviola.media.shots`)
    cut           also write each scene as a video of its own, to the folder `clips`
    workers       threads that read and decode

    What was found out of a file is kept in `facts.jsonl` by its content: a second run, also after the first
    was killed or with more clips, looks at what is new alone and gives the same table. Raises `UsageError`
    where there are no videos, and `NoClipsLeft` where none stays; an older table is then left as it was.
    """
    if looks < 1 or shortest < 0 or workers < 1:
        raise UsageError(
            f"looks and workers are at least 1, shortest at least 0; got {looks}, {workers}, {shortest}."
        )
    to = Path(to)
    if to.exists() and not to.is_dir():
        raise UsageError(f"{printable(to)} is a file, expected a folder to write the table to.")
    failed: list[Skipped] = []
    files = _videos(sources, to, failed)
    named = len(files) + len(failed)
    to.mkdir(parents=True, exist_ok=True)
    with _Facts(to / FACTS) as facts, ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        work = _Work(facts, pool, 2 * workers, on_progress)
        content = work.contents(files, failed)
        first: dict[str, Path] = {}
        for path, key in content.items():
            first.setdefault(key, path)
        scenes, broken = work.scenes(first, threshold, floor)
        failed += [Skipped(str(path), broken[key]) for path, key in content.items() if key in broken]
        readable = [key for key in content.values() if key in scenes]
        found = {key: scene for key, scene in scenes.items() if scene.span.duration >= shortest}
        steps = [
            Step("readable", named, len(readable)),
            Step("different files", len(readable), len(scenes)),
            Step("longest scene", len(scenes), len(found)),
        ]
        people: dict[str, int] = {}
        if detector is None:
            steps.append(Step("people", len(found), len(found), "no detector was given, so all stay"))
        else:
            people = work.people(first, found, detector, detector_name or _name_of(detector), looks)
            found = {key: scene for key, scene in found.items() if people.get(key)}
            steps.append(Step("people", steps[-1].after, len(found)))
        failed += [Skipped(str(first[key]), why) for key, why in work.lost.items()]
    report = CleanReport(
        to / TABLE, tuple(steps), sum(s.span.duration for s in found.values()), tuple(failed)
    )
    if not found:
        raise NoClipsLeft(report)
    rows = [_row(first[key], scene, people.get(key)) for key, scene in found.items()]
    if cut:
        rows = _cut_out(rows, list(found), to, on_progress)
    with atomic(report.table) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    with atomic(to / REPORT) as file:
        file.write(json.dumps(report.to_json(), indent=2).encode() + b"\n")
    return report


def _videos(sources: str | Path | Iterable[str | Path], to: Path, failed: list[Skipped]) -> list[Path]:
    """The videos, without those in `to` itself, which an earlier run may have cut out."""
    from moviola.media import walk

    own = to.resolve()
    found = [
        Path(os.path.abspath(one.path))  # noqa: PTH100 (links stay as they were named)
        for one in walk(sources, on_skip=lambda path, why: failed.append(Skipped(str(path), why)))
        if one.kind == "video" and own not in one.path.resolve().parents
    ]
    if not found:
        first = f" {failed[0]}." if failed else ""
        raise UsageError(f"There are no videos to clean.{first}", hint="Name files, or folders of videos.")
    return found


def _name_of(detector: Detector) -> str | None:
    """A name that stands for what the detector does; None where there is none."""
    name = f"{getattr(detector, '__module__', '')}.{getattr(detector, '__qualname__', '')}"
    return None if "<" in name or name.endswith(".") else name


class _Facts:
    """What was found out so far: lines of JSON that are added one by one, each with the key it is about.

    A line that a killed run left half written is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}

    def __enter__(self) -> _Facts:
        old = self.path.read_bytes() if self.path.exists() else b""
        whole = old[: old.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError) as error:
                raise UsageError(
                    f"{printable(self.path)}, line {number}, is not what a run wrote there.",
                    hint="Delete the file; everything is then looked at anew.",
                ) from error
            self.known[str(key)] = value
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, key: str, value: Any) -> Any:
        self.known[key] = value
        self._file.write(json.dumps([key, value]).encode() + b"\n")
        self._file.flush()
        return value


class _Work:
    """Reading, decoding and looking, with `ahead` files under way; nothing that is known is done again."""

    def __init__(
        self, facts: _Facts, pool: ThreadPoolExecutor, ahead: int, on_progress: Progress | None
    ) -> None:
        self.facts, self.pool, self.ahead, self.on_progress = facts, pool, ahead, on_progress
        self.lost: dict[str, str] = {}

    def contents(self, files: Sequence[Path], failed: list[Skipped]) -> dict[Path, str]:
        """The hash of each file's bytes, by which equal files are known."""
        made: dict[Path, str] = {}

        def look(path: Path) -> tuple[str, str | None]:
            stat = path.stat()
            name = f"file {path} {stat.st_size} {stat.st_mtime_ns}"
            if name in self.facts.known:
                return name, None
            with path.open("rb") as file:
                return name, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

        for path, found in self._each(files, look, "reading"):
            if isinstance(found, str):
                failed.append(Skipped(str(path), found))
            else:
                name, key = found
                made[path] = self.facts.known[name] if key is None else self.facts.add(name, key)
        return made

    def scenes(
        self, first: dict[str, Path], threshold: float, floor: float
    ) -> tuple[dict[str, _Scene], dict[str, str]]:
        """The longest scene of each file, the first of equally long ones; and why others have none."""
        from moviola.media import Video

        def name(key: str) -> str:
            return f"scene {key} {threshold:g} {floor:g}"

        def look(key: str) -> list[float]:
            spans = Video(first[key]).shots(threshold=threshold, floor=floor)
            longest = max(spans, key=lambda span: (round(span.duration, 3), -span.start))
            return [round(longest.start, 6), round(longest.end, 6), len(spans)]

        new = [key for key in first if name(key) not in self.facts.known]
        for key, found in self._each(new, look, "finding scenes"):
            self.facts.add(name(key), found)
        values = {key: self.facts.known[name(key)] for key in first}
        made = {k: _Scene(TimeSpan(*v[:2]), v[2]) for k, v in values.items() if not isinstance(v, str)}
        return made, {key: value for key, value in values.items() if isinstance(value, str)}

    def people(
        self,
        first: dict[str, Path],
        scenes: dict[str, _Scene],
        detector: Detector,
        detector_name: str | None,
        looks: int,
    ) -> dict[str, int]:
        """The most people in a frame of each scene. The detector is called on this thread alone."""
        from moviola.media import Video

        def name(key: str) -> str:
            span = scenes[key].span
            return f"people {key} {span.start:g} {span.end:g} {looks} {detector_name}"

        def look(key: str) -> np.ndarray:
            span, video = scenes[key].span, Video(first[key])
            batch = video.uniform(looks, start=span.start, end=span.end, short_side=_SHORT_SIDE)
            return batch.frames_THWC

        known = {} if detector_name is None else self.facts.known
        made = {key: known[name(key)] for key in scenes if name(key) in known}
        for key, found in self._each([k for k in scenes if k not in made], look, "looking for people"):
            if isinstance(found, str):
                self.lost[key] = found
                continue
            made[key] = _count(detector(found), len(found))
            if detector_name is not None:
                self.facts.add(name(key), made[key])
        return made

    def _each(
        self, items: Sequence[Item], look: Callable[[Item], Made], note: str
    ) -> Iterator[tuple[Item, Made | str]]:
        """Each item in order with what `look` made of it in the pool, or why it could not be read."""
        waiting: deque[tuple[Item, Future[Made]]] = deque()
        source = iter(items)
        for done in range(1, len(items) + 1):
            for item in islice(source, self.ahead - len(waiting)):
                waiting.append((item, self.pool.submit(look, item)))
            item, future = waiting.popleft()
            try:
                yield item, future.result()
            except MediaError as error:
                yield item, error.reason
            except OSError as error:
                yield item, f"it cannot be read ({error.strerror or error})"
            if self.on_progress is not None:
                self.on_progress(done, len(items), note)


def _count(found: Any, frames: int) -> int:
    """The most people that a detector saw in a frame."""
    counts = np.asarray(found)
    fits = counts.shape in ((), (frames,)) and counts.dtype.kind in "biuf"
    if not fits or not np.isfinite(counts).all() or (counts < 0).any():
        raise UsageError(
            f"A detector gives one number of people for {frames} frames, or one for each; got {found!r:.80}."
        )
    return int(np.ceil(counts.max()))


def _row(path: Path, scene: _Scene, people: int | None) -> dict[str, Any]:
    row = {"video": str(path), "start": scene.span.start, "end": scene.span.end, "scenes": scene.scenes}
    return row if people is None else {**row, "people": people}


def _cut_out(
    rows: Sequence[dict[str, Any]], keys: Sequence[str], to: Path, on_progress: Progress | None
) -> list[dict[str, Any]]:
    """Each row's scene as a file of its own. Those of an earlier run are kept where they are still meant."""
    from moviola.media import cut

    (to / CUTS).mkdir(exist_ok=True)
    made = []
    for done, (row, key) in enumerate(zip(rows, keys, strict=True), 1):
        start, end = row["start"], row["end"]
        name = f"{key}-{round(1000 * start)}-{round(1000 * end)}.mp4"
        if not (to / CUTS / name).is_file():
            cut(row["video"], TimeSpan(start, end), to / CUTS / name)
        rest = {k: v for k, v in row.items() if k not in ("video", "start", "end")}
        places = {"source": row["video"], "source_start": start, "source_end": end}
        made.append({"video": f"{CUTS}/{name}", **places, **rest})
        if on_progress is not None:
            on_progress(done, len(rows), "cutting")
    wanted = {Path(row["video"]).name for row in made}
    for old in (to / CUTS).glob("*-*-*.mp4"):
        if old.name not in wanted:
            old.unlink()
    return made
