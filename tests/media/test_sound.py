"""Sound on the video's clock: length, alignment, gaps, channels."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from moviola.media import Video, write_video
from moviola.media.sound import iter_sound
from moviola.types import MediaError, UsageError

from .conftest import MakeVideo, numbered


def save_sound(
    path: Path, parts: list[tuple[float, np.ndarray]], rate: int, codec: str, layout: str = "mono"
) -> Path:
    """A small video whose sound consists of parts, each at its own time; samples are (C, S)."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream(codec, rate=rate, layout=layout)
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(numbered(number, 32, 32), format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for time, samples in parts:
            for begin in range(0, samples.shape[1], 1000):
                piece = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(samples[:, begin : begin + 1000].T.reshape(1, -1)),
                    format="s16",
                    layout=layout,
                )
                piece.sample_rate = rate
                piece.time_base = Fraction(1, rate)
                piece.pts = round(time * rate) + begin
                container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    return path


def sine(seconds: float, rate: int, hertz: float = 300.0) -> np.ndarray:
    wave = 16000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return wave.astype(np.int16)[None]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_rate_and_alignment(make_video: MakeVideo, rate: int) -> None:
    video = Video(make_video("tone.mp4", 50, tone=440.0))
    assert video.has_sound
    sound = video.sound(rate)
    assert sound.dtype == np.float32
    assert len(sound) == pytest.approx(2 * rate, abs=rate * 0.025)
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(sound)) / rate)
    middle = slice(rate // 10, int(1.9 * rate))
    # Aligned to a small part of a period: priming is gone.
    assert np.corrcoef(sound[middle], wave[middle])[0, 1] > 0.999
    assert np.abs(sound).max() < 0.6


def test_ranges_are_parts_of_the_whole(make_video: MakeVideo) -> None:
    video = Video(make_video("tone.mp4", 100, tone=300.0))
    whole = video.sound(16000)
    for start, end in ((0.0, 1.0), (0.7, 1.3), (2.0, 3.5), (3.99, 4.0)):
        part = video.sound(16000, start=start, end=end)
        assert len(part) == round((end - start) * 16000)
        theirs = whole[round(start * 16000) :][: len(part)]
        assert np.abs(part[: len(theirs)] - theirs).max() < 0.03
    assert len(video.sound(16000, start=99.0)) == 0
    pieces = list(video.iter_sound(16000, seconds=0.5))
    assert {len(piece) for piece in pieces[:-1]} == {8000}
    assert np.array_equal(np.concatenate(pieces), whole)


def test_samples_are_exact_without_loss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(-9000, 9000, (2, 24000)).astype(np.int16)
    path = save_sound(tmp_path / "pcm.mkv", [(0.0, np.stack([left, right]))], 16000, "pcm_s16le", "stereo")
    sound = Video(path).sound(16000)
    assert np.array_equal(sound, ((left.astype(float) + right) / 2 / 32768).astype(np.float32))
    stereo = np.concatenate(list(iter_sound(path, 16000, channels=2)))
    assert np.array_equal(stereo, (np.stack([left, right], 1) / 32768).astype(np.float32))
    part = Video(path).sound(16000, start=0.5, end=1.0)
    assert np.array_equal(part, sound[8000:16000])


def test_gaps_and_late_starts_are_silence(tmp_path: Path) -> None:
    path = save_sound(
        tmp_path / "gap.mkv", [(0.5, sine(0.5, 8000)), (2.0, sine(0.5, 8000))], 8000, "pcm_s16le"
    )
    sound = Video(path).sound(8000)
    assert len(sound) == 20000
    loud = np.abs(sound.reshape(-1, 1000)).max(axis=1) > 0.1
    assert loud.tolist() == [False] * 4 + [True] * 4 + [False] * 8 + [True] * 4


def test_same_clock_as_the_frames(tmp_path: Path, make_video: MakeVideo) -> None:
    video = Video(make_video("late.ts", 50, offset=5.0, options={"bf": "0"}))
    assert not video.has_sound
    # A click at 1.0 s in a file whose clock begins at 1.4 s.
    click = np.zeros((1, 32000), np.int16)
    click[0, 16000:16400] = 20000
    path = save_sound(tmp_path / "click.ts", [(0.0, click)], 16000, "mp2")
    sound = Video(path).sound(16000)
    first = int(np.flatnonzero(np.abs(sound) > 0.2)[0])
    assert first == pytest.approx(16000, abs=800)


def test_no_sound(make_video: MakeVideo) -> None:
    video = Video(make_video("mute.mp4", 5))
    assert not video.has_sound
    with pytest.raises(MediaError, match="no sound"):
        video.sound()
    with pytest.raises(UsageError):
        video.sound(0)
    with pytest.raises(UsageError):
        video.sound(16000, start=-1)


def test_broken_sound_tail(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).normal(0, 0.2, 64000).astype(np.float32)
    path = write_video(tmp_path / "s.mp4", [numbered(n) for n in range(100)], 25, sound=noise)
    raw = path.read_bytes()
    begin = raw.find(b"mdat")
    path.write_bytes(raw[: begin + (len(raw) - begin) * 2 // 3])
    assert 10000 < len(Video(path).sound(16000)) < 64000


def test_real_sound(shared_dir: Path) -> None:
    video = Video(shared_dir / "data" / "videos" / "makeup_with_audio.avi")
    sound = video.sound(16000)
    assert len(sound) / 16000 == pytest.approx(video.duration, abs=0.1)
    assert 0.001 < np.abs(sound).mean() < 0.9
