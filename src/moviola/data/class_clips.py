"""Clips by class as a video encoder is trained on them: random frames, one random crop for all of them.

Where a model wants frames spread over the clip (`middle`, `uniform`), each of its equal intervals gives one
random instant (Wang et al. 2016, TSN); where it wants a run of frames (`rate`, `consecutive`), the run begins
anywhere. The frames of a clip share one crop and one mirroring.

Axis letters: B rows of a batch, T frames, C channels, H height, W width, N rows in all, D draws.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moviola.clip.sample import choose_frames
from moviola.data.class_pictures import MOST_BYTES
from moviola.data.classes import ClassSet
from moviola.data.hashing import hash_uint64, hash_uniform
from moviola.data.rows.clips import FRAMES
from moviola.data.rows.views import DRAWS, View
from moviola.media import Video, media_kind, on_white, read_picture
from moviola.types import (
    Clip,
    ClipBatch,
    FrameSpec,
    LabelField,
    MediaError,
    Needs,
    Recipe,
    TimeSpan,
    UsageError,
    VideoField,
)

MOST_OPENED = 20_000
"""Rows that are opened before training to find damaged ones; of larger sets only the files' presence."""
CROP_AREA = (0.4, 1.0)
_MOST_FRAMES = 2048
_TRIES = 8  # other clips of the class that are tried for one that cannot be read
_EPOCH, _OTHER = 0xC11B, 0xC1E0


class ClipView(View):
    """One crop and mirroring for all frames of a clip."""

    def decode_side(self, draws: Sequence[float]) -> int:
        """The short side to decode to, so that the crop has at least the tower's pixels."""
        if self.whole:
            return self.decode_hint
        share = self.area[0] + (self.area[1] - self.area[0]) * draws[0]
        return math.ceil(max(self.recipe.size) / math.sqrt(share))

    def cut(self, frames_THWC: np.ndarray, draws: Sequence[float]) -> Tensor:
        """uint8 pixels_TCHW of the crop, scaled to the tower's size."""
        if not frames_THWC.flags.writeable:
            frames_THWC = frames_THWC.copy()
        pixels_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
        rows, columns = self.recipe.size
        height, width = pixels_TCHW.shape[2:]
        if self.whole:
            scaled = self._scaled(height, width)
            pixels_TCHW = pixels_TCHW if scaled == (height, width) else self._scale(pixels_TCHW, scaled)
            top, left = self._offsets(*scaled)
            pixels_TCHW = pixels_TCHW[:, :, top : top + rows, left : left + columns]
        else:
            x, y, wide, tall = self.box(height, width, draws)
            top, left = min(round(y), height - 1), min(round(x), width - 1)
            bottom, right = max(top + 1, round(y + tall)), max(left + 1, round(x + wide))
            pixels_TCHW = self._scale(pixels_TCHW[:, :, top:bottom, left:right], (rows, columns))
        return pixels_TCHW.flip(-1) if draws[4] < self.flip else pixels_TCHW

    def normalize_into(self, out_TCHW: Tensor, pixels_TCHW: Tensor) -> None:
        torch.addcmul(self._shift_C11, pixels_TCHW.float(), self._scale_C11, out=out_TCHW)


class ClassClips:
    """`TrainingData` over some rows of a `ClassSet`: `id`, `row`, and the `ClipBatch` and labels of `needs`.

    rows        indices into `data`; a batch's row r is `data`'s rows[r]
    frames      frames of a clip where the model takes any number
    crop_area   least and largest share of a frame that a random crop keeps; (1, 1): as for encoding
    flip        chance of mirroring
    opened      that `unreadable` has been asked about these rows already

    Every draw is a hash of (seed, epoch, row). Pictures are clips of one frame. Rows that do not open are
    left out at the start and stand in `skipped`; one that breaks later is replaced by another of its class,
    drawn by hash, and told in the batch's `skipped`. Pixels are held for the rows of one batch only.
    """

    def __init__(
        self,
        data: ClassSet,
        rows: Sequence[int] | np.ndarray,
        needs: Needs,
        *,
        recipe: Recipe,
        frame_spec: FrameSpec,
        frames: int = FRAMES,
        crop_area: tuple[float, float] = CROP_AREA,
        flip: float = 0.5,
        opened: bool = False,
    ) -> None:
        foreign = [type(a).__name__ for a in needs.fields if not isinstance(a, VideoField | LabelField)]
        if foreign:
            raise UsageError(f"Clips by class have no {', '.join(foreign)}.", hint="Train on pairs for that.")
        if frames < 1:
            raise UsageError(f"A clip needs at least one frame, got frames={frames}.")
        self.needs, self.spec, self.count = needs, frame_spec, frame_spec.count or frames
        self.view = ClipView(recipe, size=None, area=crop_area, flip=flip)
        asked = np.asarray(rows, np.int64)
        self.skipped = {} if opened else unreadable(data, asked.tolist(), frame_spec)
        kept = [
            (index, name, media)
            for index, name, media in data.stream(asked.tolist())
            if index not in self.skipped
        ]
        if sum(len(media) for _, _, media in kept if isinstance(media, bytes)) > MOST_BYTES:
            raise UsageError(
                f"The pictures in the table take more than {MOST_BYTES >> 30} GiB.",
                hint="Use --shots, or files, which are read when they are needed.",
            )
        self.rows_N = np.array([index for index, _, _ in kept], np.int64)
        self.ids = [name for _, name, _ in kept]
        self._media = [media for _, _, media in kept]
        self._videos: dict[int, Video] = {}  # headers and lengths, read once
        self.labels_N = data.labels_N[self.rows_N]
        about = [data.fingerprint, self.rows_N.tolist(), self.labels_N.tolist(), str(needs), recipe.hash]
        told = json.dumps([*about, str(frame_spec), self.count, list(crop_area), flip])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows_N)

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, Any]:
        """The fields of some rows; `step` plays no part, since draws depend on the row alone."""
        rows = np.asarray(rows, np.int64)
        key = int(hash_uint64(seed, np.array([epoch], np.uint64), _EPOCH)[0])
        draws_BD = np.stack([hash_uniform(key, rows, d) for d in range(DRAWS + self.count)], axis=1)
        skipped: list[tuple[int, str]] = []
        taken, seen = [], []
        for row, draws_D in zip(rows.tolist(), draws_BD.tolist(), strict=True):
            used, clip = self._look(row, draws_D, key, skipped)
            taken.append(used)
            seen.append(clip)
        made: dict[str, Any] = {"id": [self.ids[row] for row in taken], "row": torch.from_numpy(rows)}
        for asked in self.needs.fields:
            if isinstance(asked, LabelField):
                made[asked.name] = torch.from_numpy(self.labels_N[rows])
            elif isinstance(asked, VideoField):
                made[asked.name] = self._together(seen)
        if skipped:
            made["skipped"] = skipped
        return made

    def _together(self, seen: Sequence[tuple[Tensor, np.ndarray, np.ndarray]]) -> ClipBatch:
        """Clips as one batch, shorter ones with masked zeros behind them; normalised where they will lie."""
        longest = max(len(mask_T) for _, _, mask_T in seen)
        frames_BTCHW = torch.zeros(len(seen), longest, 3, *self.view.recipe.size)
        times_BT = torch.zeros(len(seen), longest)
        mask_BT = torch.zeros(len(seen), longest, dtype=torch.bool)
        for place, (pixels_TCHW, times_T, mask_T) in enumerate(seen):
            real, many = int(mask_T.sum()), len(mask_T)  # what is masked comes last
            self.view.normalize_into(frames_BTCHW[place, :real], pixels_TCHW[:real])
            times_BT[place, :many] = torch.from_numpy(times_T.astype(np.float32))
            mask_BT[place, :real] = True
        return ClipBatch(frames_BTCHW, times_BT, mask_BT)

    def _look(
        self, row: int, draws_D: Sequence[float], key: int, skipped: list[tuple[int, str]]
    ) -> tuple[int, tuple[Tensor, np.ndarray, np.ndarray]]:
        """The row that was read, and its pixels, times and mask: another of its class where it is broken."""
        first, tried = row, [row]
        while True:
            try:
                return row, self._read(row, draws_D)
            except MediaError as error:
                skipped.append((row, error.reason))
                others = np.flatnonzero(self.labels_N == self.labels_N[first])
                others = others[~np.isin(others, tried)]
                if not len(others) or len(tried) > _TRIES:
                    raise
                drawn = hash_uint64(key, np.array([first], np.uint64), _OTHER + len(tried))[0]
                row = int(others[int(drawn % np.uint64(len(others)))])
                tried.append(row)

    def _read(self, row: int, draws_D: Sequence[float]) -> tuple[Tensor, np.ndarray, np.ndarray]:
        media, draws = self._media[row], draws_D[:DRAWS]
        if isinstance(media, bytes) or media_kind(media.path) == "picture":
            picture = read_picture(media if isinstance(media, bytes) else media.path)
            frames_THWC, times_T = np.asarray(on_white(picture))[None], np.zeros(1)
        else:
            video, side = self._video(row, media.path), self.view.decode_side(draws)
            frames_THWC, times_T = self._frames(video, media.span, draws_D[DRAWS:], side)
        try:  # the frames are chosen already; a clip with too few is filled up as the model wants it
            index_T, mask_T = choose_frames(replace(self.spec, sampler="middle"), times_T)
        except UsageError as error:
            raise MediaError(self.ids[row], error.problem, hint=error.hint) from error
        pixels_TCHW = self.view.cut(frames_THWC, draws)
        if len(index_T) != len(times_T):
            pixels_TCHW, times_T = pixels_TCHW[torch.from_numpy(index_T)], times_T[index_T]
        return pixels_TCHW, times_T, mask_T

    def _video(self, row: int, path: Path) -> Video:
        video = self._videos.get(row)
        if video is None:
            video = Video(path)
            if len(self._videos) < MOST_OPENED:
                self._videos[row] = video
        return video

    def _frames(
        self, video: Video, span: TimeSpan | None, draws_T: Sequence[float], side: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drawn frames of a clip in rising order, no more than it has."""
        start, end = _bounds(video, span)
        length, count = end - start, self.count
        spread = self.spec.sampler in ("middle", "uniform")
        if spread:
            wanted_T = start + (np.arange(count) + np.array(draws_T)) * length / count
        else:
            step = _step(self.spec, video)
            if self.spec.count is None:  # all of them
                count = min(1 + math.floor(length / step), _MOST_FRAMES)
            wanted_T = start + draws_T[0] * max(0.0, length - (count - 1) * step) + np.arange(count) * step
            wanted_T = wanted_T[: max(1, np.count_nonzero(wanted_T < end))]
        found = video.at(wanted_T, short_side=side)
        times_T, first_T = np.unique(found.times_T, return_index=True)
        if len(times_T) == len(wanted_T) or (spread and length * video.rate >= count):
            return found.frames_THWC, found.times_T  # drawn twice by chance: it stands for its neighbour
        return found.frames_THWC[first_T], times_T


def unreadable(data: ClassSet, rows: Sequence[int], spec: FrameSpec) -> dict[int, tuple[str, str]]:
    """(id, reason) by row of what cannot be opened, has no frame in its span, or is too short for the model.

    Of more than `MOST_OPENED` rows the files' presence is all that is looked at.
    """
    bad: dict[int, tuple[str, str]] = {}
    there = list(data.stream(rows))
    for row in set(rows) - {row for row, _, _ in there}:
        bad[row] = (data.ids[row], "there is no picture or video in this row")
    thorough = len(there) <= MOST_OPENED

    def why(media: Clip | bytes) -> str | None:
        try:
            _open(media, spec, thorough)
        except MediaError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(4, thread_name_prefix="open") as pool:
        for (row, name, _), reason in zip(there, pool.map(why, (one[2] for one in there)), strict=True):
            if reason is not None:
                bad[row] = (name, reason)
    return bad


def _open(media: Clip | bytes, spec: FrameSpec, thorough: bool) -> None:
    """`MediaError` for what cannot be used."""
    strict = spec.padding == "refuse" and spec.count is not None
    few = f"the model needs {spec.count} frames of each clip, this one has "
    if isinstance(media, bytes) or media_kind(media.path) == "picture":
        if thorough:
            read_picture(media if isinstance(media, bytes) else media.path)
        if strict and spec.count != 1:
            raise MediaError("picture", few + "1.")
    elif not thorough:
        if not media.path.is_file():
            raise MediaError(media.path, "there is no such file.")
    else:
        video = Video(media.path)
        if media.span is None and not strict:
            return
        start, end = _bounds(video, media.span)
        room = (end - start) / _step(spec, video) if spec.rate or video.rate else math.inf
        if strict and spec.count is not None and room < spec.count - 0.5:
            raise MediaError(media.path, few + f"about {max(1, round(room))}.")


def _bounds(video: Video, span: TimeSpan | None) -> tuple[float, float]:
    length = video.duration
    if span is None:
        return 0.0, length
    if span.start >= length > 0:
        raise MediaError(
            video.path, f"the clip starts at {span.start:g} s, but the video ends at {length:g} s."
        )
    return span.start, max(span.start, min(span.end, length))


def _step(spec: FrameSpec, video: Video) -> float:
    """Seconds between frames of a run; for frames spread over the clip, between its neighbours."""
    if spec.sampler == "rate" and spec.rate:
        return 1 / spec.rate
    return (spec.stride if spec.sampler == "consecutive" else 1) / (video.rate or 25.0)
