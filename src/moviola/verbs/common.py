"""What several verbs share: what was skipped, how progress is told, files turned into vectors.

Axis letters: N items, T frames, D embedding width, M videos.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np

from moviola.types import (
    Clip,
    Dtype,
    Encoder,
    FrameSpec,
    MediaError,
    MediaKind,
    TimeSpan,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    from PIL import Image

    from moviola.clip.loaded import Model
    from moviola.media import Video

Wanted = TypeVar("Wanted")
Seen = TypeVar("Seen")

VIDEO_FRAMES = 12
"""Frames that make a video's one vector where the model takes any number (as CLIP4Clip does)."""
MOST_FRAMES = 4096
"""Frames of one clip held at once; a model that wants more of a long video is told to cut it."""
CUT = "It was cut."
"""How the tokenizer's warning about a text that it cut to the context ends."""
_WORKERS = 2
_AHEAD = 4  # items decoded ahead of the model
BATCH_BYTES = 96 << 20  # pixels waiting for one pass, whatever the batch size


@dataclass(frozen=True)
class Skipped:
    """Something that could not be used, and why: a file's path, or a table's row."""

    path: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"file": self.path, "reason": self.reason}

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class Progress(Protocol):
    """Called after every step. `total` is None where the end is not known; `note` is the current item."""

    def __call__(self, done: float, total: float | None, note: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Look:
    """Pixels of one item: a picture, or the frames that a clip's vector is made of."""

    kind: MediaKind
    span: TimeSpan
    picture: Image.Image | None = None
    frames_THWC: np.ndarray | None = None
    times_T: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        if self.picture is not None:
            return self.picture.width * self.picture.height * 4
        return 0 if self.frames_THWC is None else self.frames_THWC.nbytes

    @property
    def clip(self) -> tuple[np.ndarray, np.ndarray]:
        """As the model's clip methods take it; a picture is a clip of one frame."""
        if self.picture is not None:
            from moviola.media import on_white

            return np.asarray(on_white(self.picture))[None], np.zeros(1)
        assert self.frames_THWC is not None
        assert self.times_T is not None
        return self.frames_THWC, self.times_T


# --------------------------------------------------------------------------------------------------
# From files to pixels
# --------------------------------------------------------------------------------------------------


def look_at(media: Clip | bytes, model: Model, *, frames: int | None = None) -> Look:
    """Decode a picture, or of a clip the frames that the model's `frame_spec` asks for.

    `frames` is how many where the model takes any number. `MediaError` for what cannot be read.
    """
    return looks_at(media, [model], frames=frames)[0]


def looks_at(media: Clip | bytes, models: Sequence[Model], *, frames: int | None = None) -> list[Look]:
    """`look_at` for several models: a video is decoded once for all that take frames of one size.

    `MediaError` for what cannot be read, or not by one of them.
    """
    from moviola.media import Video, media_kind, read_picture

    if isinstance(media, bytes):
        return [Look("picture", TimeSpan(0, 0), picture=read_picture(media))] * len(models)
    if media_kind(media.path) != "video":
        return [Look("picture", TimeSpan(0, 0), picture=read_picture(media.path))] * len(models)
    with Video(media.path) as video:
        return _looks_at_video(video, media.span, models, frames)


def _looks_at_video(
    video: Video, span: TimeSpan | None, models: Sequence[Model], frames: int | None
) -> list[Look]:
    from moviola.clip.sample import choose_frames

    whole = span is None
    span = TimeSpan(0, video.duration) if span is None else span
    if not whole and span.start >= video.duration > 0:
        raise MediaError(
            video.path,
            f"the clip starts at {span.start:g} s, but the video ends at {video.duration:g} s.",
            hint="Check the clip's times.",
        )
    found: dict[int, Look] = {}
    for side in dict.fromkeys(model.preprocess.decode_hint for model in models):
        of_side = [n for n, model in enumerate(models) if model.preprocess.decode_hint == side]
        spread, runs = [], {}
        for place in of_side:
            spec = models[place].frame_spec
            if spec.sampler in ("middle", "uniform"):
                sampler = "uniform" if spec.sampler == "uniform" else "middle"
                count = spec.count or frames or VIDEO_FRAMES
                times_T = video.instants(count, start=span.start, end=span.end, sampler=sampler)  # type: ignore[arg-type]
                spread.append((place, times_T))
            else:
                if spec not in runs:
                    runs[spec] = _run_of_frames(video, span, spec, side)
                found[place] = Look("video", span, None, *runs[spec])
        if spread:
            batch = video.at(np.concatenate([times_T for _, times_T in spread]), short_side=side)
            start = 0
            for place, wanted_T in spread:
                part = slice(start, start + len(wanted_T))
                start += len(wanted_T)
                # a short clip gives frames twice; the spec's own padding says what is to happen instead
                times_T, first_T = np.unique(batch.times_T[part], return_index=True)
                found[place] = Look("video", span, None, batch.frames_THWC[part][first_T], times_T)
    for place, model in enumerate(models):
        try:
            choose_frames(model.frame_spec, found[place].clip[1])
        except UsageError as error:
            raise MediaError(video.path, error.problem, hint=error.hint) from error
    return [found[place] for place in range(len(models))]


def _run_of_frames(video: Video, span: TimeSpan, spec: FrameSpec, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames at the model's rate, or neighbouring frames around the middle of the span."""
    start, end = span.start, span.end
    every = 1 / spec.rate if spec.sampler == "rate" and spec.rate else None
    if spec.sampler == "consecutive" and spec.count is not None:
        wanted = (spec.count - 1) * spec.stride + 1
        # half as many again, since the header's rate is only an average
        half = 0.75 * (wanted + 2) / (video.rate or 25.0)
        start, end = max(start, span.centre - half), min(end, span.centre + half)
    limit = MOST_FRAMES if every is None or spec.count is None else spec.count
    pixels, times, count = [], [], 0
    for batch in video.stream(every=every, start=start, end=end, short_side=side):
        pixels.append(batch.frames_THWC)
        times.append(batch.times_T)
        count += len(batch)
        if count >= limit:
            break
    if count > MOST_FRAMES:
        raise MediaError(
            video.path,
            f"the model wants every frame of it at once, more than {MOST_FRAMES}.",
            hint="Cut the video, or give clips with start and end.",
        )
    if not pixels:
        batch = video.at([span.centre], short_side=side)  # a span between two frames
        return batch.frames_THWC, batch.times_T
    return np.concatenate(pixels)[:limit], np.concatenate(times)[:limit]


Item = tuple[int, str, Clip | bytes | Look]
"""The number of an item, its name, and where its pixels are; or these, if somebody has decoded them."""


def looks(
    items: Iterable[Item],
    model: Model,
    *,
    frames: int | None = None,
    on_skip: Callable[[int, Skipped], None],
) -> Iterator[tuple[int, str, Look]]:
    """(index, id, pixels) of each item in order, decoded ahead of use by two threads.

    Items that cannot be read go to `on_skip(index, Skipped)`.
    """

    def look(media: Clip | bytes | Look) -> Look:
        return media if isinstance(media, Look) else look_at(media, model, frames=frames)

    return ahead(items, look, on_skip=on_skip)


def ahead(
    items: Iterable[tuple[int, str, Wanted]],
    look: Callable[[Wanted], Seen],
    *,
    on_skip: Callable[[int, Skipped], None],
) -> Iterator[tuple[int, str, Seen]]:
    """What `look` gives of each item, in order, computed ahead of use by two threads."""
    source = iter(items)
    waiting: deque[tuple[int, str, Future[Seen]]] = deque()
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode")
    try:
        while True:
            for index, name, media in islice(source, _AHEAD - len(waiting)):
                waiting.append((index, name, pool.submit(look, media)))
            if not waiting:
                return
            index, name, future = waiting.popleft()
            try:
                seen = future.result()
            except MediaError as error:
                on_skip(index, Skipped(name, error.reason))
                continue
            yield index, name, seen
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batches(
    found: Iterable[tuple[int, str, Look]], batch_size: int, *, mixed: bool = False
) -> Iterator[list[tuple[int, str, Look]]]:
    """Neighbours of one kind for one pass; `batch_size` counts pictures and frames of video.

    `mixed` lets pictures and videos share a batch, for models that see both as clips.
    """
    if batch_size < 1:
        raise UsageError(f"The batch size must be at least 1, got {batch_size}.")
    group: list[tuple[int, str, Look]] = []
    units = size = 0
    for item in found:
        look = item[2]
        more = 1 if look.times_T is None else len(look.times_T)
        other = bool(group) and not mixed and group[0][2].kind != look.kind
        if group and (other or units + more > batch_size or size + look.bytes > BATCH_BYTES):
            yield group
            group, units, size = [], 0, 0
        group.append(item)
        units, size = units + more, size + look.bytes
    if group:
        yield group


# --------------------------------------------------------------------------------------------------
# From pixels to vectors and scores
# --------------------------------------------------------------------------------------------------


def embed_media(
    model: Model,
    items: Iterable[Item],
    *,
    batch_size: int = 32,
    frames: int | None = None,
    normalize: bool = True,
    on_skip: Callable[[int, Skipped], None],
) -> Iterator[tuple[list[tuple[int, str, Look]], np.ndarray]]:
    """One vector per item, batch by batch: the items of a batch, and vectors_ND.

    Unreadable items, and those whose vector is not finite, go to `on_skip`.
    """
    for group in batches(looks(items, model, frames=frames, on_skip=on_skip), batch_size):
        if group[0][2].kind == "picture":
            pictures = [look.picture for _, _, look in group if look.picture is not None]
            vectors_ND = model.embed_pictures(pictures, batch_size=batch_size, normalize=normalize)
        else:
            clips = [look.clip for _, _, look in group]
            vectors_ND = model.embed_clips(clips, batch_size=len(clips), normalize=normalize)
        yield from _finite(group, vectors_ND, "the model gave no finite vector for it", on_skip)


def _finite(
    group: list[tuple[int, str, Look]],
    rows_NX: np.ndarray,
    why: str,
    on_skip: Callable[[int, Skipped], None],
) -> Iterator[tuple[list[tuple[int, str, Look]], np.ndarray]]:
    """The items with finite rows, and these; the others go to `on_skip`."""
    finite_N = np.isfinite(rows_NX).all(axis=1)
    for (index, name, _), finite in zip(group, finite_N, strict=True):
        if not finite:
            on_skip(index, Skipped(name, why))
    kept = [item for item, finite in zip(group, finite_N, strict=True) if finite]
    if kept:
        yield kept, rows_NX[finite_N]


def classify_media(
    model: Model,
    items: Iterable[Item],
    *,
    batch_size: int = 32,
    frames: int | None = None,
    on_skip: Callable[[int, Skipped], None],
) -> Iterator[tuple[list[tuple[int, str, Look]], np.ndarray]]:
    """Logits by a classifier of the model's own: the items of a batch, and logits_NC over its classes."""
    for group in batches(looks(items, model, frames=frames, on_skip=on_skip), batch_size):
        if group[0][2].kind == "picture":
            pictures = [look.picture for _, _, look in group if look.picture is not None]
            logits_NC = model.classify_pictures(pictures, batch_size=batch_size)
        else:
            logits_NC = model.classify_clips([look.clip for _, _, look in group], batch_size=len(group))
        yield from _finite(group, logits_NC, "the model gave no finite logits for it", on_skip)


def score_media(
    model: Model,
    text_ND: np.ndarray,
    items: Iterable[Item],
    *,
    batch_size: int = 32,
    frames: int | None = None,
    on_skip: Callable[[int, Skipped], None],
) -> Iterator[tuple[list[tuple[int, str, Look]], np.ndarray]]:
    """Scores of every text for each item by a non-separable model: the items, and scores_NM.

    `text_ND` are vectors that are NOT normalised. A picture is a clip of one frame.
    """
    found = looks(items, model, frames=frames, on_skip=on_skip)
    for group in batches(found, batch_size, mixed=True):
        clips = [look.clip for _, _, look in group]
        video, mask_MT = model.encode_clips(clips, batch_size=len(clips))
        scores_NM = _score(model, text_ND, video, mask_MT)
        why = "the model gave no finite score for it"
        for kept, scores_MN in _finite(group, scores_NM.T, why, on_skip):
            yield kept, scores_MN.T


def _score(model: Model, text_ND: np.ndarray, video: np.ndarray, mask_MT: np.ndarray) -> np.ndarray:
    """The module's own `score`, some hundred texts at a time since it may hold N x M x D numbers."""
    import torch

    encoder = cast(Encoder, model.module)
    with torch.inference_mode():
        given = torch.from_numpy(video).to(model.device, model.dtype)
        mask = torch.from_numpy(mask_MT).to(model.device)
        parts = [
            encoder.score(torch.from_numpy(chunk_ND).to(model.device, model.dtype), given, mask)
            for chunk_ND in np.array_split(text_ND, max(1, -(-len(text_ND) // 256)))
        ]
        return torch.cat(parts).float().cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Small things
# --------------------------------------------------------------------------------------------------


def resolve(
    model: str | Path | Model, *, device: str, dtype: Dtype | None, tokenizer: str | Path | None
) -> Model:
    """A loaded model as it is (its device and dtype stay), anything else through `load`."""
    from moviola.verbs.load import as_model

    return as_model(model, device=device, dtype=dtype, tokenizer=tokenizer)


def cache_folder(name: str) -> Path:
    """`moviola/NAME` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moviola" / name


@contextmanager
def counting_cuts() -> Iterator[list[str]]:
    """Inside, texts that are cut to the context are collected, instead of a warning for each."""
    cut: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield cut
    for one in seen:
        message = str(one.message)
        if message.endswith(CUT):
            cut.append(message)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def cut_note(cut: Sequence[str]) -> list[str]:
    """One sentence about the texts that `counting_cuts` collected; none where there are none."""
    return [f"{len(cut)} texts were cut to the model's context. The first: {cut[0]}"] if cut else []


def summary(failed: Sequence[Skipped], what: str, shown: int = 20) -> list[str]:
    """Lines for a terminal about what was left out; none where nothing was."""
    if not failed:
        return []
    lines = [f"{len(failed)} {what}:"]
    lines += [f"  {one}" for one in failed[:shown]]
    return lines + ([f"  and {len(failed) - shown} more"] if len(failed) > shown else [])
