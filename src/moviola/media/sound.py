"""Sound on the video's clock: resampled, gaps filled with silence, encoder padding cut off."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
_MOST_PADDING = 0.3


def iter_sound(
    path: Path,
    rate: int = 16000,
    *,
    start: float = 0.0,
    end: float | None = None,
    seconds: float = 30.0,
    channels: int = 1,
) -> Iterator[np.ndarray]:
    """Float32 in [-1, 1] at `rate`, (S,) or (S, channels), in pieces of `seconds`, from `start` on.

    Sample n belongs to time `start + n / rate` on the video's clock. One channel is the average of
    all; two keep stereo. Where the file has no sound for a while (also before its first sample)
    there is silence. `MediaError` if the file has no sound at all.
    """
    if rate < 1 or channels not in (1, 2):
        raise UsageError(f"Sound needs a positive rate and 1 or 2 channels, got {rate} and {channels}.")
    if not (math.isfinite(start) and start >= 0) or (end is not None and not end >= start):
        raise UsageError(f"A range needs 0 <= start <= end in seconds, got start={start}, end={end}.")
    return _pieces(path, _Wish(rate, channels), start, end, max(1, round(seconds * rate)))


@dataclass(frozen=True, slots=True)
class _Wish:
    rate: int
    channels: int


def _pieces(path: Path, wish: _Wish, start: float, end: float | None, size: int) -> Iterator[np.ndarray]:
    left = None if end is None else max(0, round((end - start) * wish.rate))
    held: list[np.ndarray] = []
    count = 0
    for part in _samples(path, wish, start):
        if wish.channels == 1:
            part = part[:, 0]
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


def _samples(path: Path, wish: _Wish, start: float) -> Iterator[np.ndarray]:
    """Samples (S, channels) from `start` on, in pieces as they come."""
    with opened(path) as container:
        stream = sound_stream(container, path)
        zero = float(_zero(container, path, stream))
        seeked = _seek(container, stream, zero, start)
        resampler = _Resampler(wish)
        skip: int | None = None
        for time, samples, source_rate in _continuous(container, stream, zero, wish):
            if skip is None:
                # The resampler starts at the first sample: place that on the clock once.
                skip = round((start - time) * wish.rate)
                if skip < 0:
                    if seeked:
                        break
                    yield np.zeros((-skip, wish.channels), dtype=np.float32)
                    skip = 0
            for part in resampler.push(samples, source_rate):
                yield part[skip:]
                skip = max(0, skip - len(part))
        else:
            if skip is None and not seeked:
                raise MediaError(path, "the sound stream holds no sample that can be decoded.")
            for part in resampler.finish():
                yield part[skip or 0 :]
                skip = max(0, (skip or 0) - len(part))
            return
    # The seek landed after the wanted start: decode from the beginning and drop what comes before.
    skip = round(start * wish.rate)
    for part in _samples(path, wish, 0.0):
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


def _continuous(
    container: Any, stream: Any, zero: float, wish: _Wish
) -> Iterator[tuple[float, np.ndarray, int]]:
    """(time of the first sample, samples, their rate): gaps filled, overlaps and padding dropped."""
    tick = float(stream.time_base)
    stop = None
    if stream.duration:
        stop = ((stream.start_time or 0) + stream.duration) * tick - zero
    clock: float | None = None
    # What lies beyond the promised end: the encoder's padding if little, else the promise was wrong.
    beyond: list[tuple[float, np.ndarray, int]] = []
    for frame in sound_frames(container, stream):
        samples, rate = _channels(frame, wish.channels), frame.sample_rate
        time = clock if frame.pts is None else frame.pts * float(frame.time_base) - zero
        if time is None:
            time = 0.0
        if clock is None and time < 0:
            # Encoder priming before 0.
            drop = min(len(samples), round(-time * rate))
            samples, time = samples[drop:], time + drop / rate
        elif clock is not None:
            gap = time - clock
            time = clock
            if _JITTER < gap < _LONGEST_GAP:
                silence = np.zeros((round(gap * rate), samples.shape[1]), dtype=np.float32)
                samples = np.concatenate([silence, samples])
            elif gap < -_JITTER:
                samples = samples[min(len(samples), round(-gap * rate)) :]
        clock = time + len(samples) / rate
        if stop is not None and clock > stop:
            inside = max(0, round((stop - time) * rate))
            beyond.append((time + inside / rate, samples[inside:], rate))
            if sum(len(part) / of for _, part, of in beyond) > _MOST_PADDING:
                stop = None
            samples = samples[:inside]
        if len(samples):
            yield time, samples, rate
        if stop is None and beyond:
            yield from beyond
            beyond = []


def sound_frames(container: Any, stream: Any) -> Iterator[Any]:
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


def _channels(frame: Any, channels: int) -> np.ndarray:
    """A frame's samples as float32 (S, channels) in [-1, 1]."""
    count = frame.layout.nb_channels
    if channels == 2 and count > 2:
        # Surround: swresample knows which speaker goes to which side.
        mixed = av.AudioResampler(format="fltp", layout="stereo", rate=frame.sample_rate).resample(frame)
        return np.concatenate([_flat(one, 2) for one in mixed])
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, count)
    zero, scale = _WHOLE.get(samples.dtype.str[1:], (0.0, 1.0))
    if channels == 1:
        samples = samples.mean(axis=1, dtype=np.float64, keepdims=True)
    elif count == 1:
        samples = np.repeat(samples, 2, axis=1)
    made = (samples.astype(np.float64) - zero) / scale
    return np.nan_to_num(made).clip(-1, 1).astype(np.float32)


class _Resampler:
    """swresample on floats; a new one where the source's rate changes."""

    def __init__(self, wish: _Wish) -> None:
        self._wish = wish
        self._layout = "mono" if wish.channels == 1 else "stereo"
        self._source: int | None = None
        self._engine: Any = None
        self._sent = 0

    def push(self, samples: np.ndarray, source: int) -> list[np.ndarray]:
        parts: list[np.ndarray] = []
        if self._source != source:
            parts = self.finish()
            self._source = source
            self._sent = 0
            if source != self._wish.rate:
                self._engine = av.AudioResampler(format="flt", layout=self._layout, rate=self._wish.rate)
        if self._engine is None:
            return [*parts, samples]
        packed = np.ascontiguousarray(samples).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=self._layout)
        frame.sample_rate = source
        frame.pts = self._sent
        self._sent += len(samples)
        return parts + [_flat(one, self._wish.channels) for one in self._engine.resample(frame)]

    def finish(self) -> list[np.ndarray]:
        if self._engine is None:
            return []
        engine, self._engine = self._engine, None
        return [_flat(one, self._wish.channels) for one in engine.resample(None)]


def _flat(frame: Any, channels: int) -> np.ndarray:
    samples = np.asarray(frame.to_ndarray(), dtype=np.float32)
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    return samples.clip(-1, 1)
