"""One decoding pass over a video: true times, frames not wanted dropped early, the rest resized.

Clock: 0 s is the container's start (see `container.origin`), times are presentation times as
ffprobe prints them, less that start. AVI has no presentation times, so its decoding times are used
(as ffprobe does); raw streams without any time stamp are counted at their nominal rate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from moviola.media.container import opened, orientation, origin, reason, turned, video_stream
from moviola.types import MediaError, UsageError

EPSILON = 1e-6
"""Seconds by which two times may differ and still be called equal (rounding of time stamps)."""

# Frame threads decode 1.5 times faster on two cores (same CPU time); each one holds a few frames, so
# a machine with many cores does not spend a gigabyte on one video.
_MOST_THREADS = 4

# Without an index of key frames, a jump further ahead than this many seconds is worth a seek.
_BLIND_JUMP = 4.0


class Grid:
    """The instants 0, s, 2s, ...; a frame is wanted when it is the first at or after one of them."""

    def __init__(self, every: float) -> None:
        self.every = every
        self._last = -1
        self._first_pts: dict[int, int] = {}

    def cell(self, time: float) -> int:
        return math.floor((time + EPSILON) / self.every)

    def wants(self, time: float) -> bool:
        """Called for every decoded frame in order of presentation."""
        cell = self.cell(time)
        if cell <= self._last:
            return False
        self._last = cell
        return True

    def surely_unwanted(self, time: float, pts: int) -> bool:
        """Called for every packet before decoding: True when an earlier frame of its cell was seen.

        Packets come in decoding order. The first frame of a cell is never called unwanted, so
        skipping the others (where nothing refers to them) leaves the result unchanged.
        """
        cell = self.cell(time)
        first = self._first_pts.get(cell)
        if first is None or pts < first:
            self._first_pts[cell] = pts
            if len(self._first_pts) > 64:
                for old in sorted(self._first_pts)[:32]:
                    del self._first_pts[old]
            return False
        return pts > first


class Reader:
    """An open video stream that seeks and decodes; use as a context manager.

    `damage` tells after reading whether and where decoding stopped early, `bad_packets` how many
    packets could not be decoded and were passed over.
    """

    def __init__(self, path: Path, *, keyframes: bool = False) -> None:
        self.path = path
        self.keyframes = keyframes
        self.damage: str | None = None
        self.bad_packets = 0
        self._at_start = True
        self._open()

    def _open(self) -> None:
        self._context = opened(self.path)
        self.container = self._context.__enter__()
        try:
            self.stream = video_stream(self.container, self.path)
        except BaseException:
            self.close()
            raise
        codec = self.stream.codec_context
        codec.thread_type = "AUTO"
        codec.thread_count = min(_MOST_THREADS, os.cpu_count() or 1)
        self.tick: float = float(self.stream.time_base)
        self._zero = origin(self.container, self.stream) / self.stream.time_base
        self._whole_zero = int(self._zero) if self._zero.denominator == 1 else None
        rate = self.stream.guessed_rate or self.stream.average_rate
        self.step = 1 / float(rate) if rate else 0.04
        self._step = self.step / self.tick
        # AVI stores no presentation times; what the parser adds is right only where it reads the
        # order of frames from the stream itself.
        self._no_pts = self.container.format.name == "avi" and codec.name not in ("h264", "hevc")

    def close(self) -> None:
        self._context.__exit__(None, None, None)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def seconds(self, pts: float) -> float:
        """A time stamp of the stream as seconds on the video's clock."""
        if self._whole_zero is not None and pts == int(pts):
            # Integer arithmetic first: the same double that pts / rate gives.
            base = self.stream.time_base
            return (int(pts) - self._whole_zero) * base.numerator / base.denominator
        return (pts - float(self._zero)) * self.tick

    def stamp(self, seconds: float) -> int:
        return math.floor(seconds / self.tick + float(self._zero) + 1e-3)

    def frames(self, grid: Grid | None = None) -> Iterator[tuple[float, Any]]:
        """(time, frame) from the current position to the end, in order of presentation.

        Packets that cannot be decoded are passed over, as players do. `grid` lets the decoder leave
        out frames that nothing refers to and that `grid` does not want (others come all the same).
        """
        last: float | None = float(self._zero) - self._step if self._at_start else None
        for pts, frame in self._key_frames() if self.keyframes else self._all_frames(grid):
            if pts is None:
                # No time stamp at all: one nominal frame after the one before.
                if last is None:
                    continue
                pts = last + self._step
            last = pts if last is None else max(last, pts)
            yield self.seconds(last), frame

    def _all_frames(self, grid: Grid | None) -> Iterator[tuple[float | None, Any]]:
        codec = self.stream.codec_context
        # After a seek: nothing before the first key frame can be decoded, and frames shown before it
        # (open groups) lean on frames that were not read.
        wait_for_key, floor = not self._at_start, None
        self._at_start = False
        skipping = False
        for packet in self._packets():
            if wait_for_key and packet.size:
                if not packet.is_keyframe:
                    continue
                wait_for_key, floor = False, packet.pts
            if grid is not None and not self._no_pts and packet.pts is not None:
                skip = grid.surely_unwanted(self.seconds(packet.pts), packet.pts)
                if skip != skipping:
                    codec.skip_frame = "NONREF" if skip else "DEFAULT"
                    skipping = skip
            for frame in self._decode(packet):
                pts = frame.dts if self._no_pts or frame.pts is None else frame.pts
                if floor is None or pts is None or pts >= floor:
                    yield pts, frame

    def _key_frames(self) -> Iterator[tuple[float | None, Any]]:
        """Each key frame decoded by itself, so that its time is its packet's in every format."""
        codec = self.stream.codec_context
        counting = self._at_start
        self._at_start = False
        for number, packet in enumerate(self._packets()):
            if not packet.size or not packet.is_keyframe:
                continue
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is None and counting:
                pts = float(self._zero) + number * self._step
            frames = self._decode(packet) + self._decode(None)
            codec.flush_buffers()
            for frame in frames[:1]:
                yield pts, frame

    def _decode(self, packet: Any | None) -> list[Any]:
        try:
            return list(self.stream.codec_context.decode(packet))
        except (av.FFmpegError, ValueError):
            self.bad_packets += packet is not None
            return []

    def _packets(self) -> Iterator[Any]:
        """Packets to the end, then one of size 0 that makes the decoder give what it still holds."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.FFmpegError, OSError) as error:
                self.damage = f"reading stopped early ({reason(error)})"
                yield av.Packet()
                return
            yield packet

    def restart(self) -> None:
        """Back to the first frame, by opening the file anew (works for every format)."""
        self.close()
        self._at_start = True
        self._open()

    def frames_from(self, time: float, grid: Grid | None = None) -> Iterator[tuple[float, Any]]:
        """Frames beginning at a key frame at or before `time` (or at the first frame of all)."""
        for back in (0.0, 1.0, 4.0, 16.0, 64.0):
            if time - back <= 0:
                break
            try:
                self.container.seek(self.stamp(time - back), stream=self.stream)
            except (av.FFmpegError, OSError):
                break
            self._at_start = False
            frames = self.frames(grid)
            first = next(frames, None)
            if first is not None and first[0] <= time + EPSILON:
                return _chain(first, frames)
        self.restart()
        return self.frames(grid)

    def worth_a_seek(self, here: float, target: float) -> bool:
        """True when a key frame lies between: seeking saves decoding what is in the gap."""
        if target < here:
            return True
        entries: Any = self.stream.index_entries
        if len(entries) > 1:
            found = entries.search_timestamp(self.stamp(target))
            if 0 <= found < len(entries):
                # Index entries are decoding times, up to a few frames before the presentation.
                return self.seconds(entries[found].timestamp) > here + 16 * self._step * self.tick
        return target - here > _BLIND_JUMP


def _chain(first: tuple[float, Any], rest: Iterator[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
    yield first
    yield from rest


class Scaler:
    """Frames as upright uint8 RGB of one size: swscale's bicubic, then turning.

    `size` is (height, width) as displayed; `short_side` keeps the proportions (the long side is
    rounded down, as torchvision's Resize does). Without either the first frame's size holds for the
    whole video, also where the stream changes its size later.
    """

    def __init__(self, short_side: int | None = None, size: tuple[int, int] | None = None) -> None:
        if short_side is not None and size is not None:
            raise UsageError("Give short_side or size, not both.")
        if (short_side is not None and short_side < 1) or (size is not None and min(size) < 1):
            raise UsageError(f"A frame needs at least one pixel, got short_side={short_side}, size={size}.")
        self._short_side = short_side
        self.size = size
        self._reformatter = VideoReformatter()
        # Asking a frame for its side data ties the two together until Python's garbage collector
        # comes: hundreds of large frames. So it is asked once for every angle.
        self._upright: dict[int, tuple[int, bool]] = {}

    def _orientation(self, frame: Any) -> tuple[int, bool]:
        angle = frame.rotation
        if angle not in self._upright:
            self._upright[angle] = orientation(frame)
        return self._upright[angle]

    def fix(self, frame: Any) -> tuple[int, int]:
        """The (height, width) of every frame to come, decided by the first one."""
        if self.size is None:
            height, width = frame.height, frame.width
            if self._orientation(frame)[0] % 2:
                height, width = width, height
            if self._short_side is not None:
                short, side = min(height, width), self._short_side
                height, width = height * side // short, width * side // short
            self.size = (height, width)
        return self.size

    def __call__(self, frame: Any) -> np.ndarray:
        height, width = self.fix(frame)
        turns, mirrored = self._orientation(frame)
        if turns % 2:
            height, width = width, height
        small = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        return turned(small.to_ndarray(), turns, mirrored)


def frames_at(
    reader: Reader, times: np.ndarray, render: Callable[[Any], np.ndarray]
) -> tuple[list[np.ndarray], list[float]]:
    """For each of the sorted `times` the last frame at or before it (before the first: the first)."""
    pixels: list[np.ndarray] = []
    found: list[float] = []
    frames: Iterator[tuple[float, Any]] = iter(())
    here: tuple[float, Any] | None = None
    ahead: tuple[float, Any] | None = None
    drawn: Any = None
    for target in times.tolist():
        due = ahead is not None and ahead[0] <= target + EPSILON
        if here is None or (due and reader.worth_a_seek(here[0], target)):
            frames = reader.frames_from(target)
            here, ahead = next(frames, None), next(frames, None)
            if here is None:
                raise no_frames(reader)
        while ahead is not None and ahead[0] <= target + EPSILON:
            here, ahead = ahead, next(frames, None)
        if here[1] is not drawn:
            image, drawn = render(here[1]), here[1]
        pixels.append(image)
        found.append(here[0])
    return pixels, found


def no_frames(reader: Reader) -> MediaError:
    detail = f" ({reader.bad_packets} packets could not be decoded)" if reader.bad_packets else ""
    if reader.damage:
        detail += f" ({reader.damage})"
    return MediaError(reader.path, f"the video stream holds no frame that can be decoded{detail}.")


def frame_end(time: float, frame: Any) -> float:
    """Until when a frame stays on screen, as far as the file says."""
    return time + float((frame.duration or 0) * (frame.time_base or 0))


def damage(reader: Reader, last: float | None, promised: float | None) -> str | None:
    """A sentence when decoding ended early: `last` is where the frames end, `promised` the header's word.

    Leave `promised` out where not every frame was asked for.
    """
    at = 0.0 if last is None else last
    if reader.damage is not None:
        return f"{reader.damage} after {at:.2f} s"
    if promised is not None and promised - at > max(1.0, 0.03 * promised):
        return f"the frames end at {at:.2f} s, but the header promises {promised:.2f} s"
    if reader.bad_packets:
        return f"{reader.bad_packets} packets could not be decoded and were passed over"
    return None
