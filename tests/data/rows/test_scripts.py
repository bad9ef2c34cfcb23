"""`ScriptField`: segments of videos and the words that are spoken in each."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from moviola.clip.tokenizer import Tokenizer
from moviola.data.rows import PairData, check, open_rows
from moviola.data.rows.scripts import segment_texts, spoken_words, timed_words, words_of_cues
from moviola.media import Subtitle, write_video
from moviola.types import ClipBatch, FrameSpec, MediaError, Needs, Recipe, ScriptField, TimeSpan, UsageError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
TOKENIZER = Tokenizer.train([" ".join(WORDS), "a caption of all"] * 3, vocab_size=600, context_length=40)
RECIPE = Recipe(size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1))
RATE, SECONDS = 5, 12


def film(path: Path, seconds: float = SECONDS, **options: Any) -> Path:
    """A video whose grey says what time it is: from black to white in `SECONDS`."""
    times = np.arange(round(seconds * RATE)) / RATE
    shade = np.rint(255 * times / SECONDS).astype(np.uint8)[:, None, None, None]
    write_video(path, np.broadcast_to(shade, (len(times), 16, 16, 3)).copy(), rate=RATE, **options)
    return path


def stamp(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}".replace(".", ",")


def srt(path: Path, words: list[str] = WORDS, each: float = 1.0) -> None:
    cues = [
        f"{n + 1}\n{stamp(n * each)} --> {stamp((n + 1) * each)}\n{word}\n" for n, word in enumerate(words)
    ]
    path.write_text("\n".join(cues))


def data(*sources: Path, spec: FrameSpec | None = None, **options: Any) -> PairData:
    asked = ScriptField(**{"seconds": (1.0, 2.0), "gap": 0.5, **options})
    return PairData(
        open_rows(list(sources)),
        Needs((asked,)),
        recipe=RECIPE,
        tokenizer=TOKENIZER,
        frame_spec=spec or FrameSpec(8),
    )


def take(rows: PairData, *numbers: int, epoch: int = 0) -> dict[str, Any]:
    return rows.batch(np.array(numbers), seed=0, epoch=epoch, step=0)


def said(tokens_L: torch.Tensor) -> list[int]:
    """The numbers of the words in one text."""
    return [WORDS.index(word) for word in re.findall(r"[a-z]{3,}", _plain(tokens_L))]


def _plain(tokens_L: torch.Tensor) -> str:
    return re.sub(r"<\|.*?\|>", " ", TOKENIZER.decode(tokens_L.tolist()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        film(tmp_path / f"{name}.mp4")
        srt(tmp_path / f"{name}.srt")
    return tmp_path


def test_segments_are_in_order_and_frames_lie_in_their_span(folder: Path) -> None:
    rows = data(folder)
    firsts = []
    for epoch in range(6):
        batch = take(rows, 0, 1, epoch=epoch)
        clip: ClipBatch = batch["clip"]
        assert batch["script"].shape == (2, 4, 40)
        assert batch["script_mask"].all()
        assert batch["script_mask"].shape == (2, 4)
        assert clip.frames_BTCHW.shape == (2, 8, 3, 16, 16)
        assert clip.mask_BT.all()
        for row in range(2):
            spoken = [said(batch["script"][row, s]) for s in range(4)]
            # word n is said in the middle of second n: 1 or 2 a segment of 1 to 2 s, and none twice
            assert all(1 <= len(words) <= 2 for words in spoken)
            flat = list(chain(*spoken))
            assert flat == sorted(set(flat))
            times_T = clip.times_BT[row]
            assert (times_T.diff() > 0).all()
            assert times_T[0] > spoken[0][0] + 0.5 - 2.0 - 1 / RATE
            assert times_T[-1] < spoken[-1][-1] + 0.5 + 2.0
            shade_T = clip.frames_BTCHW[row, :, 0].mean((1, 2))
            torch.testing.assert_close(shade_T * SECONDS, times_T.float(), atol=0.2, rtol=0)
            firsts.append(spoken[0][0])
    assert len(set(firsts)) > 2  # another place in every epoch


def test_each_frame_is_of_its_part_of_the_span(folder: Path) -> None:
    """A fixed length and place: the whole video is the span, so the parts are known."""
    rows = data(folder, seconds=(2.7, 2.7), gap=0.4)  # 4 * 2.7 + 3 * 0.4 = 12
    seen = [take(rows, 0, epoch=epoch)["clip"].times_BT[0] for epoch in range(8)]
    for times_T in seen:
        assert ((times_T > torch.arange(8) * 1.5 - 1 / RATE) & (times_T < torch.arange(1, 9) * 1.5)).all()
    assert torch.stack(seen).std(0).min() > 0.1  # drawn, not the middles


def test_a_row_is_the_same_in_any_batch(folder: Path) -> None:
    rows = data(folder)
    alone, both = take(rows, 1), take(rows, 0, 1)
    assert torch.equal(alone["script"][0], both["script"][1])
    assert torch.equal(alone["clip"].frames_BTCHW[0], both["clip"].frames_BTCHW[1])


def test_a_short_video_is_taken_whole(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", 6)
    srt(tmp_path / "a.srt", WORDS[:6])
    batch = take(data(tmp_path, seconds=(3.0, 5.0), gap=0.4), 0)  # segments of (6 - 1.2) / 4 = 1.2 s
    # segments 0-1.2, 1.6-2.8, 3.2-4.4, 4.8-6: the words at 0.5, 2.5, 3.5 and 5.5 s
    assert [said(batch["script"][0, s]) for s in range(4)] == [[0], [2], [3], [5]]


def test_words_of_a_cue_are_spread_over_its_time() -> None:
    cues = [Subtitle(TimeSpan(2, 6), "one two\nthree four"), Subtitle(TimeSpan(1, 3), "before")]
    assert words_of_cues(cues) == [(2.0, "before"), (2.5, "one"), (3.5, "two"), (4.5, "three"), (5.5, "four")]


def test_a_word_on_the_edge_of_a_segment_is_outside() -> None:
    words = [(0.0, "a"), (0.5, "b"), (1.0, "c"), (1.25, "d"), (1.5, "e"), (2.0, "f"), (2.5, "g")]
    assert segment_texts(words, 0.0, 1.0, 0.5, 2) == ("b", "f")


def test_words_with_times_come_in_the_usual_forms() -> None:
    wanted = [(0.5, "hey"), (2.0, "you")]
    listed = [{"word": " you", "start": 1.5, "end": 2.5}, {"word": "hey", "start": 0, "end": 1}]
    assert timed_words(listed) == wanted
    assert timed_words({"words": listed}) == wanted
    assert timed_words({"subtitles": [{"word": "hey", "time": 0.5}, {"word": "you", "time": "2"}]}) == wanted
    for bad in ("hey", {"segments": []}, [{"word": "hey"}], ["hey"], [{"word": "x", "start": "nan"}]):
        with pytest.raises(ValueError, match=r"expected|finite"):
            timed_words(bad)


def test_the_nearest_words_are_taken(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", 2)
    srt(tmp_path / "a.de.srt", ["eins"])
    srt(tmp_path / "a.srt", ["one"])
    assert [word for _, word in spoken_words(tmp_path / "a.mp4")] == ["one"]
    (tmp_path / "a.words.json").write_text('[{"word": "uno", "start": 0.1}]')
    assert spoken_words(tmp_path / "a.mp4") == [(0.1, "uno")]
    (tmp_path / "a.words.json").write_text("not json")
    with pytest.raises(MediaError, match="words cannot be read"):
        spoken_words(tmp_path / "a.mp4")


def test_bytes_with_subtitles_inside_and_words_in_a_table(tmp_path: Path) -> None:
    cues = [
        Subtitle(TimeSpan(n, n + 1), word, language)
        for n, one in enumerate(WORDS)
        for word, language in ((one, "eng"), ("wort", "deu"))
    ]
    film(tmp_path / "a.mp4", subtitles=cues)
    film(tmp_path / "b.mp4")
    words = [{"word": word, "start": float(n), "end": n + 1.0} for n, word in enumerate(WORDS)]
    videos = [(tmp_path / f"{name}.mp4").read_bytes() for name in "abb"]
    table = pa.table({"video": videos, "words": [None, json.dumps(words), "[3]"]})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = data(tmp_path / "t.parquet")
    batch = take(rows, 0, 1)
    assert all(len(said(batch["script"][row, s])) in (1, 2) for row in range(2) for s in range(4))
    assert "column 'words'" in rows.unusable(np.array([2]))[0][1]


REASONS = {
    "no times": (lambda path: path.with_suffix(".srt").write_text("one two three"), "no line with times"),
    "no subtitles": (lambda path: None, "no words with times"),
    "a silence": (lambda path: srt(path.with_suffix(".srt"), WORDS[:3]), "one has no words"),
    "too short": (lambda path: (film(path, 1.4), srt(path.with_suffix(".srt"))), "too short for 4 segments"),
}


@pytest.mark.parametrize("name", REASONS)
def test_rows_that_cannot_be_used_say_why(tmp_path: Path, name: str) -> None:
    spoil, why = REASONS[name]
    spoil(film(tmp_path / "a.mp4"))
    rows = data(tmp_path)
    assert why in rows.unusable(np.array([0]))[0][1]
    with pytest.raises(UsageError, match=why):
        check(rows)


def test_a_caption_stands_in_where_that_is_asked_for(folder: Path) -> None:
    film(folder / "c.mp4")
    (folder / "c.txt").write_text("a caption\n")
    Image.new("RGB", (16, 16)).save(folder / "d.png")
    (folder / "d.txt").write_text("a caption of all")
    assert len(data(folder).unusable(np.arange(4))) == 2
    batch = take(data(folder, optional=True), 0, 2, 3)
    assert batch["script_mask"].tolist() == [[True] * 4, [True, False, False, False], [True] + [False] * 3]
    assert torch.equal(batch["script"][1, 0], torch.from_numpy(TOKENIZER(["a caption"]))[0])
    assert batch["clip"].frames_BTCHW.shape[:2] == (3, 8)
    middles = (torch.arange(8) + 0.5) * SECONDS / 8
    assert ((batch["clip"].times_BT[1] - middles).abs() <= 1 / RATE).all()
    assert not batch["clip"].frames_BTCHW[2].diff(dim=0).any()  # a picture stands still
    assert data(folder, optional=True).unusable(np.arange(4)) == []


@pytest.mark.parametrize(
    "options", [{"count": 1}, {"seconds": (3.0, 2.0)}, {"seconds": (0.0, 2.0)}, {"gap": -1.0}]
)
def test_scripts_that_cannot_be_meant(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="two or more segments"):
        data(folder, **options)


def test_a_table_without_videos(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="no column of videos"):
        data(tmp_path / "t.parquet")
