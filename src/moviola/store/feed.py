"""Decoding in the background: files go in, frames and pictures come out while the model works.

One thread decodes (PyAV and Pillow release the GIL) into a short queue, so at most a few batches of
pixels exist at once. One pass over a video gives its frames, its thumbnails and its shots.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moviola.media import Found, Video, jpeg, read_picture
from moviola.store.format import Sampling
from moviola.types import MediaError

THUMBNAIL_HEIGHT = 120
_QUALITY = 75
_WAITING = 4  # items decoded ahead
# A picture is averaged down to this many times the model's size before it waits for its batch: the
# exact resampling that follows cannot tell the difference (Pillow's own advice), and memory can.
_GAP = 3


@dataclass(frozen=True, slots=True)
class Job:
    """A file to decode.

    resume_at  start of the last stored unit of a video that was cut short
    texts      its subtitles are to be read
    frames     its frames are to be decoded; False where the subtitles alone have changed
    sidecars   mark of the subtitle files beside it
    """

    found: Found
    path: bytes
    resume_at: float | None = None
    texts: bool = True
    frames: bool = True
    sidecars: str | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A video's header was read: frames follow. `texts` are its subtitles as (start, end, text)."""

    job: Job
    duration: float
    texts: list[tuple[float, float, str]]
    problem: str


@dataclass(frozen=True, slots=True)
class Frames:
    """Consecutive sampled frames of the open video: `new_shot_T` True where a shot begins."""

    job: Job
    frames_THWC: np.ndarray
    times_T: np.ndarray
    new_shot_T: np.ndarray
    thumbnails: list[bytes]


@dataclass(frozen=True, slots=True)
class Closed:
    """The open video is over; `damage` says what of it could not be read."""

    job: Job
    damage: str


@dataclass(frozen=True, slots=True)
class Picture:
    job: Job
    image: Image.Image
    thumbnail: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """A file gave nothing, or stopped giving; whatever came from it before does not count."""

    job: Job
    reason: str


Item = Opened | Frames | Closed | Picture | Failed


class Feed:
    """Iterates over the items of `jobs` in order, decoded by a thread of its own. Use it in a `with`.

    short_side   frames arrive with this short side (at least the thumbnail's height)
    batch        most frames per item
    """

    def __init__(self, jobs: Sequence[Job], sampling: Sampling, *, short_side: int, batch: int) -> None:
        self._jobs = jobs
        self._sampling = sampling
        self._short_side = short_side
        self._batch = batch
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(_WAITING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moviola-decode", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _put(self, item: Item | BaseException | None) -> bool:
        """False when nobody waits for it any more."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _run(self) -> None:
        try:
            for job in self._jobs:
                read = self._picture if job.found.kind == "picture" else self._video
                try:
                    for item in read(job):
                        if not self._put(item):
                            return
                except MediaError as error:
                    if not self._put(Failed(job, error.reason)):
                        return
        except BaseException as error:
            # Raised again in the thread that iterates.
            self._put(error)
            return
        self._put(None)

    def _picture(self, job: Job) -> Iterator[Item]:
        image = read_picture(job.found.path)
        thumbnail = jpeg(image, height=THUMBNAIL_HEIGHT, quality=_QUALITY)
        factor = min(image.size) // (_GAP * self._short_side)
        if factor > 1 and image.mode in ("RGB", "RGBA", "L", "LA"):
            image = image.reduce(factor)
        yield Picture(job, image, thumbnail)

    def _video(self, job: Job) -> Iterator[Item]:
        sampling, video = self._sampling, Video(job.found.path)
        texts, problem = [], ""
        if job.texts:
            try:
                texts = [(one.span.start, one.span.end, one.text) for one in video.subtitles()]
            except MediaError as error:
                problem = f"its subtitles were passed over: {error.reason}"
        yield Opened(job, video.duration, texts, problem)
        if not job.frames:
            return
        # After a restart the last stored unit's first frames come once more: the grid stays the same,
        # and a cut behind them is seen.
        known = 0 if job.resume_at is None else (sampling.hop or 1)
        first = True
        for batch in video.stream(
            every=sampling.every if sampling.every > 0 and not sampling.keyframes else None,
            keyframes=sampling.keyframes,
            start=job.resume_at or 0.0,
            short_side=max(self._short_side, THUMBNAIL_HEIGHT),
            batch=self._batch,
            shots=not sampling.keyframes,
        ):
            cut_T = batch.shot_T.copy()
            if first:
                cut_T[0] = first = False
            skip = min(known, len(batch))
            known -= skip
            if skip < len(batch):
                # Cuts among frames that are dropped belong to the first frame that is kept.
                cut_T[skip] |= bool(cut_T[:skip].any()) and job.resume_at is not None
                frames_THWC = batch.frames_THWC[skip:]
                yield Frames(
                    job,
                    frames_THWC,
                    batch.times_T[skip:],
                    cut_T[skip:],
                    [jpeg(one, height=THUMBNAIL_HEIGHT, quality=_QUALITY) for one in frames_THWC],
                )
        yield Closed(job, video.damage or "")


class Windows:
    """Groups frames into overlapping windows for encoders that look at several frames at once.

    A window begins every `hop` frames and holds `window` frames; the last one may be shorter.
    """

    def __init__(self, sampling: Sampling) -> None:
        assert sampling.window is not None
        assert sampling.hop is not None
        self._window, self._hop = sampling.window, sampling.hop
        self._frames: list[np.ndarray] = []
        self._times: list[float] = []
        self._shots: list[int] = []
        self._thumbnails: list[bytes] = []
        self._covered = -1.0  # time of the last frame that some window holds

    def add(self, item: Frames, shot_T: np.ndarray) -> None:
        self._frames.extend(item.frames_THWC)
        self._times.extend(float(t) for t in item.times_T)
        self._shots.extend(int(s) for s in shot_T)
        self._thumbnails.extend(item.thumbnails)

    def ready(self, *, last: bool = False) -> list[tuple[np.ndarray, np.ndarray, bytes, int]]:
        """Whole windows as (frames_THWC, times_T, thumbnail, shot); with `last` also the rest."""
        out = []
        while len(self._frames) >= self._window or (last and self._times and self._times[-1] > self._covered):
            n = min(self._window, len(self._frames))
            middle = n // 2
            out.append(
                (
                    np.stack(self._frames[:n]),
                    np.array(self._times[:n]),
                    self._thumbnails[middle],
                    self._shots[middle],
                )
            )
            self._covered = self._times[n - 1]
            for kept in (self._frames, self._times, self._shots, self._thumbnails):
                del kept[: self._hop]
        return out
