"""Shots: hard cuts are found at the right frame; motion, flashes and noise are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moviola.media import Video, write_video
from moviola.types import TimeSpan, UsageError

HEIGHT, WIDTH = 90, 160


def texture(seed: int, shade: tuple[float, float, float]) -> np.ndarray:
    """A smooth random picture twice as wide as a frame, tinted."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.2, 1, (12, 40))
    wide = np.kron(coarse, np.ones((8, 8)))[:HEIGHT, : 2 * WIDTH]
    return (wide[..., None] * np.array(shade)).clip(0, 255)


def scene(
    seed: int, count: int, *, shade: tuple[float, float, float], pan: float = 0.0, noise: float = 3.0
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed + 1000)
    wide = texture(seed, shade)
    frames = []
    for number in range(count):
        left = int(pan * number) % WIDTH
        image = wide[:, left : left + WIDTH] + rng.normal(0, noise, (HEIGHT, WIDTH, 1))
        frames.append(image.clip(0, 255).astype(np.uint8))
    return frames


RED, GREEN, BLUE, GREY = (250, 90, 80), (80, 220, 90), (90, 110, 250), (190, 190, 190)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[list[np.ndarray]], Video]:
    return lambda frames: Video(write_video(tmp_path / "shots.mp4", frames, 25, crf=20))


Save = Callable[[list[np.ndarray]], Video]


def test_cuts_are_found_at_their_frames(save: Save) -> None:
    frames = [
        *scene(1, 40, shade=RED, pan=2),
        *scene(2, 30, shade=GREEN),
        *scene(3, 25, shade=GREY, pan=4),
        *scene(4, 45, shade=BLUE, pan=1),
    ]
    video = save(frames)
    assert video.shots() == [
        TimeSpan(0.0, 1.6),
        TimeSpan(1.6, 2.8),
        TimeSpan(2.8, 3.8),
        TimeSpan(3.8, 5.6),
    ]


def test_motion_noise_flash_and_fade_are_no_cuts(save: Save) -> None:
    assert len(save(scene(5, 60, shade=RED, pan=6, noise=12)).shots()) == 1
    flash = scene(6, 60, shade=GREEN)
    for number in (30, 31):
        flash[number] = np.full_like(flash[number], 250)
    assert len(save(flash).shots()) == 1
    a, b = scene(7, 60, shade=RED), scene(8, 60, shade=BLUE)
    fade = [(x * (1 - n / 59) + y * (n / 59)).astype(np.uint8) for n, (x, y) in enumerate(zip(a, b))]
    assert len(save(fade).shots()) == 1


def test_in_the_same_pass_as_sampling(save: Save) -> None:
    frames = [*scene(1, 40, shade=RED, pan=2), *scene(2, 33, shade=GREEN), *scene(4, 27, shade=BLUE, pan=1)]
    video = save(frames)
    cuts = [span.start for span in video.shots()][1:]
    assert cuts == [1.6, 2.92]
    for every in (None, 0.04, 0.1, 0.5, 1.0):
        batches = list(video.stream(every=every, shots=True, short_side=16, batch=7))
        times = np.concatenate([b.times_T for b in batches])
        new = np.concatenate([b.shot_T for b in batches])
        expected = [any(a < cut <= b for cut in cuts) for a, b in zip([0.0, *times[:-1]], times)]
        assert new.tolist() == expected
        plain = np.concatenate([b.times_T for b in video.stream(every=every)])
        assert times.tolist() == plain.tolist()
        # From the middle: the same times and the same marks.
        later = list(video.stream(every=every, shots=True, short_side=16, start=2.5))
        inside = times >= 2.5
        assert np.concatenate([b.times_T for b in later]).tolist() == times[inside].tolist()
        assert np.concatenate([b.shot_T for b in later]).tolist() == new[inside].tolist()


def test_shortest_shot(save: Save) -> None:
    frames = [*scene(1, 30, shade=RED), *scene(2, 8, shade=GREEN), *scene(4, 30, shade=BLUE)]
    video = save(frames)
    assert [span.start for span in video.shots(shortest=0.2)] == [0.0, 1.2, 1.52]
    assert [span.start for span in video.shots()] == [0.0, 1.2]
    with pytest.raises(UsageError):
        video.shots(threshold=0.5)
