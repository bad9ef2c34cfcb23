"""Raw clips to single scenes with people: counts, the same result twice, nothing done twice or by halves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from moviola import media
from moviola.data.tables import Table, media_cell
from moviola.media import Video
from moviola.types import TimeSpan, UsageError
from moviola.verbs import clean_clips as verb
from moviola.verbs.clean_clips import NoClipsLeft, clean_clips

RATE = 20
GREY, RED, BLUE, WHITE = (90, 90, 90), (200, 30, 30), (30, 30, 200), (250, 250, 250)


def film(path, *scenes, box=True):
    """Scenes of (colour, seconds), each with a box that moves; white boxes are people."""
    frames = []
    for colour, seconds in scenes:
        for t in range(round(seconds * RATE)):
            image = np.full((64, 64, 3), colour, np.uint8)
            if box:
                image[20:40, 2 + t % 40 : 18 + t % 40] = WHITE
            frames.append(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    return media.write_video(path, np.stack(frames), RATE)


class People:
    """Counts white areas, and its own calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, frames_THWC):
        self.calls.append(frames_THWC.shape)
        return [(frame.min(-1) > 200).mean() > 0.02 for frame in frames_THWC]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two scenes, the same file again, one scene, one without people, one broken, and a picture."""
    folder = tmp_path_factory.mktemp("films")
    film(folder / "a.mp4", (GREY, 1), (RED, 2))
    shutil.copy(folder / "a.mp4", folder / "b.mp4")
    film(folder / "c" / "one.mp4", (BLUE, 1.5))
    film(folder / "empty.mp4", (RED, 1.5), box=False)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "note.txt").write_text("not a video")
    return folder


def rows(report):
    return [json.loads(line) for line in report.table.read_text().splitlines()]


def steps(report):
    return {step.name: (step.before, step.after) for step in report.steps}


def test_every_step_says_what_came_in_and_what_went_on(films, tmp_path):
    report = clean_clips(films, tmp_path / "clean", detector=People(), detector_name="white")
    assert steps(report) == {
        "readable": (5, 4), "different files": (4, 3), "longest scene": (3, 3), "people": (3, 2)
    }  # fmt: skip
    assert report.clips == 2
    first, second = rows(report)
    assert first["video"] == str(films / "a.mp4")
    assert (first["scenes"], second["scenes"]) == (2, 1)
    assert first["start"] == pytest.approx(1, abs=0.06)
    assert first["end"] == pytest.approx(3, abs=0.06)
    assert (second["start"], second["end"]) == (0, pytest.approx(1.5, abs=0.06))
    assert first["people"] == second["people"] == 1
    assert report.seconds == pytest.approx(3.5, abs=0.1)
    assert [one.path for one in report.failed] == [str(films / "broken.mp4")]
    said = str(report)
    assert "people: 3 -> 2" in said
    assert "broken.mp4" in said
    assert json.loads((tmp_path / "clean" / "report.json").read_text()) == report.to_json()


def test_the_table_is_read_as_spans_of_videos(films, tmp_path):
    report = clean_clips(films, tmp_path)
    table = Table(report.table)
    (_, row), *_ = table.rows()
    clip = media_cell(row["video"], table.folder, row)
    assert clip.path == films / "a.mp4"
    assert clip.span == TimeSpan(row["start"], row["end"])


def test_without_a_detector_the_step_is_left_out_and_said(films, tmp_path):
    report = clean_clips(films, tmp_path)
    assert steps(report)["people"] == (3, 3)
    assert "no detector" in report.steps[-1].note
    assert "no detector" in str(report)
    assert all("people" not in row for row in rows(report))


def test_a_second_run_gives_the_same_and_looks_at_nothing_again(films, tmp_path, monkeypatch):
    people = People()
    first = clean_clips(films, tmp_path, detector=people, detector_name="white")
    table, facts = first.table.read_bytes(), (tmp_path / "facts.jsonl").read_bytes()
    calls = len(people.calls)
    monkeypatch.setattr(Video, "shots", lambda *a, **k: pytest.fail("a scene was looked for again"))
    again = clean_clips(films, tmp_path, detector=people, detector_name="white")
    assert again == first
    assert len(people.calls) == calls
    assert again.table.read_bytes() == table
    assert (tmp_path / "facts.jsonl").read_bytes() == facts


def test_a_detector_without_a_name_is_asked_again(films, tmp_path):
    asked = []
    for _ in range(2):
        clean_clips(films, tmp_path, detector=lambda frames: asked.append(len(frames)) or 2)
    assert asked == [8] * 6


def test_new_files_are_all_that_is_looked_at(films, tmp_path):
    people, folder = People(), tmp_path / "films"
    shutil.copytree(films, folder)
    clean_clips(folder, tmp_path / "clean", detector=people, detector_name="white", looks=3)
    film(folder / "new.mp4", (GREY, 1.2))
    shutil.move(folder / "c" / "one.mp4", folder / "moved.mp4")  # known by its content
    calls = len(people.calls)
    report = clean_clips(folder, tmp_path / "clean", detector=people, detector_name="white", looks=3)
    assert len(people.calls) == calls + 1
    assert {row["video"] for row in rows(report)} == {
        str(folder / n) for n in ("a.mp4", "moved.mp4", "new.mp4")
    }


def test_a_killed_run_goes_on(films, tmp_path):
    """It dies at the second scene, in the middle of a line; nothing whole is lost and no table is left."""

    class Dies(People):
        def __call__(self, frames_THWC):
            if len(self.calls) == 1:
                raise KeyboardInterrupt
            return super().__call__(frames_THWC)

    people = Dies()
    with pytest.raises(KeyboardInterrupt):
        clean_clips(films, tmp_path / "clean", detector=people, detector_name="white")
    assert sorted(p.name for p in (tmp_path / "clean").iterdir()) == ["facts.jsonl"]
    with (tmp_path / "clean" / "facts.jsonl").open("ab") as file:
        file.write(b'["people half a li')
    people = People()
    report = clean_clips(films, tmp_path / "clean", detector=people, detector_name="white")
    assert len(people.calls) == 2
    whole = clean_clips(films, tmp_path / "other", detector=People(), detector_name="white")
    assert rows(report) == rows(whole)
    for line in (tmp_path / "clean" / "facts.jsonl").read_text().splitlines():
        json.loads(line)


def test_scenes_may_be_too_short(films, tmp_path):
    report = clean_clips(films, tmp_path, shortest=1.8)
    assert steps(report)["longest scene"] == (3, 1)
    assert rows(report)[0]["video"] == str(films / "a.mp4")


def test_of_equally_long_scenes_the_first_stays(tmp_path):
    film(tmp_path / "films" / "x.mp4", (GREY, 1), (RED, 1), (BLUE, 0.6))
    report = clean_clips(tmp_path / "films", tmp_path / "clean")
    assert rows(report)[0]["start"] == 0
    assert rows(report)[0]["scenes"] == 3


def test_scenes_are_cut_out_where_asked(films, tmp_path):
    report = clean_clips(films, tmp_path, cut=True)
    made = rows(report)
    assert {p.name for p in (tmp_path / "clips").iterdir()} == {
        row["video"].partition("/")[2] for row in made
    }
    first = made[0]
    assert first["source"] == str(films / "a.mp4")
    assert "start" not in first
    assert Video(tmp_path / first["video"]).duration == pytest.approx(2, abs=0.11)
    assert len(Video(tmp_path / first["video"]).shots()) == 1
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()}
    clean_clips([films, tmp_path], tmp_path, cut=True)  # its own clips are no sources
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()} == times
    clean_clips(films, tmp_path, cut=True, shortest=1.8)
    assert [p.name for p in (tmp_path / "clips").iterdir()] == [first["video"].partition("/")[2]]


def test_progress_is_told(films, tmp_path):
    told = []
    clean_clips(films, tmp_path, on_progress=lambda done, total, note="": told.append((done, total, note)))
    assert told[:5] == [(n, 5, "reading") for n in range(1, 6)]
    assert told[-1] == (4, 4, "finding scenes")


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_no_clips_left_says_where_they_went_and_keeps_the_old_table(films, tmp_path):
    before = clean_clips(films, tmp_path).table.read_bytes()
    with pytest.raises(NoClipsLeft, match="people 3 -> 0") as error:
        clean_clips(films, tmp_path, detector=lambda frames: 0)
    assert steps(error.value.report)["longest scene"] == (3, 3)
    assert (tmp_path / "clips.jsonl").read_bytes() == before


def test_nothing_readable(films, tmp_path):
    with pytest.raises(NoClipsLeft, match=r"readable 1 -> 0.*broken\.mp4"):
        clean_clips(films / "broken.mp4", tmp_path)


BAD = {
    "no videos": (lambda films, to: clean_clips(films / "note.txt", to), "no videos to clean"),
    "nothing there": (lambda films, to: clean_clips(films / "absent", to), "no such file"),
    "a file to write to": (lambda films, to: clean_clips(films, films / "a.mp4"), "is a file"),
    "looks": (lambda films, to: clean_clips(films, to, looks=0), "looks and workers"),
    "shortest": (lambda films, to: clean_clips(films, to, shortest=-1.0), "shortest"),
    "threshold": (lambda films, to: clean_clips(films, to, threshold=0.5), "threshold >= 1"),
    "a detector of boxes": (
        lambda films, to: clean_clips(films, to, detector=lambda frames: np.zeros((8, 4))), "one number of"
    ),
    "a detector of words": (
        lambda films, to: clean_clips(films, to, detector=lambda frames: "two"), "got 'two'"
    ),
    "a detector of nan": (
        lambda films, to: clean_clips(films, to, detector=lambda frames: float("nan")), "got nan"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, films, tmp_path):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call(films, tmp_path / "clean")


def test_facts_that_are_not_facts(films, tmp_path):
    (tmp_path / verb.FACTS).write_text("17\n")
    with pytest.raises(UsageError, match=r"facts\.jsonl, line 1"):
        clean_clips(films, tmp_path)
