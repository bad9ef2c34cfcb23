"""Files that are not what they seem: each gives one clear error, or what of it can be read."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from moviola.media import Video, VideoWriter, write_video
from moviola.types import MediaError

from .conftest import MakeVideo, numbers_of


def bad(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\0" * 4096, "zero bytes"),
        (np.random.default_rng(0).bytes(50_000), "no known video format"),
        (b"This is a shopping list: milk, bread.\n" * 50, "text file"),
        ("Ein Kuchen für Jörg\n".encode() * 99, "text file"),
        ("utf sixteen".encode("utf-16"), "text file"),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://localhost:9/secret.ts\n", "text file"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "text file"),
        (b"x", "text file"),
    ],
)
def test_not_a_video(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(MediaError, match=says) as caught:
        Video(bad(tmp_path / "film.mp4", content))
    assert "film.mp4" in str(caught.value)


def test_mp4_without_its_index(make_video: MakeVideo) -> None:
    path = make_video("cut.mp4", 40)
    whole = path.read_bytes()
    assert whole.find(b"moov") > whole.find(b"mdat")
    path.write_bytes(whole[: whole.find(b"moov") - 10])
    with pytest.raises(MediaError, match="moov"):
        Video(path)


def test_folder_pipe_and_link_to_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="folder"):
        Video(tmp_path)
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nothing")
    with pytest.raises(MediaError, match="no such file"):
        Video(tmp_path / "gone.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="pipe"):
        Video(tmp_path / "pipe.mp4")


def test_sound_only_and_cover_art(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        piece.sample_rate = 16000
        container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    with pytest.raises(MediaError, match="only audio"):
        Video(path)

    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = type(cover.disposition).attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture.reformat(format="yuvj420p")))
        container.mux(cover.encode(None))
        container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    with av.open(str(path)) as container:
        shown = bool(container.streams.video[0].disposition & type(cover.disposition).attached_pic)
    if not shown:
        pytest.skip("this PyAV does not write the cover-art mark")
    with pytest.raises(MediaError, match="only audio"):
        Video(path)


def test_no_frame_at_all(make_video: MakeVideo) -> None:
    video = Video(make_video("none.avi", 0, codec="mpeg4"))
    assert video.duration == 0
    assert video.size == (96, 128)
    for read in (
        lambda: next(video.stream()),
        lambda: video.at([0.0]),
        lambda: video.uniform(4),
        video.shots,
    ):
        with pytest.raises(MediaError, match="no frame that can be decoded"):
            read()
    with pytest.raises(MediaError, match="ends before its first frame"):
        Video(make_video("none.mkv", 0, codec="ffv1"))
    with pytest.raises(MediaError, match=r"none\.mp4"):
        next(Video(make_video("none.mp4", 0, mux={"movflags": "empty_moov"})).stream())


def test_frames_that_cannot_be_decoded(make_video: MakeVideo) -> None:
    path = make_video("noise.mp4", 20, mux={"movflags": "+faststart"})
    raw = bytearray(path.read_bytes())
    begin = raw.find(b"mdat") + 4
    raw[begin:] = b"\xff" * (len(raw) - begin)
    path.write_bytes(raw)
    with pytest.raises(MediaError, match="no frame that can be decoded"):
        next(Video(path).stream())
    with pytest.raises(MediaError, match="no frame that can be decoded"):
        Video(path).shots()


def test_broken_tail_of_an_mp4(make_video: MakeVideo, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_video("tail.mp4", 200, options={"g": "10"}, mux={"movflags": "+faststart"})
    raw = path.read_bytes()
    begin = raw.find(b"mdat")
    path.write_bytes(raw[: begin + (len(raw) - begin) // 2])
    video = Video(path)
    assert 1.0 < video.duration < 7.5
    frames = np.concatenate([b.frames_THWC for b in video.stream()])
    assert 25 < len(frames) < 190
    # The last frame may be half a frame.
    assert numbers_of(frames[:-2]) == list(range(len(frames) - 2))
    assert video.damage is not None
    assert "8.00 s" in video.damage
    assert video.shots()[-1].end == pytest.approx(video.duration, abs=0.3)
    # Reading a sound part does not call the file damaged.
    list(video.stream(end=0.5))
    assert video.damage is None
    # FFmpeg's complaints stay off the terminal.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["tail.ts", "tail.mkv", "tail.avi"])
def test_broken_tail_of_others(make_video: MakeVideo, name: str) -> None:
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = make_video(name, 200, codec=codec, options={"g": "10"})
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    video = Video(path)
    frames = np.concatenate([b.frames_THWC for b in video.stream()])
    assert 50 < len(frames) < 170
    assert numbers_of(frames[:-2]) == list(range(len(frames) - 2))
    assert video.duration == pytest.approx(len(frames) / 25, abs=0.3)


def test_garbage_in_the_middle(make_video: MakeVideo) -> None:
    path = make_video("hole.mp4", 120, options={"g": "10", "bf": "0"}, mux={"movflags": "+faststart"})
    raw = bytearray(path.read_bytes())
    begin = raw.find(b"mdat")
    middle = begin + (len(raw) - begin) // 2
    raw[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(raw)
    video = Video(path)
    batches = list(video.stream())
    times = np.concatenate([b.times_T for b in batches])
    numbers = numbers_of(np.concatenate([b.frames_THWC for b in batches]))
    assert times[-1] == pytest.approx(119 / 25)
    assert (numbers[0], numbers[-1]) == (0, 119)
    assert video.damage is None or "could not be decoded" in video.damage


@pytest.mark.parametrize("claimed", [0, 25, 60_000_000])
def test_wrong_duration_in_the_header(make_video: MakeVideo, claimed: int) -> None:
    path = make_video("lie.mp4", 75)
    raw = bytearray(path.read_bytes())
    for box in (b"mvhd", b"mdhd", b"tkhd"):
        at = raw.find(box)
        # version and flags, created, modified, then timescale or track number, then duration
        place = at + 4 + (20 if box == b"tkhd" else 16)
        raw[place : place + 4] = struct.pack(">I", claimed)
    path.write_bytes(raw)
    video = Video(path)
    times = np.concatenate([b.times_T for b in video.stream()])
    assert len(times) == 75
    assert video.duration == pytest.approx(3.0, abs=1e-6)
    assert numbers_of(video.at([2.5]).frames_THWC) == [62]


def test_no_duration_in_the_header(make_video: MakeVideo) -> None:
    video = Video(make_video("live.mkv", 50, mux={"live": "1"}))
    assert video.duration == pytest.approx(2.0, abs=0.01)
    raw = make_video("raw.h264", 50, options={"bf": "0"})
    video = Video(raw)
    assert video.duration == pytest.approx(2.0, abs=0.05)
    batches = list(video.stream(start=1.0))
    assert numbers_of(np.concatenate([b.frames_THWC for b in batches])) == list(range(25, 50))


@pytest.mark.parametrize(
    "name", ["with space.mp4", "two\nlines.mp4", "a:b.mp4", "-i.mp4", "日本.mp4", "%d.mp4"]
)
def test_odd_names(make_video: MakeVideo, name: str) -> None:
    path = make_video("plain.mp4", 12).rename(make_video("x.mp4", 1).with_name(name))
    video = Video(path)
    assert numbers_of(next(video.stream()).frames_THWC) == list(range(12))
    old = Path.cwd()
    os.chdir(path.parent)
    try:
        assert Video(name).duration == pytest.approx(12 / 25)
    finally:
        os.chdir(old)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_names_that_are_not_utf8(make_video: MakeVideo) -> None:
    path = make_video("plain.mp4", 30, tone=440.0)
    odd = Path(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9 \xff.mp4"))
    path.rename(odd)
    video = Video(odd)
    assert numbers_of(next(video.stream()).frames_THWC) == list(range(30))
    assert numbers_of(video.at([1.0]).frames_THWC) == [25]
    assert len(video.sound(8000)) == pytest.approx(9600, abs=200)
    odd.write_bytes(b"")
    with pytest.raises(MediaError) as caught:
        Video(odd)
    str(caught.value).encode("utf-8")


def test_a_picture_with_a_film_name_is_a_film_of_one_frame(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "photo.jpg")
    video = Video((tmp_path / "photo.jpg").rename(tmp_path / "photo.mp4"))
    assert next(video.stream()).frames_THWC.shape == (1, 48, 64, 3)


def test_vanished_after_opening(make_video: MakeVideo) -> None:
    path = make_video("gone.mp4", 10)
    video = Video(path)
    path.unlink()
    with pytest.raises(MediaError, match="no such file"):
        next(video.stream())
    with pytest.raises(MediaError, match="no such file"):
        video.at([0])


def test_a_last_frame_that_stays_on_screen_is_no_damage(tmp_path):
    path = tmp_path / "slides.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), np.uint8)
    with VideoWriter(path, rate=None) as writer:
        writer.write(frames, [0.0, 1.0, 2.0], end=9.0)
    video = Video(path)
    assert [t for b in video.stream() for t in b.times_T] == pytest.approx([0.0, 1.0, 2.0])
    assert video.damage is None
    assert video.duration == pytest.approx(9.0, abs=0.1)


def test_key_frames_alone_are_no_damage(tmp_path):
    path = write_video(tmp_path / "long.mp4", np.zeros((90, 48, 64, 3), np.uint8), 10)
    video = Video(path)
    assert sum(len(b.times_T) for b in video.stream(keyframes=True)) < 90
    assert video.damage is None
