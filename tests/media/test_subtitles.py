"""Subtitles: tidy and untidy files, every usual encoding, sidecars, and tracks inside videos."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moviola.media import Subtitle, Video, read_subtitles, write_video
from moviola.media.subtitles import parse_subtitles, plain, sidecar_marks
from moviola.media.writer import without_overlap
from moviola.types import MediaError, TimeSpan

from .conftest import MakeVideo, numbered

SRT = """1
00:00:01,000 --> 00:00:02,500
<i>Grüße</i> aus
<font color="#ff0000">Köln</font>

2
00:01:02,250 --> 00:01:04,000 X1:10 X2:20
{\\an8}Second &amp; last
"""


def texts(cues: list[Subtitle]) -> list[str]:
    return [cue.text for cue in cues]


def test_srt(tmp_path: Path) -> None:
    path = tmp_path / "a.srt"
    path.write_text(SRT, encoding="utf-8")
    assert read_subtitles(path) == [
        Subtitle(TimeSpan(1.0, 2.5), "Grüße aus\nKöln"),
        Subtitle(TimeSpan(62.25, 64.0), "Second & last"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings(tmp_path: Path, encoding: str, newline: str) -> None:
    path = tmp_path / "a.srt"
    path.write_bytes(SRT.replace("\n", newline).encode(encoding))
    assert texts(read_subtitles(path)) == ["Grüße aus\nKöln", "Second & last"]


def test_vtt(tmp_path: Path) -> None:
    path = tmp_path / "a.vtt"
    path.write_text(
        "WEBVTT - a title\n\nNOTE 00:01 nothing here\nstill a note\n\nSTYLE\n::cue { color: red }\n\n"
        "intro\n00:01.000 --> 00:03.500 line:0 position:20%\n<v Mary>Hello <b>there</b>\n\n"
        "01:00:00.000 --> 01:00:01.250\n<c.yellow>late</c> <00:00:01.000>word\n"
    )
    assert read_subtitles(path) == [
        Subtitle(TimeSpan(1.0, 3.5), "Hello there"),
        Subtitle(TimeSpan(3600.0, 3601.25), "late word"),
    ]


def test_untidy() -> None:
    cues, bad = parse_subtitles(
        "1\n00:00:01,000 --> 00:00:02,000\nno empty line\n2\n00:00:03,000 --> 00:00:04,000\n\n"
        "after an empty one\n\nstray words\n\n3\n00:00:09,000 --> 00:00:08,000\nbackwards\n\n"
        "4\n00:00:01,500 --> 00:00:03,500\noverlapping\n\n5\n00:0x --> broken\nlost\n\n"
        "6\n00:00:20,000 --> 00:00:21,000\n\n\n7\n0:30.5-->0:31\nloose"
    )
    assert texts(cues) == ["no empty line", "overlapping", "after an empty one", "loose"]
    assert [cue.span.start for cue in cues] == [1.0, 1.5, 3.0, 30.5]
    assert bad == 2


def test_a_number_that_is_text_stays() -> None:
    cues, _ = parse_subtitles("1\n00:00:01,000 --> 00:00:02,000\n42\n\n2\n00:00:03,000 --> 00:00:04,000\n7\n")
    assert texts(cues) == ["42", "7"]


@pytest.mark.parametrize("text", ["a < b and b > c", "5 <3 you", "x{y}z", "1 < 2"])
def test_what_is_no_tag_stays(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"just words\n\nno times\n", "no line with times"),
     (b"\x89PNG\r\n\x1a\n" * 9, "no line with times"),
     (b"1\n00:00:05,000 --> 00:00:01,000\nback\n", "1 broken")],
)  # fmt: skip
def test_not_subtitles(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.srt").write_bytes(content)
    with pytest.raises(MediaError, match=says):
        read_subtitles(tmp_path / "a.srt")


def test_sidecars(make_video: MakeVideo, tmp_path: Path) -> None:
    video = Video(make_video("my film.mp4", 5))
    assert video.subtitles() == []
    one = "1\n00:00:0{},000 --> 00:00:09,000\n{}\n"
    (tmp_path / "my film.srt").write_text(one.format(3, "plain"))
    (tmp_path / "my film.en.srt").write_text(one.format(1, "english"))
    (tmp_path / "my film.pt-BR.VTT").write_text("WEBVTT\n\n00:02.000 --> 00:03.000\nbrasil\n")
    (tmp_path / "my film 2.srt").write_text(one.format(1, "another film"))
    (tmp_path / "my film.part two.srt").write_text(one.format(1, "another film"))
    assert [(cue.text, cue.language) for cue in video.subtitles()] == [
        ("english", "en"),
        ("brasil", "pt-BR"),
        ("plain", None),
    ]
    (tmp_path / "my film.srt").write_text("")
    with pytest.raises(MediaError, match="empty"):
        video.subtitles()


def test_marks_change_with_the_files_beside_a_video(tmp_path: Path) -> None:
    video, other = tmp_path / "f.g.mp4", tmp_path / "f.mp4"

    def marks() -> tuple[str, str]:
        found = sidecar_marks([video, other])
        return found[video], found[other]

    assert marks() == ("", "")
    assert sidecar_marks([tmp_path / "none" / "f.mp4"]) == {tmp_path / "none" / "f.mp4": ""}
    seen = set()
    for name in ("f.g.srt", "f.g.de.srt", "f.g.en.forced.vtt"):
        (tmp_path / name).write_text("x")
        seen.add(marks()[0])
    (tmp_path / "f.g.srt").write_text("yy")
    seen.add(marks()[0])
    os.utime(tmp_path / "f.g.srt", ns=(5, 5))
    seen.add(marks()[0])
    (tmp_path / "f.g.de.srt").rename(tmp_path / "f.g.fr.srt")
    seen.add(marks()[0])
    assert len(seen) == 6
    assert "" not in seen
    # "f.g.srt" does not belong to f.mp4, since "g" is no language; "f.fr.srt" does
    assert marks()[1] == ""
    (tmp_path / "f.fr.srt").write_text("x")
    assert marks()[1] != ""
    assert marks()[0] in seen


def test_embedded_round_trip(tmp_path: Path) -> None:
    cues = [
        Subtitle(TimeSpan(0.25, 1.0), "Grüße, 你好", "deu"),
        Subtitle(TimeSpan(1.0, 1.5), "two\nlines, with {braces}", "deu"),
        Subtitle(TimeSpan(2.0, 2.75), "last", "deu"),
    ]
    path = write_video(tmp_path / "s.mp4", [numbered(n) for n in range(75)], 25, subtitles=cues)
    assert Video(path).subtitles() == cues


def test_overlapping_cues_share_the_screen() -> None:
    one, two = Subtitle(TimeSpan(0, 2), "one"), Subtitle(TimeSpan(1, 3), "two")
    assert [(cue.span.start, cue.span.end, cue.text) for cue in without_overlap([two, one])] == [
        (0, 1, "one"),
        (1, 2, "one\ntwo"),
        (2, 3, "two"),
    ]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_without_overlap_keeps_every_instant(spans: list[tuple[int, int]]) -> None:
    cues = [Subtitle(TimeSpan(a / 10, (a + n) / 10), f"cue {i}") for i, (a, n) in enumerate(spans)]
    made = without_overlap(cues)
    assert all(a.span.end <= b.span.start for a, b in pairwise(made))
    for instant in range(71):
        time = instant / 10 + 0.05
        on = {cue.text for cue in cues if cue.span.start < time < cue.span.end}
        shown = {
            line for cue in made if cue.span.start < time < cue.span.end for line in cue.text.split("\n")
        }
        assert shown == on


@given(st.text(max_size=300))
def test_any_text_parses(text: str) -> None:
    cues, bad = parse_subtitles(text)
    assert bad >= 0
    assert all(cue.text for cue in cues)
