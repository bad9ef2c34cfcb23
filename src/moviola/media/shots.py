"""Where one shot ends and the next begins: hard cuts found while decoding, a few frames behind.

Every frame becomes a small signature: means over a 9 x 16 grid of luma and chroma (where things
are) and 16 quantiles of each (which colours there are, wherever they move). The difference of two
frames is the mean absolute difference of both, in grey levels of 255. A frame starts a shot when

1. its difference from the frame before is at least `floor`, and `threshold` times the mean of the
   differences around it (so fast motion and hand-held noise raise the bar for themselves), and
2. no frame just before it resembles a frame just after it (so a flash of one or two frames, or a
   frame dropped by the camera, is no cut), and
3. the shot before it lasts at least `shortest` seconds.

Slow dissolves and fades are not found: there is no frame at which they happen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from moviola.types import UsageError

_AROUND = 3
"""Frames looked at on each side; decisions come this many frames late."""

_ROWS, _COLUMNS = 9, 16
_QUANTILES = 16
_PLANAR = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
# Chroma spans a smaller part of its range than luma does.
_WEIGHTS = (1.0, 2.0, 2.0)


class ShotFinder:
    """Fed with every frame in order; knows the cuts up to `_AROUND` frames before the last one.

    `cuts` lists (frame number, time) of every shot's first frame but the first; `settled` is the
    number of frames whose decision is final.
    """

    def __init__(self, threshold: float = 3.0, *, floor: float = 30.0, shortest: float = 0.4) -> None:
        if not (threshold >= 1 and floor >= 0 and shortest >= 0):
            raise UsageError(
                f"Shots need threshold >= 1, floor >= 0 and shortest >= 0, "
                f"got {threshold}, {floor}, {shortest}."
            )
        self.threshold = threshold
        self.floor = floor
        self.shortest = shortest
        self.cuts: list[tuple[int, float]] = []
        self.settled = 0
        self._first: float | None = None
        self._count = 0
        # Signatures, times and differences of the frames around the one being decided.
        self._recent: list[tuple[float, np.ndarray, float]] = []
        self._reformatter = VideoReformatter()

    def push(self, time: float, frame: Any) -> None:
        sign = self._signature(frame)
        change = difference(self._recent[-1][1], sign) if self._recent else 0.0
        if self._first is None:
            self._first = time
        self._recent.append((time, sign, change))
        self._count += 1
        if self._count > _AROUND:
            self._decide(self._count - 1 - _AROUND)
        if len(self._recent) > 2 * _AROUND + 1:
            self._recent.pop(0)

    def finish(self) -> None:
        """No frame follows: decide the last ones with what there is."""
        for number in range(self.settled, self._count):
            self._decide(number)

    def between(self, before: int, number: int) -> bool:
        """True if a shot starts after frame `before` and not after frame `number`."""
        for cut, _ in reversed(self.cuts):
            if cut <= before:
                break
            if cut <= number:
                return True
        return False

    def _decide(self, number: int) -> None:
        self.settled = number + 1
        here = number - (self._count - len(self._recent))
        time, _, change = self._recent[here]
        if number == 0 or change < self.floor:
            return
        around = [
            other
            for place, (_, _, other) in enumerate(self._recent)
            # The very first frame has no frame before it and so no difference.
            if place != here and abs(place - here) <= _AROUND and place + number - here > 0
        ]
        if around and change < self.threshold * float(np.mean(around)):
            return
        before = [sign for _, sign, _ in self._recent[max(0, here - _AROUND) : here]]
        after = [sign for _, sign, _ in self._recent[here : here + _AROUND + 1]]
        if any(difference(a, b) < change / 3 for a in before for b in after):
            return
        begin = self.cuts[-1][1] if self.cuts else self._first
        if begin is not None and time - begin >= self.shortest:
            self.cuts.append((number, time))

    def _signature(self, frame: Any) -> np.ndarray:
        if frame.format.name not in _PLANAR:
            height, width = min(frame.height, 72), min(frame.width, 128)
            frame = self._reformatter.reformat(
                frame,
                width=width,
                height=height,
                format="yuv444p",
                interpolation=Interpolation.AREA,
                threads=1,
            )
        return np.concatenate([_plane(plane) * weight for plane, weight in zip(frame.planes, _WEIGHTS)])


def _plane(plane: Any) -> np.ndarray:
    """Grid means and quantiles of one 8-bit plane, from about 54 x 96 of its samples."""
    whole = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
    some = whole[:: max(1, plane.height // 54), :: max(1, plane.width // 96)]
    rows, columns = min(_ROWS, some.shape[0]), min(_COLUMNS, some.shape[1])
    tall, wide = some.shape[0] // rows, some.shape[1] // columns
    blocks = some[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide)
    means = blocks.mean(axis=(1, 3), dtype=np.float32).ravel()
    ordered = np.sort(some, axis=None)
    quantiles = ordered[((np.arange(_QUANTILES) + 0.5) * len(ordered) / _QUANTILES).astype(int)]
    # Divided by their counts so that a plain sum of differences is the sum of two means.
    return np.concatenate([means / len(means), quantiles.astype(np.float32) / _QUANTILES])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Difference of two signatures in grey levels (a change of size in mid-stream is a full change)."""
    return float(np.abs(a - b).sum()) if a.shape == b.shape else 255.0
