"""`search`, `save_clips` and `report`: moments in order, by words, by picture and by subtitles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moviola.clip.sample import choose_frames
from moviola.store.index import Index
from moviola.types import FrameSpec, Moment, Refusal, StoreError, TimeSpan, UsageError
from moviola.verbs.index import index
from moviola.verbs.report import report
from moviola.verbs.search import NothingFound, Results, clock, save_clips, search
from tests.store.fake_encoder import COLOURS, ColourModel, make_picture, make_video

MODEL = ColourModel()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with media/ and its index i/."""
    folder = tmp_path_factory.mktemp("made")
    media = folder / "media"
    media.mkdir()
    make_video(
        media / "a.mp4",
        [("red", 6), ("green", 5), ("blue", 7)],
        subtitles=[(6, 8, "Hello green world"), (12, 14, "Good bye")],
    )
    make_video(media / "b & <b>.mp4", [("yellow", 6), ("green", 4)])
    make_picture(media / "magenta_thing.png", "magenta")
    (media / "broken.mp4").write_text("no video")
    index(media, folder / "i", model=MODEL)
    return folder


def ask(made: Path, query: str | None = None, **kwargs: object) -> list[tuple[str, float, float]]:
    results = search(made / "i", query, model=MODEL, **kwargs)  # type: ignore[arg-type]
    return [(Path(m.file).name, m.span.start, m.span.end) for m in results]


def test_words_find_moments_best_first(made: Path) -> None:
    results = search(made / "i", "green", model=MODEL)
    got = [(Path(m.file).name, m.span) for m in results[:2]]
    assert {name for name, _ in got} == {"a.mp4", "b & <b>.mp4"}
    for name, span in got:
        truth = TimeSpan(6, 11) if name == "a.mp4" else TimeSpan(6, 10)
        assert span.iou(truth) > 0.75
    assert results[0].score > 0.8
    scores = [m.score for m in results]
    assert scores == sorted(scores, reverse=True)
    assert all(m.thumbnail for m in results)
    assert results.measure == "cosine"
    assert set(results.curves) <= {m.file for m in results}
    curve = results.curves[results[0].file]
    assert len(curve.times) == len(curve.scores) == (18 if curve.file.endswith("a.mp4") else 10)


def test_a_picture_is_a_moment_at_zero(made: Path) -> None:
    assert ask(made, "magenta", k=1) == [("magenta_thing.png", 0, 0)]


def test_k_is_respected_and_moments_never_overlap(made: Path) -> None:
    for k in (1, 2, 5, 100):
        results = search(made / "i", "blue", model=MODEL, k=k)
        assert len(results) <= k
        for a in results:
            for b in results:
                assert a is b or a.file != b.file or a.span.overlap(b.span) == 0


def test_by_picture_alone_and_together_with_words(made: Path, tmp_path: Path) -> None:
    blue = make_picture(tmp_path / "blue.png", "blue")
    ((name, start, end),) = ask(made, image=blue, k=1)
    assert name == "a.mp4"
    assert TimeSpan(start, end).iou(TimeSpan(11, 18)) > 0.8
    assert ask(made, image=Image.open(blue), k=1) == [(name, start, end)]
    both = [name for name, *_ in ask(made, "yellow", image=blue, k=3)]
    assert {"a.mp4", "b & <b>.mp4"} <= set(both)
    with pytest.raises(Exception, match="no such file"):
        ask(made, image=tmp_path / "gone.png")


def test_by_words_in_subtitles_and_names(made: Path) -> None:
    results = search(made / "i", text="hello", model=None)
    assert [(m.span.start, m.span.end, m.text) for m in results] == [(6, 8, "Hello green world")]
    assert results.measure == "words"
    assert results[0].thumbnail
    assert ask(made, text="thing") == [("magenta_thing.png", 0, 0)]
    with pytest.raises(NothingFound, match="No file name and no subtitle has the words 'zebra'"):
        ask(made, text="zebra")
    near = ask(made, "blue", text="hello")
    assert {name for name, *_ in near} == {"a.mp4"}
    assert all(end <= 8 + 5.5 for _, _, end in near)


def test_within_paths_folders_and_patterns(made: Path) -> None:
    media = made / "media"
    assert {n for n, *_ in ask(made, "green", within=[media / "a.mp4"])} == {"a.mp4"}
    assert {n for n, *_ in ask(made, "green", within=["*/b*.mp4"])} == {"b & <b>.mp4"}
    assert len({n for n, *_ in ask(made, "green", within=[media], k=20)}) == 3
    with pytest.raises(UsageError, match="holds no file"):
        ask(made, "green", within=[made / "elsewhere"])
    with pytest.raises(NothingFound, match="could be read"):
        ask(made, "green", within=[media / "broken.mp4"])


def test_min_score(made: Path) -> None:
    assert len(ask(made, "green", min_score=0.7)) == 2
    with pytest.raises(NothingFound, match=r"Nothing scores 2 or more; the best has 0\.\d+"):
        ask(made, "green", min_score=2)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_bad_k(made: Path, k: object) -> None:
    with pytest.raises(UsageError, match="whole number above 0"):
        ask(made, "green", k=k)


@pytest.mark.parametrize("query", ["", "  \n"])
def test_empty_query(made: Path, query: str) -> None:
    with pytest.raises(UsageError, match="query is empty"):
        ask(made, query)
    with pytest.raises(UsageError, match="nothing to look for"):
        ask(made)


def test_a_query_longer_than_the_context(made: Path) -> None:
    long = "green " * 9
    with pytest.raises(UsageError, match="9 tokens"):
        ask(made, long)
    assert ask(made, long, truncate=True, k=2)


def test_missing_index_other_model_and_no_text(made: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no index"):
        search(tmp_path / "none", "green", model=MODEL)
    with pytest.raises(StoreError, match=r"made with the model 'colours'.*'other'"):
        search(made / "i", "green", model=ColourModel(name="other"))
    mute = ColourModel(has_text=False)
    with pytest.raises(Refusal, match="no text tower"):
        search(made / "i", "green", model=mute)
    assert search(made / "i", image=Image.new("RGB", (40, 40), (20, 20, 220)), model=mute, k=1)


def test_non_separable_models_rerank_with_their_own_score(tmp_path: Path) -> None:
    """The score of a moment is the model's, over the stored frames in it, resampled to its frame count."""
    media = tmp_path / "media"
    media.mkdir()
    make_video(media / "flicker.mp4", [("red", 4), *[("green", 1.0), ("cyan", 0.5)] * 4, ("red", 4)])
    make_video(media / "steady.mp4", [("yellow", 5), ("green", 4), ("yellow", 5)])
    spec = FrameSpec(count=3)
    model = ColourModel(separable=False, spec=spec)
    index(media, tmp_path / "i", model=model, every=0.5)
    results = search(tmp_path / "i", "green", model=model)
    assert results.measure == "model"
    scores = [m.score for m in results]
    assert scores == sorted(scores, reverse=True)
    opened = Index(tmp_path / "i")
    for moment in results:
        inside = [
            i
            for i in range(len(opened.units))
            if opened.files[opened.units.file_N[i]].file == moment.file
            and moment.span.start <= opened.units.start_N[i] <= moment.span.end
        ]
        picked, mask = choose_frames(spec, opened.units.start_N[inside])
        vectors = opened.vectors(np.array(inside)[picked], unit_length=False)
        # Un-normalised, as the module's own `score` takes them: colour shares sum to 3.
        np.testing.assert_allclose(vectors.sum(1), 3, atol=0.05)
        assert moment.score == pytest.approx(
            float(model.score(["green"], vectors[None], mask[None])[0, 0]), abs=1e-5
        )


def test_windows_of_a_clip_encoder_are_searched_too(tmp_path: Path) -> None:
    media = make_video(tmp_path / "a.mp4", [("red", 8), ("green", 8), ("blue", 8)])
    model = ColourModel(spec=FrameSpec(count=4))
    index(media, tmp_path / "i", model=model, every=0.5)
    best = search(tmp_path / "i", "green", model=model, k=1)[0]
    assert best.span.iou(TimeSpan(8, 16)) > 0.8


def test_key_frames_stand_for_the_time_up_to_the_next(tmp_path: Path) -> None:
    media = make_video(tmp_path / "a.mp4", [("red", 40), ("blue", 40)], rate=10)
    index(media, tmp_path / "i", model=MODEL, keyframes=True)
    best = search(tmp_path / "i", "blue", model=MODEL, k=1)[0]
    assert best.span.end == pytest.approx(80, abs=0.5)
    assert best.span.start < 60


def test_json_is_exactly_the_promised_shape(made: Path) -> None:
    data = json.loads(json.dumps(search(made / "i", "magenta", model=MODEL, k=2).to_json()))
    assert set(data) == {"results"}
    assert all(set(one) == {"file", "start", "end", "score"} for one in data["results"])
    assert (data["results"][0]["start"], data["results"][0]["end"]) == (0, 0)
    assert Path(data["results"][0]["file"]).is_absolute()


def test_a_notebook_shows_pictures_and_escapes_names(made: Path) -> None:
    page = search(made / "i", "yellow <i>", model=MODEL, k=3)._repr_html_()
    assert page.count("<img") == 3
    assert "b &amp; &lt;b&gt;.mp4" in page
    assert "<i>" not in page


def test_report_is_self_contained_and_escaped(made: Path, tmp_path: Path) -> None:
    one = search(made / "i", "green", model=MODEL)
    evil = "</title><script>alert(1)</script>"
    bad = Moment("/x/\udcff<img src=x onerror=alert(1)>.mp4", "video", TimeSpan(1, 2), 0.5, None, evil)
    two = Results((bad,), evil, "/i\udcff", evil, "words")
    path = report([one, two], tmp_path / "deep" / "r.html", title=evil)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "onerror=alert(1)>" not in page
    assert page.count("data:image/jpeg;base64,") == len(one)
    assert page.count("<svg") == len(one.curves)
    assert page.count("<rect") == sum(m.kind == "video" for m in one)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:|//|file:)""", page)
    assert "prefers-color-scheme: dark" in page
    assert "viewport" in page
    with pytest.raises(UsageError, match="no results"):
        report([], tmp_path / "r.html")


def test_clips_are_written_as_files(made: Path, tmp_path: Path) -> None:
    from moviola.media import Video

    results = search(made / "i", "green", model=MODEL, k=2)
    picture = search(made / "i", "magenta", model=MODEL, k=1)
    paths = save_clips([*results, *picture], tmp_path / "clips")
    assert [p.suffix for p in paths] == [".mp4", ".mp4", ".png"]
    for path, moment in zip(paths[:2], results, strict=True):
        assert Video(path).duration == pytest.approx(moment.span.duration, abs=0.15)
    assert Image.open(paths[2]).size == (80, 60)
    with pytest.raises(NothingFound):
        save_clips([], tmp_path / "clips")


def test_clips_keep_the_text_inside_their_video(tmp_path: Path) -> None:
    from moviola.media import Subtitle, Video, write_video

    frames = [np.full((48, 64, 3), COLOURS[c], np.uint8) for c in ("red", "green", "blue") for _ in range(40)]
    cues = [Subtitle(TimeSpan(t, t + 1.0), f"second {t}") for t in range(12)]
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "v.mp4", frames, 10, subtitles=cues)
    index(tmp_path / "media", tmp_path / "i", model=MODEL)
    results = search(tmp_path / "i", "green", model=MODEL, k=1)
    span = results[0].span
    (path,) = save_clips(results, tmp_path / "clips")
    found = {cue.text: cue.span for cue in Video(path).subtitles()}
    assert {f"second {t}" for t in (5, 6)} <= found.keys() < {f"second {t}" for t in range(12)}
    assert found["second 5"].start == pytest.approx(5 - span.start, abs=0.01)
    assert found["second 5"].end == pytest.approx(6 - span.start, abs=0.01)


def test_clock() -> None:
    assert [clock(t) for t in (0, 65.25, 59.96, 3600)] == ["0:00.0", "1:05.2", "1:00.0", "1:00:00.0"]
