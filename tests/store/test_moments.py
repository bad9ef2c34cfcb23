"""The maths of moments: properties that must hold for any scores, and the cases it was made for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.store.moments import (
    MomentSettings,
    best_moments,
    extents,
    sampling_step,
    smoothed,
    stretches,
)


def planted(
    spans: list[tuple[float, float]],
    *,
    duration: float = 60,
    step: float = 1.0,
    noise: float = 0.0,
    height: float = 0.1,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    time_T = np.arange(0, duration, step)
    score_T = np.full(len(time_T), 0.2) + np.random.default_rng(seed).normal(0, 1, len(time_T)) * noise
    for start, end in spans:
        score_T[(time_T >= start) & (time_T < end)] += height
    return time_T, score_T


def one_shot(time_T: np.ndarray) -> np.ndarray:
    return np.zeros(len(time_T), dtype=np.int32)


def found(
    score_T: np.ndarray, time_T: np.ndarray, shot_T: np.ndarray, duration: float = 60, **kwargs: object
) -> list:
    return stretches(score_T, time_T, shot_T, duration, level=0.2, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_a_planted_event_is_found_to_within_a_step(step: float) -> None:
    time_T, score_T = planted([(20, 32)], step=step)
    best = found(score_T, time_T, one_shot(time_T))[0]
    assert abs(best.start - 20) <= step
    assert abs(best.end - 32) <= step
    assert best.score == pytest.approx(0.3, abs=0.03)


def test_a_dip_inside_an_event_does_not_split_it_and_a_distant_event_stays_apart() -> None:
    time_T, score_T = planted([(10, 20), (40, 48)])
    score_T[14] = 0.2
    one, two = found(score_T, time_T, one_shot(time_T))[:2]
    first, second = sorted([one, two], key=lambda m: m.start)
    assert (first.start, first.end) == (9.5, 19.5)
    assert (second.start, second.end) == (39.5, 47.5)


def test_a_clear_drop_at_a_cut_is_a_wall_and_a_cut_inside_an_event_is_not() -> None:
    time_T = np.arange(0, 30.0)
    score_T = np.full(30, 0.2)
    score_T[10:20] = [0.4] * 5 + [0.31] * 5  # a related scene after a cut
    shots = np.cumsum(np.isin(np.arange(30), [10, 15, 20])).astype(np.int32)
    flat = stretches(score_T, time_T, np.zeros(30, np.int32), 30, level=0.2)[0]
    walled = stretches(score_T, time_T, shots, 30, level=0.2)[0]
    assert walled.end == pytest.approx(14.5)
    assert flat.end > walled.end
    even = np.full(30, 0.2)
    even[10:20] = 0.4
    assert stretches(even, time_T, shots, 30, level=0.2)[0].end == pytest.approx(19.5)


def test_extent_of_a_frame_is_half_a_step_either_side_cut_to_the_duration() -> None:
    start_T, end_T = extents(np.array([0.0, 1.0, 2.0, 5.0]), 5.4)
    np.testing.assert_allclose(start_T, [0, 0.5, 1.5, 4.5])
    np.testing.assert_allclose(end_T, [0.5, 1.5, 2.5, 5.4])


def test_one_frame_takes_the_sampling_step() -> None:
    assert sampling_step(np.array([3.0]), 2.0) == 2.0
    assert sampling_step(np.array([3.0])) == 1.0
    (only,) = stretches(np.array([0.5]), np.array([0.0]), np.zeros(1, np.int32), 0.8, level=0.2, step=1.0)
    assert (only.start, only.end) == (0.0, 0.8)


def test_smoothing_keeps_constants_and_does_not_leak_across_cuts() -> None:
    time_T = np.arange(20.0)
    np.testing.assert_allclose(smoothed(np.full(20, 0.3), time_T, one_shot(time_T), sigma=2.0), 0.3)
    step_T = np.where(time_T < 10, 0.0, 1.0)
    shots = (time_T >= 10).astype(np.int32)
    np.testing.assert_allclose(smoothed(step_T, time_T, shots, sigma=2.0, across=0.0), step_T)
    assert smoothed(step_T, time_T, shots, sigma=2.0)[9] > 0.3


def test_smoothing_equals_the_direct_sum_on_uneven_times() -> None:
    rng = np.random.default_rng(1)
    time_T = np.cumsum(rng.uniform(0.2, 2.0, 40))
    score_T = rng.normal(size=40)
    shots = np.cumsum(rng.random(40) < 0.2)
    gap = np.abs(time_T[:, None] - time_T[None])
    weight = np.exp(-0.5 * (gap / 1.5) ** 2) * np.where(shots[:, None] == shots[None], 1.0, 0.2)
    direct = (weight * score_T[None]).sum(1) / weight.sum(1)
    np.testing.assert_allclose(smoothed(score_T, time_T, shots, sigma=1.5, across=0.2), direct, atol=0.02)


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=80),
    gaps=st.lists(st.floats(0.05, 4), min_size=80, max_size=80),
    cuts=st.lists(st.booleans(), min_size=80, max_size=80),
    level=st.floats(-1, 1),
    tail=st.floats(0, 3),
)
def test_moments_of_a_file_never_overlap_and_stay_inside_it(
    scores: list[float], gaps: list[float], cuts: list[bool], level: float, tail: float
) -> None:
    n = len(scores)
    time_T = np.cumsum([0.0, *gaps[: n - 1]])
    shot_T = np.cumsum(cuts[:n])
    duration = float(time_T[-1]) + tail
    out = stretches(np.array(scores, np.float32), time_T, shot_T, duration, level=level)
    assert out
    assert [m.score for m in out] == sorted((m.score for m in out), reverse=True)
    for m in out:
        assert 0 <= m.start <= m.end <= duration + 1e-9
        assert m.first <= m.peak <= m.last
    by_time = sorted(out, key=lambda m: m.start)
    for a, b in pairwise(by_time):
        assert a.end <= b.start + 1e-9
        assert a.last < b.first


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), files=st.integers(1, 12))
def test_best_moments_equal_the_plain_search_over_every_file(seed: int, k: int, files: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, files)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    total = int(bounds[-1])
    score_N = rng.normal(0.2, 0.1, total).astype(np.float32)
    time_N = np.concatenate([np.arange(c, dtype=float) for c in counts])
    shot_N = np.zeros(total, np.int32)
    duration = [0.0 if c == 1 else float(c) for c in counts]
    got = best_moments(score_N, time_N, shot_N, bounds, duration, k)
    if total == 0:
        assert got == []
        return
    level = float(np.median(score_N))
    plain = []
    for f in range(files):
        rows = slice(bounds[f], bounds[f + 1])
        if counts[f] == 1:
            base = (score_N[rows][0] + 10 * level) / 11
            plain.append(float(score_N[rows][0]) - 0.5 * (base - level))
        elif counts[f]:
            plain += [
                m.score
                for m in stretches(score_N[rows], time_N[rows], shot_N[rows], duration[f], level=level)
            ]
    best = sorted(plain, reverse=True)[:k]
    assert len(got) == len(best) <= k
    np.testing.assert_allclose([g.stretch.score for g in got], best, rtol=1e-5, atol=1e-6)


def test_long_noisy_videos_do_not_win_by_chance() -> None:
    """One short file with a real event against a hundred times as many frames of noise."""
    wins = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0.2, 0.03, 6000)
        event = rng.normal(0.2, 0.03, 60)
        event[20:30] += 0.1
        score_N = np.concatenate([noise, event])
        time_N = np.concatenate([np.arange(6000.0), np.arange(60.0)])
        best = best_moments(
            score_N, time_N, np.zeros(6060, np.int32), np.array([0, 6000, 6060]), [6000, 60], 1
        )[0]
        wins += best.file == 1
    assert wins >= 16
    assert MomentSettings().smooth > 0
