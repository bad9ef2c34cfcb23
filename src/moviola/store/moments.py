"""From scores of frames to moments: which stretches of a video answer a query.

A frame's score is the cosine of its vector with the query: signal, plus a level that belongs to the
file (its look as a whole), plus noise. The steps, for one file with scores s at times t:

1. Smooth: s~(t_i) is the mean of s around t_i with Gaussian weights. A clear event needs little
   smoothing and loses its edges by more; a faint one drowns without. So sigma follows the noise:
   `smooth` * noise / height sampling steps, at least `narrow`, at most `broad` of them, and at most
   `widest` seconds (key frames may lie far apart and have little to do with each other). The noise
   is the median absolute difference of neighbours, scaled as for a Gaussian; the height is that of
   the highest peak after a first smoothing with 1.5 steps. Frames of another shot count only
   `across` as much, so a cut stays sharp.
2. Background b: the median of s~ over the file, drawn towards the median of the whole index as if
   `prior` more frames of that level had been seen. A short file, or one that is about the query
   from end to end, is so not measured against itself.
3. Peak and extent: at the highest free frame p with height h = s~(p) - b, the level is
   l = b + `keep` * h. Every frame is worth s~ - l; the moment is the run of frames around p with the
   largest sum. A short dip inside an event costs less than what lies beyond it is worth, so broken
   neighbours merge by themselves, and a lone spike far away does not. A boundary between two shots
   is a wall when s~ drops across it by more than `wall` * h, comparing the means of both sides.
4. Score: the mean of s~ over the moment, minus `share` * (b - b_index). It is a cosine, corrected
   for part of the file's own level. Frames of the moment and a margin of one frame are taken out,
   and step 3 is done again: moments never overlap.

A frame stands for the time from half-way to its neighbours, at most half a step on either side (the
last one of a file for the whole step behind it), cut to the file's duration: where a change lies between two
samples is not known, and the middle is the best guess. benchmarks/moments.py compares the
result with the single best frame, windows of fixed length and random scores.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The median absolute value of a Gaussian with standard deviation 1.
_GAUSS = 0.6745


@dataclass(frozen=True, slots=True)
class MomentSettings:
    """The constants of the method; the module says what each does. Tuned on made videos."""

    smooth: float = 4.5
    narrow: float = 0.5
    broad: float = 4.0
    widest: float = 2.0
    across: float = 0.1
    prior: float = 10.0
    keep: float = 0.4
    wall: float = 0.3
    share: float = 0.5
    most: int = 20
    """No more moments of one file than this."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of a file's units `first..last` (both included) with its time range and score."""

    start: float
    end: float
    score: float
    first: int
    last: int
    peak: int


def extents(
    time_T: np.ndarray,
    duration: float,
    *,
    step: float | None = None,
    end_T: np.ndarray | None = None,
    gapless: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of the time each unit stands for; no gap where neighbours are at most a step apart.

    time_T rising seconds. `step`: the sampling step, default the median distance. `end_T`: where the
    units are windows with an end of their own, the centres of the windows count as their times.
    `gapless`: units stand for all the time between them however far apart (key frames).
    """
    centre_T = time_T if end_T is None else (time_T + end_T) / 2
    step = sampling_step(centre_T, step)
    if len(centre_T) == 0:
        return centre_T, centre_T
    top = max(float(duration), float(centre_T[-1]))
    if gapless:
        middle_T = (centre_T[1:] + centre_T[:-1]) / 2
        return np.concatenate([[0.0], middle_T]), np.concatenate([middle_T, [top]])
    half_T = np.minimum(np.diff(centre_T), step) / 2
    start_T = centre_T - np.concatenate([[step / 2], half_T])
    # Samples are taken from the beginning of their step on: the last one stands for all of its own.
    tail = step if centre_T[-1] + step >= top else step / 2
    stop_T = centre_T + np.concatenate([half_T, [tail]])
    return np.clip(start_T, 0.0, top), np.clip(stop_T, 0.0, top)


def sampling_step(time_T: np.ndarray, step: float | None = None) -> float:
    """The usual distance between neighbours; `step`, or one second, where there is only one unit."""
    if len(time_T) > 1:
        distance = float(np.median(np.diff(time_T)))
        if distance > 0:
            return distance
    return step if step else 1.0


def smoothed(
    score_T: np.ndarray, time_T: np.ndarray, shot_T: np.ndarray, *, sigma: float, across: float = 1.0
) -> np.ndarray:
    """Gaussian mean over time with `sigma` in seconds; frames of other shots weigh `across`."""
    if sigma <= 0 or len(score_T) < 2:
        return score_T.astype(np.float64)
    sum_T = score_T.astype(np.float64).copy()
    weight_T = np.ones(len(score_T))
    for shift in range(1, len(score_T)):
        distance = time_T[shift:] - time_T[:-shift]
        if distance.min() > 3 * sigma:
            break
        w = np.exp(-0.5 * (distance / sigma) ** 2)
        w = np.where(shot_T[shift:] == shot_T[:-shift], w, across * w)
        sum_T[shift:] += w * score_T[:-shift]
        sum_T[:-shift] += w * score_T[shift:]
        weight_T[shift:] += w
        weight_T[:-shift] += w
    return sum_T / weight_T


def smoothing_width(
    score_T: np.ndarray,
    time_T: np.ndarray,
    shot_T: np.ndarray,
    step: float,
    level: float,
    settings: MomentSettings,
) -> float:
    """Seconds of sigma that suit the file's noise: see step 1 of the module's description."""
    c = settings
    jump_T = np.abs(np.diff(score_T))
    within = shot_T[1:] == shot_T[:-1]
    if within.any():
        jump_T = jump_T[within]
    if len(jump_T) == 0:
        return min(c.narrow * step, c.widest)
    noise = float(np.median(jump_T)) / (_GAUSS * np.sqrt(2))
    first_T = smoothed(score_T, time_T, shot_T, sigma=min(1.5 * step, c.widest), across=c.across)
    height = float(first_T.max()) - background(first_T, level, c.prior)
    steps = c.smooth * noise / height if height > 0 else c.broad
    return min(float(np.clip(steps, c.narrow, c.broad)) * step, c.widest)


def background(smooth_T: np.ndarray, level: float, prior: float) -> float:
    """The file's median, drawn towards the index's `level` by the weight of `prior` frames."""
    n = len(smooth_T)
    return float((n * np.median(smooth_T) + prior * level) / (n + prior))


def stretches(
    score_T: np.ndarray,
    time_T: np.ndarray,
    shot_T: np.ndarray,
    duration: float,
    *,
    level: float,
    settings: MomentSettings | None = None,
    step: float | None = None,
    end_T: np.ndarray | None = None,
    gapless: bool = False,
    floor: float = -np.inf,
) -> list[Stretch]:
    """Non-overlapping moments of one file, best first. All arrays have one entry per unit, in order of time.

    `level` is the background of the whole index (the median of its scores for this query). Moments that
    score below `floor` may be left out.
    """
    c = settings or MomentSettings()
    if len(score_T) == 0:
        return []
    centre_T = time_T if end_T is None else (time_T + end_T) / 2
    step = sampling_step(centre_T, step)
    start_T, stop_T = extents(time_T, duration, step=step, end_T=end_T, gapless=gapless)
    sigma = smoothing_width(score_T, centre_T, shot_T, step, level, c)
    smooth_T = smoothed(score_T, centre_T, shot_T, sigma=sigma, across=c.across)
    base = background(smooth_T, level, c.prior)
    offset = c.share * (base - level)
    cut_T = np.flatnonzero(shot_T[1:] != shot_T[:-1]) + 1  # a new shot begins at these units
    free_T = np.ones(len(score_T), dtype=bool)
    found: list[Stretch] = []
    while len(found) < c.most and free_T.any():
        peak = int(np.argmax(np.where(free_T, smooth_T, -np.inf)))
        # No moment around this peak or a lower one can score above it.
        if smooth_T[peak] - offset < floor:
            break
        height = smooth_T[peak] - base
        if height <= 0 and found:
            break
        low, high = _free_run(free_T, peak)
        if height > 0:
            low, high = _walls(smooth_T, cut_T, peak, low, high, c.wall * height)
            worth_T = smooth_T - (base + c.keep * height)
            first, last = _best_run(worth_T, peak, low, high)
        else:
            first = last = peak
        found.append(
            Stretch(
                start=float(start_T[first]),
                end=float(stop_T[last]),
                score=float(smooth_T[first : last + 1].mean() - offset),
                first=first,
                last=last,
                peak=peak,
            )
        )
        free_T[max(0, first - 1) : last + 2] = False
    return sorted(found, key=lambda one: -one.score)


def _free_run(free_T: np.ndarray, peak: int) -> tuple[int, int]:
    """First and last unit of the unbroken run of free units around `peak`."""
    taken = np.flatnonzero(~free_T)
    at = int(np.searchsorted(taken, peak))
    low = int(taken[at - 1]) + 1 if at > 0 else 0
    high = int(taken[at]) - 1 if at < len(taken) else len(free_T) - 1
    return low, high


def _walls(
    smooth_T: np.ndarray, cut_T: np.ndarray, peak: int, low: int, high: int, drop: float
) -> tuple[int, int]:
    """Narrow `low..high` to the nearest shot boundaries across which the score clearly drops."""
    edges = [low, *(int(cut) for cut in cut_T if low < cut <= high), high + 1]
    means = [float(smooth_T[a:b].mean()) for a, b in itertools.pairwise(edges)]
    home = next(i for i, b in enumerate(edges[1:]) if peak < b)
    left = right = home
    while left > 0 and means[left] - means[left - 1] <= drop:
        left -= 1
    while right < len(means) - 1 and means[right] - means[right + 1] <= drop:
        right += 1
    return edges[left], edges[right + 1] - 1


def _best_run(worth_T: np.ndarray, peak: int, low: int, high: int) -> tuple[int, int]:
    """The run around `peak` within `low..high` with the largest sum of worth."""
    left = np.cumsum(worth_T[low : peak + 1][::-1])
    right = np.cumsum(worth_T[peak : high + 1])
    return peak - int(np.argmax(left)), peak + int(np.argmax(right))


@dataclass(frozen=True, slots=True)
class Found:
    """A moment of the index: the file's number and the stretch (units numbered within the file)."""

    file: int
    stretch: Stretch


def best_moments(
    score_N: np.ndarray,
    time_N: np.ndarray,
    shot_N: np.ndarray,
    bounds_F: np.ndarray,
    duration_F: Sequence[float] | np.ndarray,
    k: int,
    *,
    level: float | None = None,
    settings: MomentSettings | None = None,
    step: float | None = None,
    end_N: np.ndarray | None = None,
    gapless: bool = False,
) -> list[Found]:
    """The `k` best moments over all files, best first.

    Rows are sorted by file and time; file f has rows `bounds_F[f]:bounds_F[f + 1]`. A file with one
    row of duration 0 (a picture) gives the moment (0, 0). `level`: the
    background of the whole index, if `score_N` is only a part of it; default: the median of `score_N`.

    Exact without visiting every file: no moment scores above its file's best frame less the file's
    offset, so files are visited in the order of that bound until k moments lie above the next one.
    """
    c = settings or MomentSettings()
    count_F = np.diff(bounds_F)
    usable = np.flatnonzero(count_F > 0)
    if len(usable) == 0 or k <= 0:
        return []
    if level is None:
        level = float(np.median(score_N))
    best_F = np.maximum.reduceat(score_N, bounds_F[usable])
    # The offset is at least share * (lowest possible background - level), the background being no
    # lower than the file's lowest score pulled towards the level.
    lowest_F = np.minimum.reduceat(score_N, bounds_F[usable])
    n = count_F[usable]
    base_F = (n * lowest_F + c.prior * level) / (n + c.prior)
    bound_F = best_F - c.share * (base_F - level)
    heap: list[tuple[float, int, int, Stretch]] = []
    ticket = 0
    for at in np.argsort(-bound_F, kind="stable"):
        if len(heap) == k and heap[0][0] >= bound_F[at]:
            break
        file = int(usable[at])
        rows = slice(int(bounds_F[file]), int(bounds_F[file + 1]))
        if duration_F[file] <= 0 and count_F[file] == 1:
            score = float(score_N[rows][0])
            base = background(score_N[rows], level, c.prior)
            some = [Stretch(0.0, 0.0, score - c.share * (base - level), 0, 0, 0)]
        else:
            some = stretches(
                score_N[rows],
                time_N[rows],
                shot_N[rows],
                float(duration_F[file]),
                level=level,
                settings=c,
                step=step,
                end_T=None if end_N is None else end_N[rows],
                gapless=gapless,
                floor=heap[0][0] if len(heap) == k else -np.inf,
            )
        for one in some:
            entry = (one.score, -ticket, file, one)
            ticket += 1
            if len(heap) < k:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                heapq.heapreplace(heap, entry)
    return [Found(file, stretch) for _, _, file, stretch in sorted(heap, key=lambda e: (-e[0], -e[1]))]
