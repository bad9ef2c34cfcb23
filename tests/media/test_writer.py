"""Writing and cutting: what is read back is what was written, and no half file stays."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from moviola.media import Subtitle, Video, VideoWriter, cut, subtitles, write_video
from moviola.media.writer import _ASS_HEADER
from moviola.types import MediaError, TimeSpan, UsageError

from .conftest import MakeVideo, numbered, numbers_of


def frames_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    batches = list(Video(path).stream())
    return np.concatenate([b.frames_THWC for b in batches]), np.concatenate([b.times_T for b in batches])


@pytest.mark.parametrize("rate", [25, 29.97002997, 7.5, Fraction(24000, 1001), 60])
def test_round_trip(tmp_path: Path, rate: float) -> None:
    path = write_video(tmp_path / "a.mp4", (numbered(n) for n in range(40)), rate)
    frames, times = frames_of(path)
    assert numbers_of(frames) == list(range(40))
    assert times == pytest.approx(np.arange(40) / float(rate), abs=1e-5)
    assert Video(path).duration == pytest.approx(40 / float(rate), abs=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_batches_sound_and_colours(tmp_path: Path) -> None:
    colours = np.array([[200, 30, 30], [30, 180, 40], [40, 50, 210], [128, 128, 128]], np.uint8)
    clip = np.repeat(colours[:, None, None], 96, 1).repeat(128, 2)
    wave = (0.4 * np.sin(2 * np.pi * 500 * np.arange(8000) / 16000)).astype(np.float32)
    path = write_video(tmp_path / "a.mp4", [clip[:3], clip[3:]], 8, sound=wave, sound_rate=16000, crf=8)
    frames, _ = frames_of(path)
    assert np.abs(frames.mean(axis=(1, 2)) - colours).max() < 4
    sound = Video(path).sound(16000)
    assert len(sound) == pytest.approx(8000, abs=200)
    assert np.corrcoef(sound[800:7000], wave[800:7000])[0, 1] > 0.99
    stereo = write_video(tmp_path / "b.mp4", clip, 8, sound=np.stack([wave, -wave], 1), sound_rate=12345)
    assert np.abs(Video(stereo).sound(16000)).max() < 0.05


@pytest.mark.parametrize("size", [(95, 127), (96, 127), (95, 128), (33, 17)])
def test_odd_sizes_get_one_more_row_or_column(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    image = np.random.default_rng(0).integers(60, 190, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    image = image.repeat(8, 0).repeat(8, 1)[:height, :width]
    path = write_video(tmp_path / "a.mp4", [image] * 3, 10, crf=5)
    frames, _ = frames_of(path)
    assert frames.shape[1:3] == (height + height % 2, width + width % 2)
    assert np.abs(frames[0, :height, :width].astype(int) - image).mean() < 6


def test_given_times(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.5, 0.55, 2.0]
    with VideoWriter(tmp_path / "v.mp4", None) as writer:
        for number, time in enumerate(times):
            writer.write(numbered(number), [time], end=2.5 if time == 2.0 else None)
    frames, found = frames_of(tmp_path / "v.mp4")
    assert found == pytest.approx(times, abs=2e-5)
    assert numbers_of(frames) == list(range(5))
    assert Video(tmp_path / "v.mp4").duration == pytest.approx(2.5, abs=1e-3)


def test_no_half_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the file before")

    def breaks() -> Iterator[np.ndarray]:
        yield numbered(0)
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_video(path, breaks(), 25)
    with pytest.raises(MediaError, match="no frame"):
        write_video(path, [], 25)
    with pytest.raises(UsageError, match="one size"):
        write_video(path, [numbered(0), numbered(1, 32, 32)], 25)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"the file before"


def test_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="could not be written"):
        write_video(tmp_path / "none" / "a.mp4", [numbered(0)], 25)
    for wrong in ("a.avi", "a"):
        with pytest.raises(UsageError, match="mp4"):
            write_video(tmp_path / wrong, [numbered(0)], 25)
    with pytest.raises(UsageError):
        write_video(tmp_path / "a.mp4", [np.zeros((8, 8), np.uint8)], 25)
    with pytest.raises(UsageError):
        write_video(tmp_path / "a.mp4", [numbered(0)], 0)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX thing")
def test_full_disk(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: one error, nothing left behind."""
    script = f"""
        import resource, signal
        import numpy as np
        from moviola.media import write_video
        from moviola.types import MediaError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        noise = np.random.default_rng(0)
        try:
            frames = (noise.integers(0, 255, (128, 128, 3), np.uint8) for _ in range(60))
            write_video({str(tmp_path / "a.mp4")!r}, frames, 25)
        except MediaError as error:
            print("told:", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert "told:" in done.stdout, done
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_cut_is_exact(make_video: MakeVideo, tmp_path: Path) -> None:
    source = make_video("long.mp4", 150, options={"g": "50", "bf": "3"}, tone=440.0)
    path = cut(source, TimeSpan(1.22, 3.5), tmp_path / "part.mp4")
    frames, times = frames_of(path)
    # 1.22 s: frame 30 (from 1.20 s) is on screen; it goes at 1.24 s.
    assert numbers_of(frames) == list(range(30, 88))
    assert times[:3] == pytest.approx([0.0, 0.02, 0.06], abs=1e-4)
    video = Video(path)
    assert video.duration == pytest.approx(2.28, abs=1e-3)
    whole, part = Video(source).sound(16000), video.sound(16000)
    assert len(part) == pytest.approx(2.28 * 16000, abs=400)
    theirs = whole[round(1.22 * 16000) :][: len(part)]
    assert np.corrcoef(part[800:30000], theirs[800:30000])[0, 1] > 0.999


def test_cut_keeps_variable_times_and_rotation(make_video: MakeVideo, tmp_path: Path) -> None:
    times = np.cumsum([0.0, *np.random.default_rng(5).uniform(0.02, 0.4, 29)]).round(3).tolist()
    image = np.zeros((96, 128, 3), np.uint8)
    image[:48] = 220
    source = make_video("v.mp4", 30, times=times, frames=[image] * 30, rotation=90)
    path = cut(source, TimeSpan(times[5], times[20]), tmp_path / "part.mp4")
    frames, found = frames_of(path)
    assert found == pytest.approx(np.array(times[5:20]) - times[5], abs=1e-4)
    assert frames.shape[1:3] == (128, 96)
    assert Video(path).rotation == 0
    assert frames[0, :, :40].mean() > 190
    assert frames[0, :, 56:].mean() < 40


@pytest.mark.parametrize("name", ["in.avi", "in.ts", "in.mkv"])
def test_cut_other_containers(make_video: MakeVideo, tmp_path: Path, name: str) -> None:
    source = make_video(name, 60, codec="mpeg4" if name == "in.avi" else "libx264", options={"g": "12"})
    path = cut(source, TimeSpan(1.0, 1.5), tmp_path / "part.mp4")
    frames, _ = frames_of(path)
    expected = Video(source).at([1.0 + 0.04 * n for n in range(12)])
    assert numbers_of(frames)[:12] == numbers_of(expected.frames_THWC)


def test_cut_at_the_edges(make_video: MakeVideo, tmp_path: Path) -> None:
    source = make_video("s.mp4", 50)
    one = cut(source, TimeSpan(1.0, 1.0), tmp_path / "one.mp4")
    assert numbers_of(frames_of(one)[0]) == [25]
    rest = cut(source, TimeSpan(1.8, 99.0), tmp_path / "rest.mp4")
    assert numbers_of(frames_of(rest)[0]) == list(range(45, 50))
    assert Video(rest).duration == pytest.approx(0.2, abs=0.01)
    with pytest.raises(MediaError, match="the video ends at"):
        cut(source, TimeSpan(50, 60), tmp_path / "no.mp4")
    with pytest.raises(UsageError, match="picture"):
        cut(tmp_path / "photo.jpg", TimeSpan(0, 0), tmp_path / "no.mp4")
    with pytest.raises(UsageError, match="another file"):
        cut(source, TimeSpan(0, 1), source)
    with pytest.raises(MediaError, match="no such file"):
        cut(tmp_path / "none.mp4", TimeSpan(0, 1), tmp_path / "no.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.mp4", "rest.mp4", "s.mp4"]


CUES = [
    Subtitle(TimeSpan(0.2, 0.5), "too early", "eng"),
    Subtitle(TimeSpan(0.5, 1.5), "reaches in", "eng"),
    Subtitle(TimeSpan(1.75, 2.0), "ins Bild\nzwei Zeilen", "deu"),
    Subtitle(TimeSpan(2.5, 3.5), "reaches out", "eng"),
    Subtitle(TimeSpan(3.0, 3.8), "zu spät", "deu"),
]
KEPT = [
    Subtitle(TimeSpan(0.0, 0.5), "reaches in", "eng"),
    Subtitle(TimeSpan(0.75, 1.0), "ins Bild\nzwei Zeilen", "deu"),
    Subtitle(TimeSpan(1.5, 2.0), "reaches out", "eng"),
]


def as_mkv(source: Path, cues: list[Subtitle], path: Path) -> Path:
    """The pictures of `source` with each language's cues as a SubRip track of Matroska."""
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        video = made.add_stream_from_template(given.streams.video[0])
        tracks = {}
        for cue in cues:
            if cue.language not in tracks:
                tracks[cue.language] = made.add_stream("subrip")
                tracks[cue.language].metadata["language"] = cue.language
                tracks[cue.language].codec_context.subtitle_header = _ASS_HEADER
        packets = []
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                packets.append((float(packet.dts * packet.time_base), packet))
        for cue in cues:
            packet = av.Packet(cue.text.encode())
            packet.stream, packet.time_base = tracks[cue.language], Fraction(1, 1000)
            packet.pts = packet.dts = round(cue.span.start * 1000)
            packet.duration = round(cue.span.duration * 1000)
            packets.append((cue.span.start, packet))
        for _, packet in sorted(packets, key=lambda one: one[0]):
            made.mux(packet)
    return path


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_cut_carries_the_text_of_its_range(tmp_path: Path, ending: str) -> None:
    frames = [numbered(n) for n in range(100)]
    source = write_video(tmp_path / "s.mp4", frames, 25, subtitles=CUES)
    if ending == "mkv":
        source = as_mkv(source, CUES, tmp_path / "s.mkv")
    assert Video(source).subtitles() == CUES
    part = cut(source, TimeSpan(1.0, 3.0), tmp_path / "part.mp4")
    found = Video(part)
    assert found.subtitles() == KEPT
    assert sorted(one.language or "" for one in found.streams if one.kind == "subtitle") == ["deu", "eng"]
    assert found.duration == pytest.approx(2.0, abs=0.02)
    # where nothing is said there is no text track
    silent = cut(source, TimeSpan(2.08, 2.4), tmp_path / "silent.mp4")
    assert [one.kind for one in Video(silent).streams] == ["video"]
    # a single frame keeps what is said over it
    one = Video(cut(source, TimeSpan(2.0, 2.0), tmp_path / "one.mp4"))
    assert one.subtitles() == []
    one = Video(cut(source, TimeSpan(1.8, 1.8), tmp_path / "two.mp4"))
    assert [cue.text for cue in one.subtitles()] == ["ins Bild\nzwei Zeilen"]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_text_of_a_late_range_is_read_without_reading_the_rest(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cues = [Subtitle(TimeSpan(t, t + 1.0), f"at {t}", "eng") for t in range(0, 600, 3)]
    cues.append(Subtitle(TimeSpan(310.5, 402.0), "a long one", "deu"))
    cues.sort(key=lambda cue: cue.span)
    frames = (numbered(n % 100) for n in range(1200))
    source = write_video(tmp_path / "s.mp4", frames, 2, subtitles=cues)
    if ending == "mkv":
        source = as_mkv(source, cues, tmp_path / "s.mkv")
    seen: list[float] = []
    plain = subtitles._packets

    def watched(container: object, streams: list) -> Iterator:
        for packet in plain(container, streams):
            if packet.pts is not None:
                seen.append(float(packet.pts * packet.time_base))
            yield packet

    monkeypatch.setattr(subtitles, "_packets", watched)
    found = subtitles.embedded_subtitles(source, TimeSpan(400.0, 406.5))
    assert [cue.text for cue in found] == ["a long one", "at 402", "at 405"]
    # .mp4 fills the time before a track's first cue with an empty one, which is met as well
    assert sum(time < 200 for time in seen) <= 1
    assert max(seen) < 440


def test_cut_of_real_video(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data" / "videos" / "makeup_with_audio.avi"
    video = Video(cut(source, TimeSpan(2.0, 3.0), tmp_path / "c.mp4"))
    assert video.duration == pytest.approx(1.0, abs=0.01)
    assert len(video.sound(16000)) == pytest.approx(16000, abs=500)


def test_many_frames_need_little_memory(tmp_path: Path) -> None:
    """Ten batches or a hundred: the writer holds no more."""
    import tracemalloc

    def run(count: int) -> int:
        tracemalloc.start()
        write_video(tmp_path / "m.mp4", (numbered(n % 250) for n in range(count)), 25, preset="ultrafast")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    run(20)
    assert run(400) < run(40) + 2_000_000
