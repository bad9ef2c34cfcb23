"""`FrameBatch`, what a video's frames come in, and the array it is filled into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# No batch is larger than this, whatever the frames' size: memory stays bounded at full resolution.
_BATCH_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """A few frames in order of time.

    frames_THWC  uint8 RGB, upright
    times_T      float64 seconds, true presentation times; 0 is the container's start
    index_T      number of each frame in the video from 0, or None where frames were skipped unseen
    shot_T       True where a new shot starts at this frame or after the frame returned before it;
                 all False unless shots were asked for
    """

    frames_THWC: np.ndarray
    times_T: np.ndarray
    index_T: np.ndarray | None
    shot_T: np.ndarray

    def __len__(self) -> int:
        return len(self.times_T)


class BatchMaker:
    """Collects frames into one array; the array is allocated when the first frame's size is known."""

    def __init__(self, limit: int, numbered: bool) -> None:
        self._limit = limit
        self._numbered = numbered
        self._pixels: np.ndarray | None = None
        self._times: list[float] = []
        self._numbers: list[int] = []
        self._cuts: list[bool] = []

    @property
    def count(self) -> int:
        return len(self._times)

    @property
    def full(self) -> bool:
        return self.count >= self._limit

    def add(self, image_HWC: np.ndarray, time: float, number: int, cut: bool) -> None:
        if self._pixels is None:
            self._limit = max(1, min(self._limit, _BATCH_BYTES // image_HWC.nbytes))
            self._pixels = np.empty((self._limit, *image_HWC.shape), dtype=np.uint8)
        self._pixels[self.count] = image_HWC
        self._times.append(time)
        self._numbers.append(number)
        self._cuts.append(cut)

    def take(self) -> FrameBatch:
        assert self._pixels is not None
        made = FrameBatch(
            frames_THWC=self._pixels[: self.count],
            times_T=np.array(self._times, dtype=np.float64),
            index_T=np.array(self._numbers, dtype=np.int64) if self._numbered else None,
            shot_T=np.array(self._cuts, dtype=bool),
        )
        # A new array each time: the caller may keep the old one.
        self._pixels, self._times, self._numbers, self._cuts = None, [], [], []
        return made
