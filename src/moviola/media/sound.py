"""Mono sound on the video's clock: resampled, gaps filled with silence, encoder padding cut off."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from moviola.media.container import opened, origin, video_stream
from moviola.types import MediaError, UsageError

# Time stamps of sound jitter by a few samples in many containers; only a larger step is a real gap
# or overlap.
_JITTER = 0.02
_PREROLL = 0.5
"""Seconds decoded before the wanted start: codecs and resamplers need a run-up."""

_LONGEST_GAP = 3600.0


def iter_sound(
    path: Path, rate: int = 16000, *, start: float = 0.0, end: float | None = None, seconds: float = 30.0
) -> Iterator[np.ndarray]:
    """Mono float32 in [-1, 1] at `rate`, in pieces of `seconds`, from `start` to `end` (or the end).

    Sample n belongs to time `start + n / rate` on the video's clock. Channels are averaged. Where
    the file has no sound for a while (also before its first sample) there is silence. `MediaError`
    if the file has no sound at all.
    """
    if rate < 1:
        raise UsageError(f"A sampling rate must be positive, got {rate}.")
    if not (math.isfinite(start) and start >= 0) or (end is not None and not end >= start):
        raise UsageError(f"A range needs 0 <= start <= end in seconds, got start={start}, end={end}.")
    return _pieces(path, rate, start, end, max(1, round(seconds * rate)))


def _pieces(path: Path, rate: int, start: float, end: float | None, size: int) -> Iterator[np.ndarray]:
    left = None if end is None else max(0, round((end - start) * rate))
    held: list[np.ndarray] = []
    count = 0
    for part in _samples(path, rate, start):
        if left is not None:
            part = part[:left]
            left -= len(part)
        while count + len(part) >= size:
            cut = size - count
            yield np.concatenate([*held, part[:cut]])
            held, count, part = [], 0, part[cut:]
        if len(part):
            held.append(part)
            count += len(part)
        if left == 0:
            break
    if count:
        yield np.concatenate(held)


def _samples(path: Path, rate: int, start: float) -> Iterator[np.ndarray]:
    """Samples at `rate` from `start` on, in pieces as they come."""
    with opened(path) as container:
        stream = sound_stream(container, path)
        zero = float(_zero(container, path, stream))
        begin = _seek(container, stream, zero, start)
        resampler = _Resampler(rate)
        skip: int | None = None
        for time, mono, source_rate in _decoded(container, stream, zero):
            if skip is None:
                # The resampler starts at the first sample: place that on the clock once.
                skip = round((start - time) * rate)
                if skip < 0:
                    if begin:
                        # A seek landed after the wanted start: decode from the beginning instead.
                        break
                    yield np.zeros(-skip, dtype=np.float32)
                    skip = 0
            for part in resampler.push(mono, source_rate):
                yield part[skip:]
                skip = max(0, skip - len(part))
        else:
            if skip is None:
                if begin:
                    return
                raise MediaError(path, "the sound stream holds no sample that can be decoded.")
            for part in resampler.finish():
                yield part[skip:]
                skip = max(0, skip - len(part))
            return
    # Only after an early break above.
    yield from _from_beginning(path, rate, start)


def _from_beginning(path: Path, rate: int, start: float) -> Iterator[np.ndarray]:
    skip = round(start * rate)
    for part in _samples(path, rate, 0.0):
        if skip < len(part):
            yield part[skip:]
        skip = max(0, skip - len(part))


def sound_stream(container: Any, path: Path) -> Any:
    for stream in container.streams.audio:
        if stream.codec_context is not None:
            return stream
    raise MediaError(path, "the file has no sound.", hint="Ask `has_sound` first.")


def _zero(container: Any, path: Path, stream: Any) -> Any:
    try:
        return origin(container, video_stream(container, path))
    except MediaError:
        # A file of sound alone: its own start is 0.
        return origin(container, stream)


def _seek(container: Any, stream: Any, zero: float, start: float) -> bool:
    """Move to a little before `start`; False when reading goes from the beginning."""
    before = start - _PREROLL
    if before <= 0:
        return False
    try:
        container.seek(math.floor((before + zero) / float(stream.time_base)), stream=stream)
    except (av.FFmpegError, OSError):
        return False
    return True


def _decoded(container: Any, stream: Any, zero: float) -> Iterator[tuple[float, np.ndarray, int]]:
    """(time of the first sample, mono samples, rate), continuous: gaps filled, overlaps dropped."""
    tick = float(stream.time_base)
    stop = None
    if stream.duration:
        # What lies beyond the stream's own end is the encoder's padding.
        stop = ((stream.start_time or 0) + stream.duration) * tick - zero
    clock: float | None = None
    for frame in _frames(container, stream):
        mono = _mono(frame)
        rate = frame.sample_rate
        time = clock if frame.pts is None else frame.pts * float(frame.time_base) - zero
        if time is None:
            time = 0.0
        if clock is None and time < 0:
            # Encoder priming before 0 (where no other start is known).
            drop = min(len(mono), round(-time * rate))
            mono, time = mono[drop:], time + drop / rate
        elif clock is not None:
            gap = time - clock
            if _JITTER < gap < _LONGEST_GAP:
                yield clock, np.zeros(round(gap * rate), dtype=np.float32), rate
            elif gap < -_JITTER:
                mono = mono[min(len(mono), round(-gap * rate)) :]
                time = clock
            else:
                time = clock
        if stop is not None:
            mono = mono[: max(0, round((stop - time) * rate))]
        if len(mono):
            yield time, mono, rate
            clock = time + len(mono) / rate


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; damaged packets are passed over, a read error ends the sound."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError, OSError):
            packet = None
        try:
            frames = stream.codec_context.decode(packet if packet is not None and packet.size else None)
        except (av.FFmpegError, ValueError):
            frames = []
        yield from frames
        if packet is None or not packet.size:
            return


_WHOLE = {"u1": (128.0, 128.0), "i2": (0.0, 32768.0), "i4": (0.0, 2147483648.0), "i8": (0.0, 2.0**63)}


def _mono(frame: Any) -> np.ndarray:
    """The mean of a frame's channels as float32 in [-1, 1]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    kind = samples.dtype.str[1:]
    if kind in _WHOLE:
        zero, scale = _WHOLE[kind]
        mono = (samples.mean(axis=0, dtype=np.float64) - zero) / scale
    else:
        mono = samples.mean(axis=0, dtype=np.float64)
    return np.nan_to_num(mono).clip(-1, 1).astype(np.float32)


class _Resampler:
    """swresample on mono floats; a new one where the source's rate changes."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._source: int | None = None
        self._engine: Any = None
        self._sent = 0

    def push(self, mono: np.ndarray, source: int) -> list[np.ndarray]:
        parts: list[np.ndarray] = []
        if self._source != source:
            parts = self.finish()
            self._source = source
            self._sent = 0
            if source != self._rate:
                self._engine = av.AudioResampler(format="flt", layout="mono", rate=self._rate)
        if self._engine is None:
            return [*parts, mono]
        frame = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
        frame.sample_rate = source
        frame.pts = self._sent
        self._sent += len(mono)
        return parts + [_flat(one) for one in self._engine.resample(frame)]

    def finish(self) -> list[np.ndarray]:
        if self._engine is None:
            return []
        engine, self._engine = self._engine, None
        return [_flat(one) for one in engine.resample(None)]


def _flat(frame: Any) -> np.ndarray:
    return np.asarray(frame.to_ndarray(), dtype=np.float32).reshape(-1).clip(-1, 1)
