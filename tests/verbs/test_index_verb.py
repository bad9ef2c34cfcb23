"""`index`: only what is new or changed is done, bad files never stop it, and it says what it skipped."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest

from moviola.store.format import absolute_bytes, read_manifest
from moviola.store.index import Index
from moviola.types import FrameSpec, Refusal, StoreError, UsageError
from moviola.verbs.index import (
    NothingIndexed,
    index,
    index_list,
    index_remove,
    index_stats,
)
from tests.store.fake_encoder import COLOURS, ColourModel, make_picture, make_video


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_video(folder / "a.mp4", [("red", 4), ("green", 3)], subtitles=[(1, 2.5, "Hello there")])
    make_video(folder / "b.mp4", [("yellow", 5)])
    make_picture(folder / "p.png", "magenta")
    return folder


@pytest.fixture
def media(originals: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for path in originals.iterdir():
        os.link(path, folder / path.name)
    return folder


def name_of(path: str) -> str:
    return Path(path).name


def rows(folder: Path) -> list[tuple[str, float]]:
    opened = Index(folder)
    return [
        (name_of(opened.files[f].file), float(t))
        for f, t in zip(opened.units.file_N, opened.units.start_N, strict=True)
    ]


WHOLE = [("a.mp4", t) for t in range(7)] + [("b.mp4", t) for t in range(5)] + [("p.png", 0)]


def test_first_run_then_nothing_to_do(media: Path, tmp_path: Path) -> None:
    model = ColourModel()
    report = index(media, tmp_path / "i", model=model)
    assert (report.new, report.done, report.units, report.ok) == (3, 3, 13, True)
    assert rows(tmp_path / "i") == WHOLE
    opened = Index(tmp_path / "i")
    assert opened.units.shot_N.tolist() == [0] * 4 + [1] * 3 + [0] * 6
    assert {(t.text, t.source) for t in opened.texts} == {
        ("a.mp4", "name"),
        ("b.mp4", "name"),
        ("p.png", "name"),
        ("Hello there", "subtitle"),
    }
    assert all(opened.thumbnail(i)[:3] == b"\xff\xd8\xff" for i in range(13))  # type: ignore[index]
    generation = read_manifest(tmp_path / "i").generation
    again = ColourModel()
    report = index(media, tmp_path / "i", model=again)
    assert (report.unchanged, report.done, report.removed, report.ok) == (3, 0, 0, True)
    assert again.frames_seen == 0
    assert read_manifest(tmp_path / "i").generation == generation


def test_changed_files_are_done_again_and_vanished_ones_go(media: Path, tmp_path: Path) -> None:
    index(media, tmp_path / "i", model=ColourModel())
    (media / "b.mp4").unlink()
    (media / "p.png").unlink()
    make_picture(media / "p.png", "blue")
    make_picture(media / "q.png", "white")
    model = ColourModel()
    report = index(media, tmp_path / "i", model=model)
    assert (report.new, report.changed, report.unchanged, report.removed) == (1, 1, 1, 1)
    assert model.frames_seen == 2
    assert rows(tmp_path / "i") == [*WHOLE[:7], ("p.png", 0), ("q.png", 0)]
    opened = Index(tmp_path / "i")
    assert opened.vectors(np.array([7]))[0].argmax() == list(COLOURS).index("blue")


def test_subtitles_beside_an_unchanged_video_are_noticed(media: Path, tmp_path: Path) -> None:
    def texts() -> set[tuple[str, str]]:
        opened = Index(tmp_path / "i")
        return {(name_of(opened.files[t.file].file), t.text) for t in opened.texts if t.source == "subtitle"}

    def run() -> tuple[int, int, int, int]:
        model = ColourModel()
        report = index(media, tmp_path / "i", model=model)
        assert model.frames_seen == (0 if report.texts or not report.new else 13)
        assert rows(tmp_path / "i") == WHOLE
        names = [t.text for t in Index(tmp_path / "i").texts if t.source == "name"]
        assert sorted(names) == ["a.mp4", "b.mp4", "p.png"]
        return report.new, report.changed, report.texts, report.unchanged

    cue = "1\n00:00:0{},000 --> 00:00:04,000\n{}\n"
    assert run() == (3, 0, 0, 0)
    assert texts() == {("a.mp4", "Hello there")}
    # added beside one video, changed beside the other
    (media / "b.en.srt").write_text(cue.format(1, "added"))
    (media / "a.srt").unlink()  # a link to a file that other tests read
    (media / "a.srt").write_text(cue.format(1, "changed"))
    assert run() == (0, 0, 2, 1)
    assert texts() == {("a.mp4", "changed"), ("b.mp4", "added")}
    assert run() == (0, 0, 0, 3)
    # the same size, another time of change
    (media / "a.srt").write_text(cue.format(1, "CHANGED"))
    os.utime(media / "a.srt", ns=(1, 1))
    assert run() == (0, 0, 1, 2)
    assert texts() == {("a.mp4", "CHANGED"), ("b.mp4", "added")}
    # removed, and one that cannot be read: told once, the frames stay
    (media / "a.srt").unlink()
    (media / "b.en.srt").write_text("")
    report = index(media, tmp_path / "i", model=ColourModel())
    assert (report.texts, report.done, report.ok) == (2, 0, False)
    assert "subtitles were passed over" in report.damaged[0][1]
    assert "2 with other subtitles than before" in report.summary()
    assert texts() == set()
    assert rows(tmp_path / "i") == WHOLE
    assert run() == (0, 0, 0, 3)


def test_a_video_cut_short_takes_the_subtitles_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moviola.verbs import index as verb

    class Stops(ColourModel):
        def embed_frames(self, frames_THWC: np.ndarray, **kwargs: object) -> np.ndarray:
            if self.frames_seen >= 8:
                raise SystemExit("killed")
            return super().embed_frames(frames_THWC, **kwargs)  # type: ignore[arg-type]

    video = make_video(tmp_path / "v.mp4", [("red", 10), ("blue", 10)], rate=4, subtitles=[(1, 2, "before")])
    monkeypatch.setattr(verb, "COMMIT_SECONDS", 0.0)
    with pytest.raises(SystemExit):
        index(video, tmp_path / "i", model=Stops(), batch_size=4)
    assert Index(tmp_path / "i").files[0].status == "partial"
    (tmp_path / "v.srt").write_text("1\n00:00:03,000 --> 00:00:04,000\ntoday\n")
    model = ColourModel()
    report = index(video, tmp_path / "i", model=model, batch_size=4)
    assert (report.resumed, model.frames_seen) == (1, 12)
    opened = Index(tmp_path / "i")
    assert sorted(t.text for t in opened.texts) == ["today", "v.mp4"]
    assert opened.units.start_N.tolist() == [float(t) for t in range(20)]
    assert index(video, tmp_path / "i", model=ColourModel()).unchanged == 1


def test_files_from_elsewhere_stay_and_a_missing_folder_removes_nothing(media: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make_picture(other / "o.png", "red")
    index([media, other], tmp_path / "i", model=ColourModel())
    assert index(other, tmp_path / "i", model=ColourModel()).removed == 0
    other.rename(tmp_path / "unplugged")
    report = index([media, other], tmp_path / "i", model=ColourModel())
    assert (report.removed, report.ok) == (0, False)
    assert "no such file or folder" in report.failed[0][1]
    assert len(index_list(tmp_path / "i")) == 4
    # A file that was named and is gone, on the other hand, goes.
    (media / "p.png").unlink()
    report = index([media / "p.png", media / "a.mp4"], tmp_path / "i", model=ColourModel())
    assert (report.removed, report.failed) == (1, [])


def test_bad_files_are_told_and_the_rest_goes_on(media: Path, tmp_path: Path, originals: Path) -> None:
    (media / "empty.mp4").write_bytes(b"")
    (media / "text.mp4").write_text("this is no video\n")
    (media / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (media / "cut.png").write_bytes((originals / "p.png").read_bytes()[:60])
    (media / "nothing.jpg").symlink_to(media / "gone.jpg")
    (media / "loop").symlink_to(media)
    os.link(originals / "b.mp4", os.fsencode(media) + b"/caf\xe9 \n.mp4")
    report = index(media, tmp_path / "i", model=ColourModel())
    assert not report.ok
    assert sorted(name_of(path) for path, _ in report.failed) == [
        "cut.png",
        "empty.mp4",
        "noise.mp4",
        "nothing.jpg",
        "text.mp4",
    ]
    assert all(why for _, why in report.failed)
    summary = report.summary()
    assert "text file" in summary
    assert "0 bytes" in summary
    assert summary.count("\n") == 5
    assert report.new == 4
    assert len(rows(tmp_path / "i")) == 18
    listed = {os.fsencode(Path(one.file).name): one for one in index_list(tmp_path / "i")}
    assert listed[b"caf\xe9 \n.mp4"].status == "done"
    assert listed[b"text.mp4"].reason
    # They are tried again, and counted again, until they are mended.
    (media / "text.mp4").unlink()
    make_video(media / "text.mp4", [("cyan", 2)])
    report = index(media, tmp_path / "i", model=ColourModel())
    assert (report.new, report.unchanged, len(report.failed)) == (1, 4, 4)
    assert not report.ok


def test_a_broken_tail_is_kept_as_far_as_it_goes(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    whole = make_video(tmp_path / "whole.mp4", [("red", 10), ("blue", 10)])
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "w.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "w.mp4").read_bytes()
    (media / "tail.mp4").write_bytes(data[: len(data) * 2 // 3])
    report = index(media, tmp_path / "i", model=ColourModel())
    assert report.new == 1
    assert [name_of(path) for path, _ in report.damaged] == ["tail.mp4"]
    assert not report.ok
    assert 3 < report.units < 20
    assert index_list(tmp_path / "i")[0].reason
    assert index(media, tmp_path / "i", model=ColourModel()).unchanged == 1


def test_nothing_indexed_is_an_error_with_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    with pytest.raises(NothingIndexed, match="no pictures or videos"):
        index(media, tmp_path / "i", model=ColourModel())
    (media / "a.mp4").write_bytes(b"")
    with pytest.raises(NothingIndexed, match=r"none of the 1 files.*0 bytes") as caught:
        index(media, tmp_path / "i", model=ColourModel())
    assert len(caught.value.report.failed) == 1
    assert not (tmp_path / "i").exists()
    with pytest.raises(UsageError, match="nothing to index"):
        index([], tmp_path / "i", model=ColourModel())


def test_arguments_that_cannot_be_meant(media: Path, tmp_path: Path) -> None:
    for kwargs, words in (
        ({"every": 0.0}, "between 0.01 and 3600"),
        ({"every": float("nan")}, "between 0.01 and 3600"),
        ({"every": 1.0, "keyframes": True}, "not both"),
        ({"batch_size": 0}, "batch size"),
    ):
        with pytest.raises(UsageError, match=words):
            index(media, tmp_path / "i", model=ColourModel(), **kwargs)  # type: ignore[arg-type]
    assert not (tmp_path / "i").exists()


def test_another_model_or_sampling_is_refused_and_no_word_means_as_before(
    media: Path, tmp_path: Path
) -> None:
    index(media, tmp_path / "i", model=ColourModel(), every=0.5)
    with pytest.raises(StoreError, match=r"made with the model 'colours'.*'other'"):
        index(media, tmp_path / "i", model=ColourModel(name="other"))
    with pytest.raises(StoreError, match=r"every 0.5 s; this run asks for a frame every 1 s"):
        index(media, tmp_path / "i", model=ColourModel(), every=1.0)
    make_video(media / "c.mp4", [("cyan", 2)])
    assert index(media, tmp_path / "i", model=ColourModel()).new == 1
    assert [t for name, t in rows(tmp_path / "i") if name == "c.mp4"] == [0, 0.5, 1, 1.5]


def test_models_that_only_classify_are_refused(media: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="only adds a classifier"):
        index(media, tmp_path / "i", model=ColourModel(adaptation="classifier"))


def test_keyframes_only(media: Path, tmp_path: Path) -> None:
    report = index(media, tmp_path / "i", model=ColourModel(), keyframes=True)
    times = [t for name, t in rows(tmp_path / "i") if name == "a.mp4"]
    assert times[0] == 0
    assert len(times) < 7
    assert report.ok
    assert index(media, tmp_path / "i", model=ColourModel()).unchanged == 3


def test_clip_encoders_get_overlapping_windows(media: Path, tmp_path: Path) -> None:
    spec = FrameSpec(count=4, sampler="middle")
    index(media, tmp_path / "i", model=ColourModel(spec=spec), every=0.5)
    opened = Index(tmp_path / "i")
    spans = [
        (float(a), float(b))
        for a, b, f in zip(opened.units.start_N, opened.units.end_N, opened.units.file_N, strict=True)
        if opened.files[f].file.endswith("a.mp4")
    ]
    assert spans == [(t, t + 1.5) for t in range(6)]
    assert opened.manifest.sampling.window == 4
    with pytest.raises(Refusal, match="4 frames in a row"):
        index(media, tmp_path / "j", model=ColourModel(spec=spec), keyframes=True)


def test_windows_go_on_on_the_same_grid_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moviola.verbs import index as verb

    media = make_video(tmp_path / "long.mp4", [("red", 20), ("blue", 21)], rate=4)
    model = ColourModel(spec=FrameSpec(count=4))
    index(media, tmp_path / "whole", model=model, batch_size=8)
    monkeypatch.setattr(verb, "COMMIT_SECONDS", 0.0)

    class Stops(ColourModel):
        calls = 0

        def embed_clips(self, clips: object, **kwargs: object) -> np.ndarray:
            self.calls += 1
            if self.calls > 3:
                raise SystemExit("killed")
            return super().embed_clips(clips, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(SystemExit):
        index(media, tmp_path / "i", model=Stops(spec=FrameSpec(count=4)), batch_size=8)
    assert Index(tmp_path / "i").files[0].status == "partial"
    assert index(media, tmp_path / "i", model=model, batch_size=8).resumed == 1
    a, b = Index(tmp_path / "i"), Index(tmp_path / "whole")
    np.testing.assert_array_equal(a.units.start_N, b.units.start_N)
    np.testing.assert_array_equal(a.units.end_N, b.units.end_N)
    np.testing.assert_array_equal(a.units.shot_N, b.units.shot_N)
    np.testing.assert_allclose(
        a.vectors(np.arange(len(a.units))), b.vectors(np.arange(len(b.units))), atol=2e-3
    )


def test_vectors_that_are_not_numbers_fail_the_file_only(media: Path, tmp_path: Path) -> None:
    class Breaks(ColourModel):
        def embed_frames(self, frames_THWC: np.ndarray, **kwargs: object) -> np.ndarray:
            out = super().embed_frames(frames_THWC, **kwargs)  # type: ignore[arg-type]
            return np.where(out.argmax(1)[:, None] == list(COLOURS).index("yellow"), np.nan, out)

    report = index(media, tmp_path / "i", model=Breaks())
    assert [name_of(path) for path, _ in report.failed] == ["b.mp4"]
    assert "not finite" in report.failed[0][1]
    assert rows(tmp_path / "i") == [row for row in WHOLE if row[0] != "b.mp4"]


def test_progress_rises_to_the_number_of_files(media: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, float | None, str]] = []

    def told(done: float, total: float | None, note: str = "") -> None:
        seen.append((done, total, note))

    index(media, tmp_path / "i", model=ColourModel(), on_progress=told)
    done = [one[0] for one in seen]
    assert done == sorted(done)
    first = [one for one, _, note in seen if note.startswith("a.mp4")]
    assert len({*first}) > 2  # within the file too
    assert (done[-1], {one[1] for one in seen}) == (3, {3})
    assert seen[0][2].startswith("a.mp4")
    assert "x real time" in seen[-1][2]
    seen.clear()
    index(media, tmp_path / "i", model=ColourModel(), on_progress=told)
    assert seen == []


def test_remove_list_and_stats(media: Path, tmp_path: Path) -> None:
    index(media, tmp_path / "i", model=ColourModel())
    stats = index_stats(tmp_path / "i")
    assert (stats["files"], stats["videos"], stats["pictures"], stats["units"], stats["dim"]) == (
        3,
        2,
        1,
        13,
        8,
    )
    assert stats["seconds"] == pytest.approx(12)
    with pytest.raises(UsageError, match="holds no file"):
        index_remove(tmp_path / "i", [media / "a.mp4", media / "zzz"])
    assert len(index_list(tmp_path / "i")) == 3
    assert index_remove(tmp_path / "i", [media / "a.mp4"]) == 1
    assert rows(tmp_path / "i") == WHOLE[7:]
    assert index_remove(tmp_path / "i", [media]) == 2
    assert index_stats(tmp_path / "i")["units"] == 0
    assert index(media, tmp_path / "i", model=ColourModel()).new == 3
    assert absolute_bytes(media / "a.mp4") in {row.path for row in Index(tmp_path / "i").files}
