"""Clips of videos by a `FrameSpec`, padded into one `ClipBatch`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moviola.clip.preprocess import Preprocess
from moviola.clip.sample import choose_frames
from moviola.media import Video, media_kind, on_white, read_picture
from moviola.types import ClipBatch, FrameSpec, MediaError, TimeSpan, UsageError

FRAMES = 8
"""Frames of a clip where the encoder takes any number."""
_MOST_FRAMES = 2048


def read_clip(
    source: bytes | Path, span: TimeSpan | None, spec: FrameSpec, preprocess: Preprocess
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """pixels_TCHW, times_T and mask_T of one clip. `MediaError` for what cannot be read."""
    if isinstance(source, bytes):
        with tempfile.NamedTemporaryFile(suffix=".video") as file:  # the decoder opens files by name
            file.write(source)
            file.flush()
            frames_THWC, times_T = _frames(Path(file.name), span, spec, preprocess.decode_hint)
    elif media_kind(source) == "picture":
        frames_THWC, times_T = np.asarray(on_white(read_picture(source)))[None], np.zeros(1)
    else:
        frames_THWC, times_T = _frames(source, span, spec, preprocess.decode_hint)
    try:
        index_K, mask_K = choose_frames(spec, times_T)
    except UsageError as error:
        name = "clip in memory" if isinstance(source, bytes) else source
        raise MediaError(name, error.problem, hint=error.hint) from error
    pixels_TCHW = preprocess.frames(frames_THWC)[torch.from_numpy(index_K)]
    pixels_TCHW[torch.from_numpy(~mask_K)] = 0
    return pixels_TCHW, times_T[index_K], mask_K


def _frames(path: Path, span: TimeSpan | None, spec: FrameSpec, side: int) -> tuple[np.ndarray, np.ndarray]:
    video = Video(path)
    length = video.duration
    start, end = (0.0, length) if span is None else (span.start, min(span.end, length))
    if span is not None and start >= length > 0:
        raise MediaError(path, f"the clip starts at {start:g} s, but the video ends at {length:g} s.")
    end = max(start, end)
    if spec.sampler in ("middle", "uniform"):
        count = spec.count or FRAMES
        sampler = "uniform" if spec.sampler == "uniform" else "middle"
        batch = video.uniform(count, start=start, end=end, sampler=sampler, short_side=side)  # type: ignore[arg-type]
        # a short clip gives frames twice; the spec's own padding says what is to happen instead
        times_T, first_T = np.unique(batch.times_T, return_index=True)
        return batch.frames_THWC[first_T], times_T
    every = 1 / spec.rate if spec.sampler == "rate" and spec.rate else None
    if spec.sampler == "consecutive" and spec.count is not None:
        # half as many again, since the header's rate is only an average
        half = 0.75 * ((spec.count - 1) * spec.stride + 3) / (video.rate or 25.0)
        middle = (start + end) / 2
        start, end = max(start, middle - half), min(end, middle + half)
    limit = spec.count if every is not None and spec.count is not None else _MOST_FRAMES
    pixels, times, count = [], [], 0
    for batch in video.stream(every=every, start=start, end=end, short_side=side):
        pixels.append(batch.frames_THWC)
        times.append(batch.times_T)
        count += len(batch)
        if count >= limit:
            break
    if not pixels:
        batch = video.at([(start + end) / 2], short_side=side)  # a span between two frames
        return batch.frames_THWC, batch.times_T
    return np.concatenate(pixels)[:limit], np.concatenate(times)[:limit]


def clip_batch(clips: Sequence[tuple[Tensor, np.ndarray, np.ndarray]]) -> ClipBatch:
    """Clips of any lengths as one batch: zeros and `mask` False behind the shorter ones."""
    longest = max(len(times_T) for _, times_T, _ in clips)
    frames_BTCHW = torch.zeros(len(clips), longest, *clips[0][0].shape[1:])
    times_BT = torch.zeros(len(clips), longest, dtype=torch.float32)
    mask_BT = torch.zeros(len(clips), longest, dtype=torch.bool)
    for row, (pixels_TCHW, times_T, mask_T) in enumerate(clips):
        many = len(times_T)
        frames_BTCHW[row, :many] = pixels_TCHW
        times_BT[row, :many] = torch.from_numpy(np.asarray(times_T, np.float32))
        mask_BT[row, :many] = torch.from_numpy(mask_T)
    return ClipBatch(frames_BTCHW, times_BT, mask_BT)
