"""`Video`: one object for the frames, shots, sound and subtitles of a file."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from moviola.media.batches import BatchMaker, FrameBatch
from moviola.media.container import opened, orientation, origin, video_stream
from moviola.media.decode import (
    EPSILON,
    Grid,
    Reader,
    Scaler,
    damage,
    frame_end,
    frames_at,
    no_frames,
)
from moviola.media.duration import true_end
from moviola.media.pictures import jpeg
from moviola.media.shots import ShotFinder
from moviola.media.sound import iter_sound
from moviola.media.subtitles import Subtitle, embedded_subtitles, read_subtitles, sidecars
from moviola.types import TimeSpan, UsageError

__all__ = ["FrameBatch", "StreamInfo", "Video"]

# Seconds decoded before `start` where shots are wanted, so that the first frames have a past.
_RUN_UP = 2.0


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """One stream of a file: `kind` is video, audio, subtitle, data or attachment."""

    kind: str
    codec: str
    language: str | None


class Video:
    """A video file. Making one reads the header only and raises `MediaError` if it is no video.

    Every method opens the file for itself and closes it again, so a `Video` is cheap to keep, safe
    to use from several threads and to send to other processes. `damage` tells, after frames were
    read to the end, that decoding stopped before it (a broken or cut file); None means it did not.

    >>> Video("holiday.mp4").duration                                         # doctest: +SKIP
    12.48
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damage: str | None = None
        self._duration: float | None = None
        self._look: tuple[tuple[int, int], int, bool] | None = None
        with opened(self.path) as container:
            stream = video_stream(container, self.path)
            self.streams = tuple(_describe(one) for one in container.streams)
            rate = stream.average_rate or stream.guessed_rate or stream.base_rate
            self._header_rate = float(rate) if rate else 0.0
            self._header_size = (int(stream.height), int(stream.width))
            self._promised = _promised(container, stream)

    def __repr__(self) -> str:
        return f"Video({str(self.path)!r})"

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open between calls; this is here so that a `Video` works in a `with`."""

    @property
    def has_sound(self) -> bool:
        return any(stream.kind == "audio" for stream in self.streams)

    @property
    def rate(self) -> float:
        """Average frames per second, from the header; 0 where it does not say."""
        return self._header_rate

    @property
    def duration(self) -> float:
        """Seconds from 0 to the end of the last frame, found by looking at the file's end.

        The header's word is not taken for it: some are wrong, some have none, and a file may be cut.
        """
        if self._duration is None:
            self._duration = true_end(self.path)
        return self._duration

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as displayed: after rotation; the pixel aspect ratio is ignored."""
        return self._first_look()[0]

    @property
    def rotation(self) -> int:
        """Degrees clockwise (0, 90, 180, 270) by which the stored frames are turned for display."""
        return self._first_look()[1]

    def _first_look(self) -> tuple[tuple[int, int], int, bool]:
        if self._look is None:
            with Reader(self.path) as reader:
                first = next(reader.frames(), None)
                if first is None:
                    self._look = (self._header_size, 0, False)
                else:
                    turns, mirrored = orientation(first[1])
                    self._look = (Scaler().fix(first[1]), turns * 90, mirrored)
        return self._look

    def stream(
        self,
        *,
        every: float | None = None,
        keyframes: bool = False,
        start: float = 0.0,
        end: float | None = None,
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 64,
        shots: bool = False,
    ) -> Iterator[FrameBatch]:
        """Frames with `start <= time < end` in batches, decoded in one pass with bounded memory.

        every       None: all frames. Seconds: the first frame at or after each multiple of it. The
                    multiples count from 0, so `start` in the middle gives the same frames.
        keyframes   only frames that stand for themselves; many times faster. With `every`: the first
                    key frame at or after each multiple.
        short_side, size   see `Scaler`; the default is full size
        batch       most frames per batch; large frames come in smaller batches (96 MB at most)
        shots       also find shot changes in the same pass (`shot_T`); needs every frame decoded

        A file that breaks in the middle gives what can be decoded and sets `damage`. `MediaError`
        if not one frame can be decoded; a range without frames just gives no batch.
        """
        _check_range(start, end)
        if batch < 1:
            raise UsageError(f"A batch needs at least one frame, got batch={batch}.")
        if every is not None and not (math.isfinite(every) and every > 0):
            raise UsageError(f"every must be a positive number of seconds, got {every}.")
        if shots and keyframes:
            raise UsageError(
                "Shots are found by comparing neighbouring frames: leave out keyframes or shots."
            )
        finder = ShotFinder() if shots else None
        return self._stream(every, keyframes, start, end, Scaler(short_side, size), batch, finder)

    def _stream(
        self,
        every: float | None,
        keyframes: bool,
        start: float,
        end: float | None,
        scaler: Scaler,
        batch: int,
        finder: ShotFinder | None,
    ) -> Iterator[FrameBatch]:
        self.damage = None
        grid = Grid(every) if every is not None else None
        # Frames nothing refers to need no decoding, unless shots or numbers are wanted.
        early = grid if not keyframes and finder is None else None
        first_needed = start if grid is None else grid.cell(start) * grid.every
        if finder is not None:
            first_needed -= _RUN_UP + (every or 0.0)
        pending = BatchMaker(batch, numbered=first_needed <= 0 and not keyframes and early is None)
        # Frames to return whose shot is not decided yet: the finder is a few frames behind.
        waiting: deque[tuple[int, float, np.ndarray]] = deque()
        seen = 0
        returned = 0  # number of the last frame returned, or of what would have been before `start`
        last = None
        with Reader(self.path, keyframes=keyframes) as reader:
            frames = reader.frames(early) if first_needed <= 0 else reader.frames_from(first_needed, early)
            for time, frame in frames:
                number, seen, last = seen, seen + 1, frame_end(time, frame)
                if end is not None and time >= end - EPSILON:
                    break
                if finder is not None:
                    finder.push(time, frame)
                if grid is None or grid.wants(time):
                    if time >= start - EPSILON:
                        waiting.append((number, time, scaler(frame)))
                    else:
                        returned = number
                while waiting and (finder is None or waiting[0][0] < finder.settled):
                    number, time, image = waiting.popleft()
                    pending.add(image, time, number, finder is not None and finder.between(returned, number))
                    returned = number
                    if pending.full:
                        yield pending.take()
            else:
                self.damage = damage(reader, last, None if keyframes else self._promised)
                if seen == 0 and first_needed <= 0:
                    raise no_frames(reader)
            if finder is not None:
                finder.finish()
            for number, time, image in waiting:
                pending.add(image, time, number, finder is not None and finder.between(returned, number))
                returned = number
                if pending.full:
                    yield pending.take()
            if pending.count:
                yield pending.take()

    def at(
        self,
        times: Sequence[float] | np.ndarray,
        *,
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> FrameBatch:
        """The frame on screen at each time: the last one at or before it, in the order asked.

        Times before the first frame give the first, beyond the end the last. Decodes forward from
        the key frame before each time, and only once over every stretch.
        """
        times_T = np.asarray(times, dtype=np.float64).reshape(-1)
        if times_T.size == 0:
            raise UsageError("At least one time is needed.")
        if not np.isfinite(times_T).all():
            raise UsageError("Times must be finite seconds.")
        order = np.argsort(times_T, kind="stable")
        with Reader(self.path) as reader:
            pixels, found = frames_at(reader, times_T[order], Scaler(short_side, size))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return FrameBatch(
            frames_THWC=np.stack([pixels[i] for i in back]),
            times_T=np.array(found)[back],
            index_T=None,
            shot_T=np.zeros(len(back), dtype=bool),
        )

    def uniform(
        self,
        count: int,
        *,
        start: float = 0.0,
        end: float | None = None,
        sampler: Literal["middle", "uniform"] = "middle",
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> FrameBatch:
        """`count` frames spread over [start, end] (default: the whole video), at `instants`.

        A video with fewer frames repeats some.
        """
        times_T = self.instants(count, start=start, end=end, sampler=sampler)
        return self.at(times_T, short_side=short_side, size=size)

    def instants(
        self,
        count: int,
        *,
        start: float = 0.0,
        end: float | None = None,
        sampler: Literal["middle", "uniform"] = "middle",
    ) -> np.ndarray:
        """`count` times spread over [start, end] (default: the whole video).

        `middle`: the middle of `count` equal intervals. `uniform`: `count` instants from the first
        to the last frame, both included.
        """
        _check_range(start, end)
        if count < 1:
            raise UsageError(f"At least one frame is needed, got count={count}.")
        end = self.duration if end is None else min(end, self.duration)
        start = min(start, end)
        if sampler == "middle":
            return start + (np.arange(count) + 0.5) * (end - start) / count
        if sampler == "uniform":
            return np.linspace(start, end, count) if count > 1 else np.array([start])
        raise UsageError(f"Expected the sampler 'middle' or 'uniform', got {sampler!r}.")

    def shots(self, *, threshold: float = 3.0, floor: float = 30.0, shortest: float = 0.4) -> list[TimeSpan]:
        """The shots from 0 to the end, without gaps; at least one. `moviola.media.shots` says how.

        A higher `threshold` or `floor` finds fewer cuts; no shot but the last is under `shortest` s.
        """
        finder = ShotFinder(threshold, floor=floor, shortest=shortest)
        last = None
        with Reader(self.path) as reader:
            for time, frame in reader.frames():
                finder.push(time, frame)
                last = frame_end(time, frame)
            if last is None:
                raise no_frames(reader)
            self.damage = damage(reader, last, self._promised)
        finder.finish()
        edges = [0.0, *(time for _, time in finder.cuts), max(last, self.duration)]
        return [TimeSpan(a, b) for a, b in pairwise(edges)]

    def sound(self, rate: int = 16000, *, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """Mono float32 samples in [-1, 1]; sample n belongs to time `start + n / rate`.

        `MediaError` if the file has no sound. One hour at 16 kHz takes 230 MB: see `iter_sound`.
        """
        parts = list(self.iter_sound(rate, start=start, end=end))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def iter_sound(
        self, rate: int = 16000, *, start: float = 0.0, end: float | None = None, seconds: float = 30.0
    ) -> Iterator[np.ndarray]:
        """`sound` in pieces of `seconds`, with bounded memory."""
        return iter_sound(self.path, rate, start=start, end=end, seconds=seconds)

    def subtitles(self) -> list[Subtitle]:
        """Cues of the text tracks inside the file and of `stem.srt`, `stem.vtt`, `stem.LANG.srt` beside it.

        In order of time. A file beside the video that cannot be read raises `MediaError`.
        """
        cues = embedded_subtitles(self.path) if any(one.kind == "subtitle" for one in self.streams) else []
        for beside, language in sidecars(self.path):
            cues += read_subtitles(beside, language=language)
        return sorted(cues, key=lambda cue: cue.span)

    def thumbnail(self, time: float, *, height: int = 180) -> bytes:
        """A JPEG of the frame on screen at `time`, at most `height` rows."""
        tall, wide = self.size
        rows = min(height, tall)
        if rows < 1:
            raise UsageError(f"A thumbnail needs at least one row, got height={height}.")
        size = (rows, max(1, round(wide * rows / tall)))
        return jpeg(self.at([time], size=size).frames_THWC[0], height=height)


def _describe(stream: Any) -> StreamInfo:
    codec = stream.codec_context.name if stream.codec_context is not None else "unknown"
    language = stream.metadata.get("language") or None
    return StreamInfo(str(stream.type), str(codec), None if language == "und" else language)


def _promised(container: Any, stream: Any) -> float | None:
    """Where the header says the video ends, in seconds on the video's clock."""
    if stream.duration is not None:
        begin = stream.start_time if stream.start_time is not None else 0
        return float((begin + stream.duration) * stream.time_base - origin(container, stream))
    return None


def _check_range(start: float, end: float | None) -> None:
    if not (math.isfinite(start) and start >= 0) or (end is not None and not end >= start):
        raise UsageError(f"A range needs 0 <= start <= end in seconds, got start={start}, end={end}.")
