"""Caption files of observers in every form, captioners, and names of videos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moviola.data.observers import match_names, observe, of_frames, read_captions
from moviola.types import MediaError, UsageError
from tests.verbs.colour_clip import video

WANTED = {"v_a": ("A man runs.", "He stops."), "b": ("A dog.",)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "dense.json",
            json.dumps(
                {
                    "version": "1.0",
                    "results": {
                        "v_a": [
                            {"sentence": "A man runs.", "timestamp": [0, 1]},
                            {"sentence": "He stops.", "timestamp": [1, 2]},
                        ],
                        "b": [{"sentence": " A dog. ", "timestamp": [0, 1]}],
                        "nothing": [],
                    },
                }
            ),
        ),
        ("plain.json", json.dumps({"v_a": ["A man runs.", "He stops."], "b": "A dog.", "c": " "})),
        ("rows.json", json.dumps([{"id": name, "caption": [*said]} for name, said in WANTED.items()])),
        ("rows.jsonl", "\n".join(json.dumps({"video": v, "text": t}) for v in WANTED for t in WANTED[v])),
        ("rows.csv", "video,sentence\nv_a,A man runs.\nb,A dog.\nv_a,He stops.\n,lost\n"),
    ],
)  # fmt: skip
def test_every_form(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_captions(tmp_path / name) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"results": {}}', "holds no captions"),
        ("a.json", '{"a": 3}', "'a': expected sentences"),
        ("a.json", '{"a": [{"text": "x"}]}', 'with a "sentence"'),
        ("a.json", '"text"', "expected an object"),
        ("a.json", "{", "is no JSON"),
        ("a.csv", "video,colour\na,b\n", "no column that names itself captions"),
        ("a.txt", "hello", "not a table"),
    ],
)
def test_files_that_are_none(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        read_captions(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_captions(tmp_path / "none.json")


def test_names_are_matched_from_the_end():
    videos = [Path("/m/run/clip.mp4"), Path("/m/walk/clip.mp4"), Path("/m/v.1.avi"), Path("/m/x.mp4")]
    captions = {"run/clip": ["a"], "walk/clip.mp4": ["b"], "v_v.1": ["c"]}
    assert match_names(captions, videos) == {
        videos[0]: "run/clip",
        videos[1]: "walk/clip.mp4",
        videos[2]: "v_v.1",
    }
    with pytest.raises(UsageError, match=r"captions of 'clip' fit two videos.*by folder and file"):
        match_names({"clip": ["a"]}, videos)


def test_captioners_are_asked(tmp_path):
    video(tmp_path / "red.mp4", ("red", 1))
    (tmp_path / "bad.mp4").write_bytes(b"x")
    seen = []

    def describe(frames_THWC, times_T):
        seen.append((frames_THWC.shape[0], frames_THWC.dtype, len(times_T)))
        return [f"mean {int(frames_THWC[..., 0].mean() > 128)}"]

    skipped = []
    said = observe(
        of_frames(describe, frames=4),
        [tmp_path / "red.mp4", tmp_path / "bad.mp4"],
        on_skip=lambda path, why: skipped.append((path.name, why)),
    )
    assert said == {tmp_path / "red.mp4": ("mean 1",)}
    assert seen == [(4, np.dtype("uint8"), 4)]
    assert [name for name, _ in skipped] == ["bad.mp4"]


def test_a_captioner_may_say_nothing_or_one_sentence():
    def captioner(path):
        if path.stem == "bad":
            raise MediaError(path, "no frames")
        return "one sentence" if path.stem == "a" else ["", " "]

    skipped = []
    paths = [Path("a.mp4"), Path("b.mp4"), Path("bad.mp4")]
    said = observe(captioner, paths, on_skip=lambda path, why: skipped.append(why))
    assert said == {Path("a.mp4"): ("one sentence",)}
    assert skipped == ["no frames"]
