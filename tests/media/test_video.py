"""Frames with their true times, from every kind of file that can be made here."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moviola.media import Video, write_video
from moviola.types import MediaError, TimeSpan, UsageError

from .conftest import MakeVideo, numbered, numbers_of


def everything(video: Video, **wish: object) -> tuple[np.ndarray, np.ndarray]:
    batches = list(video.stream(**wish))  # type: ignore[arg-type]
    if not batches:
        return np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
    return np.concatenate([b.frames_THWC for b in batches]), np.concatenate([b.times_T for b in batches])


# name, codec, encoder options: B-frames, open groups of pictures, no reordering, packed MPEG-4, VP9 ...
KINDS = {
    "b-frames.mp4": ("libx264", {"bf": "3", "g": "20"}),
    "open-groups.mp4": ("libx264", {"bf": "3", "g": "15", "x264-params": "open-gop=1"}),
    "plain.mp4": ("libx264", {"tune": "zerolatency", "g": "12"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2", "g": "10"}),
    "mpeg2.ts": ("mpeg2video", {"bf": "2", "g": "10"}),
    "h264.ts": ("libx264", {"bf": "2", "g": "10"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "20"}),
    "h264.mkv": ("libx264", {"g": "25"}),
    "motion.avi": ("mjpeg", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(make_video: MakeVideo, name: str) -> None:
    codec, options = KINDS[name]
    count = 60
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    video = Video(make_video(name, count, codec=codec, options=options, pix_fmt=pix_fmt))
    frames, times = everything(video)
    assert video.damage is None
    assert numbers_of(frames) == list(range(count))
    steps = np.diff(times)
    assert steps == pytest.approx(0.04, abs=1.1e-3)  # Matroska rounds to milliseconds
    assert times[0] == pytest.approx(0, abs=0.041)  # AVI: ffprobe says one frame late
    assert video.duration == pytest.approx(count / 25, abs=0.05)
    assert video.size == (96, 128)
    assert video.rotation == 0
    assert not video.has_sound

    # A grid gives the first frame at or after each multiple, and the same ones from the middle.
    for every in (0.5, 0.13):
        cells = np.floor((times + 1e-6) / every)
        wanted = np.flatnonzero(np.diff(cells, prepend=-1) > 0)
        some, at = everything(video, every=every)
        assert at.tolist() == times[wanted].tolist()
        assert np.array_equal(some, frames[wanted])
        some, at = everything(video, every=every, start=1.13)
        late = wanted[times[wanted] >= 1.13 - 1e-6]
        assert at.tolist() == times[late].tolist()
        assert np.array_equal(some, frames[late])

    # Key frames are frames of the video, at their own times.
    keys, key_times = everything(video, keyframes=True)
    where = [int(np.abs(times - time).argmin()) for time in key_times]
    assert key_times == pytest.approx(times[where], abs=1e-9)
    assert np.array_equal(keys, frames[where])

    # Random access gives what streaming gives.
    asked = np.random.default_rng(0).uniform(-0.5, 3.5, 12)
    batch = video.at(asked)
    here = np.clip(np.searchsorted(times, asked + 1e-6, side="right") - 1, 0, count - 1)
    assert batch.times_T.tolist() == times[here].tolist()
    assert np.array_equal(batch.frames_THWC, frames[here])


def test_start_and_end_are_half_open(make_video: MakeVideo) -> None:
    video = Video(make_video("a.mp4", 50))
    frames, times = everything(video, start=0.4, end=1.2)
    assert numbers_of(frames) == list(range(10, 30))
    assert times[0] == pytest.approx(0.4)
    assert everything(video, start=5.0)[1].size == 0
    assert everything(video, start=1.0, end=1.0)[1].size == 0


def test_variable_frame_rate(make_video: MakeVideo) -> None:
    times = np.cumsum([0.0, *np.random.default_rng(3).uniform(0.01, 0.7, 39)]).round(4)
    video = Video(make_video("vfr.mp4", 40, times=times.tolist()))
    frames, found = everything(video)
    assert found == pytest.approx(times, abs=2e-5)
    assert numbers_of(frames) == list(range(40))
    assert video.duration >= times[-1]
    # 3 s apart where a frame stays on for longer than the grid: it comes once.
    _, sparse = everything(video, every=0.05)
    assert sparse.tolist() == sorted(set(sparse.tolist()))
    batch = video.at([times[7] + 1e-4, times[8] - 1e-4])
    assert numbers_of(batch.frames_THWC) == [7, 7]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(every=st.floats(0.02, 3), start=st.floats(0, 2.5), length=st.floats(0, 3))
def test_resuming_gives_the_same_grid(
    tmp_path_factory: pytest.TempPathFactory, every: float, start: float, length: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "grid.mp4"
    if not path.exists():
        write_video(path, [numbered(n, 32, 64) for n in range(60)], 24, crf=12)
    video = Video(path)
    whole = everything(video, every=every)[1]
    part = everything(video, every=every, start=start, end=start + length)[1]
    inside = (whole >= start - 1e-6) & (whole < start + length - 1e-6)
    assert part.tolist() == whole[inside].tolist()


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, -1), (180, 2), (0, 0)])
def test_rotation_is_applied(make_video: MakeVideo, degrees: int, turns: int) -> None:
    image_HWC = np.zeros((96, 128, 3), np.uint8)
    image_HWC[:48, :64] = (250, 20, 20)
    image_HWC[48:, 64:] = (20, 20, 250)
    image_HWC[:48, 64:] = (20, 250, 20)
    video = Video(make_video("r.mp4", 5, frames=[image_HWC] * 5, rotation=degrees))
    # PyAV writes and reads counter-clockwise degrees, as np.rot90 turns.
    right = np.rot90(image_HWC, turns)
    assert video.size == right.shape[:2]
    assert video.rotation == -degrees % 360
    frames, _ = everything(video)
    assert np.abs(frames[0].astype(int) - right).mean() < 8
    small = next(video.stream(short_side=24)).frames_THWC[0]
    assert small.shape[:2] == ((24, 32) if turns % 2 == 0 else (32, 24))
    exact = video.at([0.0], size=(20, 40)).frames_THWC[0]
    assert exact.shape == (20, 40, 3)
    assert np.abs(exact[5, 5].astype(int) - right[right.shape[0] // 4, right.shape[1] // 8]).max() < 40


def test_odd_sizes(make_video: MakeVideo) -> None:
    video = Video(make_video("odd.mkv", 10, size=(95, 127), codec="ffv1", pix_fmt="yuv420p"))
    frames, _ = everything(video)
    assert frames.shape == (10, 95, 127, 3)
    assert numbers_of(frames) == list(range(10))
    assert next(video.stream(short_side=31)).frames_THWC.shape[1:3] == (31, 127 * 31 // 95)


@pytest.mark.parametrize("pix_fmt", ["gray", "yuv420p10le", "yuva420p", "yuv444p", "bgr0", "yuv422p"])
def test_pixel_formats(make_video: MakeVideo, pix_fmt: str) -> None:
    video = Video(make_video("p.mkv", 8, codec="ffv1", pix_fmt=pix_fmt))
    frames, _ = everything(video, short_side=48)
    assert frames.dtype == np.uint8
    assert frames.shape == (8, 48, 64, 3)
    assert numbers_of(frames) == list(range(8))
    assert len(video.shots()) == 1


def test_start_time_is_taken_off(make_video: MakeVideo) -> None:
    video = Video(make_video("late.ts", 30, offset=7.3, options={"bf": "2"}))
    frames, times = everything(video)
    assert times == pytest.approx(np.arange(30) / 25, abs=1e-4)
    assert video.duration == pytest.approx(1.2, abs=1e-4)
    assert numbers_of(video.at([0.5]).frames_THWC) == [12]
    assert len(frames) == 30


def test_one_frame(make_video: MakeVideo) -> None:
    video = Video(make_video("one.mp4", 1))
    frames, times = everything(video, every=1.0)
    assert (len(frames), times.tolist()) == (1, [0.0])
    assert len(video.uniform(8)) == 8
    assert video.shots() == [TimeSpan(0.0, video.duration)]
    assert video.at([-1, 0, 99]).times_T.tolist() == [0, 0, 0]


def test_uniform(make_video: MakeVideo) -> None:
    video = Video(make_video("u.mp4", 100))
    assert numbers_of(video.uniform(4).frames_THWC) == [12, 37, 62, 87]
    assert numbers_of(video.uniform(3, sampler="uniform").frames_THWC) == [0, 50, 99]
    assert numbers_of(video.uniform(2, start=1.0, end=2.0).frames_THWC) == [31, 43]
    with pytest.raises(UsageError, match="sampler"):
        video.uniform(2, sampler="random")  # type: ignore[arg-type]


def test_batches_and_numbers(make_video: MakeVideo) -> None:
    video = Video(make_video("b.mp4", 25))
    batches = list(video.stream(batch=10))
    assert [len(b) for b in batches] == [10, 10, 5]
    assert np.concatenate([b.index_T for b in batches if b.index_T is not None]).tolist() == list(range(25))
    assert not any(b.shot_T.any() for b in batches)
    # A batch stays what it was when the next one is made.
    assert numbers_of(batches[0].frames_THWC) == list(range(10))


def test_large_frames_come_in_smaller_batches(make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moviola.media.batches._BATCH_BYTES", 3 * 96 * 128 * 4)
    batches = list(Video(make_video("large.mp4", 10)).stream(batch=64))
    assert [len(b) for b in batches] == [4, 4, 2]
    assert numbers_of(np.concatenate([b.frames_THWC for b in batches])) == list(range(10))


def test_matches_a_good_resize(make_video: MakeVideo) -> None:
    from PIL import Image

    y, x = np.mgrid[:240, :320]
    wave = (127 + 90 * np.sin(x / 9) * np.cos(y / 13)).astype(np.uint8)
    image_HWC = np.stack([wave, wave[::-1], np.full_like(wave, 90)], -1)
    video = Video(
        make_video("w.mkv", 2, size=(240, 320), frames=[image_HWC] * 2, codec="ffv1", pix_fmt="yuv444p")
    )
    ours = video.at([0], short_side=112).frames_THWC[0].astype(int)
    theirs = np.asarray(Image.fromarray(image_HWC).resize((149, 112), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).mean() < 2


def test_closing_early_and_threads(make_video: MakeVideo) -> None:
    video = Video(make_video("t.mp4", 40))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(5):
        stream = video.stream(batch=4)
        next(stream)
        stream.close()
        video.at([1.0])
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    found: list[list[int]] = []
    workers = [
        threading.Thread(target=lambda: found.append(numbers_of(everything(video)[0]))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [list(range(40))] * 3


def test_wrong_wishes(make_video: MakeVideo) -> None:
    video = Video(make_video("w.mp4", 3))
    for wish in (
        {"every": 0},
        {"every": -1.0},
        {"start": -1},
        {"batch": 0},
        {"start": 2, "end": 1},
        {"short_side": 0},
    ):
        with pytest.raises(UsageError):
            video.stream(**wish)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not both"):
        video.stream(short_side=3, size=(4, 4))
    with pytest.raises(UsageError, match="keyframes or shots"):
        video.stream(keyframes=True, shots=True)
    with pytest.raises(UsageError):
        video.at([])
    with pytest.raises(UsageError):
        video.at([float("nan")])


def test_thumbnail(make_video: MakeVideo) -> None:
    import io

    from PIL import Image

    video = Video(make_video("t.mp4", 30, size=(360, 480)))
    picture = Image.open(io.BytesIO(video.thumbnail(0.5, height=90)))
    assert (picture.format, picture.size) == ("JPEG", (120, 90))
    assert numbers_of(np.asarray(picture)[None]) == [12]


def ffprobe(path: Path, *what: str) -> dict[str, list[dict[str, str]]]:
    if shutil.which("ffprobe") is None:
        pytest.skip("ffprobe is not installed")
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-of", "json", *what, str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.parametrize(
    "name",
    [
        "arm_wrestling.mp4",
        "arm_wrestling_with_boxes.mp4",
        "basketball_gym.mp4",
        "makeup_with_audio.avi",
        "pool_cleaning.mp4",
        "skeleton_overlay_1080p.mp4",
    ],
)
def test_real_videos_agree_with_ffprobe(shared_dir: Path, name: str) -> None:
    path = shared_dir / "data" / "videos" / name
    told = ffprobe(path, "-show_entries", "frame=best_effort_timestamp_time:stream=duration,width,height")
    video = Video(path)
    _, times = everything(video, short_side=32)
    theirs = [frame.get("best_effort_timestamp_time") for frame in told["frames"]]
    stream = told["streams"][0]
    assert len(times) == len(theirs)
    for ours, their in zip(times, theirs):
        if their is not None:  # ffprobe has no time for the last frame of the .avi
            assert ours == pytest.approx(float(their), abs=1e-6)
    assert video.duration == pytest.approx(float(stream["duration"]), abs=1e-6)
    assert video.size == (stream["height"], stream["width"])
    assert video.damage is None


def test_a_video_can_be_sent_to_another_process(make_video: MakeVideo) -> None:
    import pickle

    video = pickle.loads(pickle.dumps(Video(make_video("p.mp4", 10))))  # noqa: S301 (made here)
    assert len(everything(video)[1]) == 10


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        Video(tmp_path / "none.mp4")
