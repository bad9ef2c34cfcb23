"""Multi-view testing: a video is looked at as several clips and crops, and their probabilities are averaged.

`clips` views are spread over time. A model that spreads its frames over the video gets, in view i of n, the
instant (i + 1/2) / n of each of its intervals; one that wants a run of frames gets n runs, evenly placed.
`crops` views lie side by side along the longer side of the frame, each as large as the frame allows. (1, 1)
is what `evaluate` does without views. X-CLIP and ViFi-CLIP test with 4 x 3, SlowFast (arXiv 1812.03982) with
10 x 3.

Axis letters: N items, C classes, V views of an item, K templates, P prompts (C * K), T frames, H height,
W width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from moviola.clip.loaded import Model
from moviola.clip.preprocess import Preprocess
from moviola.clip.sample import choose_frames
from moviola.data.media_set import MediaSet
from moviola.media import Video, media_kind
from moviola.metrics.calibration import softmax
from moviola.types import Clip, Encoder, MediaError, Recipe, TimeSpan, UsageError
from moviola.verbs.classify import ClassScorer
from moviola.verbs.common import VIDEO_FRAMES, Progress, Skipped, ahead, look_at
from moviola.verbs.set_reader import NothingEvaluated

Frames = tuple[np.ndarray, np.ndarray]
"""uint8 frames_THWC and their seconds times_T."""


@dataclass(frozen=True)
class Views:
    """How many clips in time, and how many crops of each."""

    clips: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        if self.clips < 1 or self.crops < 1:
            raise UsageError(
                f"Views are at least one clip and one crop, got {self.clips} x {self.crops}.",
                hint="Usual: 1 x 1, 4 x 3 or 10 x 3.",
            )


def view_scores(
    scorer: ClassScorer,
    data: MediaSet,
    rows: Sequence[int],
    views: Views | tuple[int, int],
    *,
    frames: int | None = None,
    batch_size: int = 32,
    failed: list[Skipped] | None = None,
    on_progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the items that could be read, and probability_NC: the mean of the views' softmax.

    `batch_size` counts pictures and frames of video. What cannot be read is added to `failed`.
    """
    views = views if isinstance(views, Views) else Views(*views)
    model = scorer.model
    failed = [] if failed is None else failed
    # side by side, crops reach the edges: no margin is cut off
    wide = model if views.crops == 1 else _without_margin(model)
    index: list[int] = []
    means: list[np.ndarray] = []
    waiting: list[tuple[int, str, list[Frames]]] = []
    done = 0

    def tell(steps: int, note: str) -> None:
        nonlocal done
        done += steps
        if on_progress is not None:
            on_progress(done, len(rows), note)

    def skip(name: str, why: str) -> None:
        failed.append(Skipped(name, why))
        tell(1, name)

    def score() -> None:
        logits_VC = _logits(scorer, wide, [one for _, _, seen in waiting for one in seen])
        start = 0
        for row, name, seen in waiting:
            own_VC = logits_VC[start : start + len(seen)]
            start += len(seen)
            if not np.isfinite(own_VC).all():
                skip(name, "the model gave no finite score for it")
                continue
            index.append(row)
            means.append(softmax(own_VC).mean(0))
            tell(1, name)
        waiting.clear()

    def look(media: Clip | bytes) -> list[Frames]:
        seen = clip_views(media, model, views.clips, frames=frames)
        return [crop for one in seen for crop in side_by_side(one, model.recipe, views.crops)]

    items = data.stream(rows, on_skip=skip)
    for row, name, seen in ahead(items, look, on_skip=lambda _, one: skip(one.path, one.reason)):
        waiting.append((row, name, seen))
        if sum(len(times_T) for _, _, found in waiting for _, times_T in found) >= batch_size:
            score()
    if waiting:
        score()
    if not index:
        first = f" The first: {failed[0]}." if failed else ""
        raise NothingEvaluated(f"Not one of {len(rows)} items could be read.{first}", failed)
    return np.array(index), np.stack(means)


def clip_views(media: Clip | bytes, model: Model, count: int, *, frames: int | None = None) -> list[Frames]:
    """`count` clips of a video, spread over time; one where more would be the same.

    `MediaError` for what cannot be read.
    """
    if count == 1 or isinstance(media, bytes) or media_kind(media.path) != "video":
        return [look_at(media, model, frames=frames).clip]
    video, spec = Video(media.path), model.frame_spec
    length = video.duration
    span = media.span or TimeSpan(0, length)
    start, end = span.start, max(span.start, min(span.end, length))
    if spec.sampler in ("middle", "uniform"):
        if start >= length > 0:
            return [look_at(media, model, frames=frames).clip]  # which words the error
        many = spec.count or frames or VIDEO_FRAMES
        share_V1 = ((np.arange(count) + 0.5) / count)[:, None]
        wanted_VT = start + (np.arange(many) + share_V1) * (end - start) / many
        found = video.at(wanted_VT.ravel(), short_side=model.preprocess.decode_hint)
        shape = (count, many)
        times_VT = found.times_T.reshape(shape)
        frames_VTHWC = found.frames_THWC.reshape(*shape, *found.frames_THWC.shape[1:])
        return [_distinct(one, times_T, model, media) for one, times_T in zip(frames_VTHWC, times_VT)]
    if spec.sampler == "rate" and spec.rate:
        step = 1 / spec.rate
    else:
        step = spec.stride / (video.rate or 25.0)
    slack = end - start - step * (spec.count or 0)
    if spec.count is None or slack <= 0:
        return [look_at(media, model, frames=frames).clip]
    begins = [start + slack * (n + 0.5) / count for n in range(count)]
    spans = [TimeSpan(begin, begin + spec.count * step) for begin in begins]
    return [look_at(Clip(media.path, one), model, frames=frames).clip for one in spans]


def _distinct(frames_THWC: np.ndarray, times_T: np.ndarray, model: Model, media: Clip) -> Frames:
    """Each frame once: the model's own padding fills a short clip up."""
    times_T, first_T = np.unique(times_T, return_index=True)
    try:
        choose_frames(model.frame_spec, times_T)
    except UsageError as error:
        raise MediaError(media.path, error.problem, hint=error.hint) from error
    return frames_THWC[first_T], times_T


def side_by_side(clip: Frames, recipe: Recipe, crops: int) -> list[Frames]:
    """`crops` parts of the frames along their longer side; one where they would be the same.

    They are views into the frames, not copies. A recipe that squashes the whole frame has no crops.
    """
    frames_THWC, times_T = clip
    height, width = frames_THWC.shape[1:3]
    ratio = min(height / recipe.size[0], width / recipe.size[1])
    tall, wide = max(1, int(recipe.size[0] * ratio)), max(1, int(recipe.size[1] * ratio))
    if crops == 1 or recipe.resize == "squash" or (tall == height and wide == width):
        return [clip]
    corners = [
        (round((height - tall) * share), round((width - wide) * share)) for share in np.linspace(0, 1, crops)
    ]
    return [(frames_THWC[:, y : y + tall, x : x + wide], times_T) for y, x in dict.fromkeys(corners)]


def _without_margin(model: Model) -> Model:
    """The model with its pictures scaled to just the tower's size."""
    wide = copy.copy(model)
    wide.preprocess = Preprocess(replace(model.recipe, resize_size=None))
    return wide


def _logits(scorer: ClassScorer, model: Model, clips: Sequence[Frames]) -> np.ndarray:
    """logits_VC of clips by the model's own score (the mean over templates) or its classifier."""
    if scorer.own is not None:
        return model.classify_clips(clips, batch_size=len(clips))[:, scorer.own]
    encoder, batch = cast(Encoder, model.module), model.clip_batch(clips)
    with torch.inference_mode():
        video = encoder.encode_video(batch)
        text_PD = torch.from_numpy(scorer.text_ND).to(model.device, model.dtype)
        parts = [encoder.score(some_PD, video, batch.mask_BT) for some_PD in text_PD.split(256)]
        scores_PV = torch.cat(parts).float().cpu().numpy()
    templates = 1 if model.separable else scorer.templates  # of a separable model they are one vector already
    return scores_PV.reshape(-1, templates, len(clips)).mean(axis=1).T
