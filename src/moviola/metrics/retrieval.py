"""Retrieval metrics from a similarity matrix, both ways, with several captions per video.

Works for pictures as for videos: "video" below is any item of the gallery. Axis letters: N captions,
M videos. `owner_N[n]` is the column of the video that caption n belongs to.

Ties. An item as similar as the right one is counted as ranked before it (`ties="pessimistic"`, the
default), or as half before it (`ties="average"`). A constant matrix therefore never scores well.

>>> import numpy as np
>>> retrieval_metrics(np.eye(3), [0, 1, 2], ks=(1,))["t2v"]
{'R1': 100.0, 'MedR': 1.0, 'MeanR': 1.0}
>>> retrieval_metrics(np.ones((3, 3)), [0, 1, 2], ks=(1,))["t2v"]
{'R1': 0.0, 'MedR': 3.0, 'MeanR': 3.0}
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError

Ties = Literal["pessimistic", "average"]
DEFAULT_KS = (1, 5, 10)
_SHOWN = 5  # names listed in an error; the count is always given


def owners_from_ids(caption_ids: Sequence[Hashable], video_ids: Sequence[Hashable]) -> np.ndarray:
    """The column of each caption's video: `caption_ids[n]` is the id of the video it describes.

    Captions whose id names no video, videos that no caption names and ids given twice are reported
    together in one `UsageError`.
    """
    column = {video: index for index, video in enumerate(video_ids)}
    problems = []
    if len(column) < len(video_ids):
        seen: set[Hashable] = set()
        twice = [v for v in video_ids if v in seen or seen.add(v)]  # type: ignore[func-returns-value]
        problems.append(_named(twice, "video ids occur more than once"))
    lost = [f"caption {n} ({c})" for n, c in enumerate(caption_ids) if c not in column]
    if lost:
        problems.append(_named(lost, "captions belong to no video of the gallery"))
    silent = sorted(set(column) - set(caption_ids), key=lambda v: column[v])
    if silent:
        problems.append(_named(silent, "videos have no caption"))
    if problems:
        raise UsageError(
            "Captions and videos do not match. " + " ".join(problems),
            hint="Drop those rows, or give every caption the id of a video in the gallery.",
        )
    return np.array([column[c] for c in caption_ids], dtype=np.int64)


def text_to_video_ranks(
    sims_NM: npt.ArrayLike, owner_N: npt.ArrayLike, *, ties: Ties = "pessimistic"
) -> np.ndarray:
    """The 1-based rank of each caption's own video among all videos: (N,) float."""
    sims, owner = _checked(sims_NM, owner_N)
    own_N1 = np.take_along_axis(sims, owner[:, None], axis=1)
    return _rank((sims > own_N1).sum(1), (sims == own_N1).sum(1) - 1, ties)


def video_to_text_ranks(
    sims_NM: npt.ArrayLike,
    owner_N: npt.ArrayLike,
    *,
    ties: Ties = "pessimistic",
    among: Literal["videos", "captions"] = "videos",
) -> np.ndarray:
    """The 1-based rank of each video's own captions, one rank per video: (M,) float.

    `among="videos"`: each video's captions count once, by the most similar of them (the custom in
    text-video retrieval). `among="captions"`: the best own caption among all captions (the custom
    for COCO and Flickr30k). With one caption per video the two agree.
    """
    sims, owner = _checked(sims_NM, owner_N)
    videos = sims.shape[1]
    missing = np.setdiff1d(np.arange(videos), owner)
    if len(missing):
        raise UsageError(
            f"{_named(missing.tolist(), 'videos (by column) have no caption')} "
            "Video-to-text ranks need one for every video.",
            hint="Drop those columns, or report text-to-video alone.",
        )
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(videos))
    best_VM = np.maximum.reduceat(sims[order], starts, axis=0)  # row v: the best caption of video v
    own_M = np.diagonal(best_VM)
    if among == "videos":
        return _rank((best_VM > own_M).sum(0), (best_VM == own_M).sum(0) - 1, ties)
    others_NM = owner[:, None] != np.arange(videos)
    return _rank(((sims > own_M) & others_NM).sum(0), ((sims == own_M) & others_NM).sum(0), ties)


def rank_metrics(ranks: npt.ArrayLike, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """R@K in percent, and the median and mean of the 1-based ranks, as `{"R1": ..., "MedR": ...}`."""
    ranks = np.asarray(ranks, dtype=np.float64)
    if not ranks.size:
        raise UsageError("No ranks to summarise: there are no captions or no videos.")
    if any(k < 1 for k in ks):
        raise UsageError(f"R@K needs K of 1 or more, got {tuple(ks)}.")
    recalls = {f"R{k}": float((ranks <= k).mean() * 100) for k in ks}
    return recalls | {"MedR": float(np.median(ranks)), "MeanR": float(ranks.mean())}


def retrieval_metrics(
    sims_NM: npt.ArrayLike,
    owner_N: npt.ArrayLike,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    ties: Ties = "pessimistic",
    among: Literal["videos", "captions"] = "videos",
) -> dict[str, dict[str, float]]:
    """`{"t2v": {"R1", ..., "MedR", "MeanR"}, "v2t": {...}}` from captions-by-videos similarities."""
    return {
        "t2v": rank_metrics(text_to_video_ranks(sims_NM, owner_N, ties=ties), ks),
        "v2t": rank_metrics(video_to_text_ranks(sims_NM, owner_N, ties=ties, among=among), ks),
    }


def unpad_captions(sims_VCM: npt.ArrayLike, count_V: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """From similarities padded to C captions per video to `(sims_NM, owner_N)`; padding is dropped."""
    sims, count = np.asarray(sims_VCM), np.asarray(count_V)
    if sims.ndim != 3 or count.shape != sims.shape[:1] or (count > sims.shape[1]).any():
        raise UsageError(
            "Padded similarities must be (videos, captions, videos) with one caption count per video, "
            f"got {sims.shape} and counts {count.shape}."
        )
    valid_VC = np.arange(sims.shape[1]) < count[:, None]
    return sims[valid_VC], np.nonzero(valid_VC)[0]


def _rank(before: np.ndarray, level: np.ndarray, ties: Ties) -> np.ndarray:
    if ties not in ("pessimistic", "average"):
        raise UsageError(f"ties must be 'pessimistic' or 'average', got {ties!r}.")
    return 1.0 + before + level * (1.0 if ties == "pessimistic" else 0.5)


def _checked(sims_NM: npt.ArrayLike, owner_N: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    sims, owner = np.asarray(sims_NM), np.asarray(owner_N)
    if sims.ndim != 2 or owner.shape != sims.shape[:1] or not sims.size:
        raise UsageError(
            f"Expected similarities (captions, videos) and one owner per caption, got {sims.shape} "
            f"and {owner.shape}."
        )
    if not np.issubdtype(owner.dtype, np.integer):
        raise UsageError(f"Owners must be column numbers, got {owner.dtype}.", hint="See owners_from_ids.")
    if np.isnan(sims).any():
        rows = np.nonzero(np.isnan(sims).any(1))[0]
        raise UsageError(f"{_named(rows.tolist(), 'captions (by row) have NaN similarities.')}")
    lost = np.nonzero((owner < 0) | (owner >= sims.shape[1]))[0]
    if len(lost):
        raise UsageError(
            f"{_named(lost.tolist(), 'captions (by row) belong to no video')} "
            f"Owners must lie in 0..{sims.shape[1] - 1}."
        )
    return sims, owner


def _named(names: Sequence[object], what: str) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(map(str, names[:_SHOWN]))}{more}."
