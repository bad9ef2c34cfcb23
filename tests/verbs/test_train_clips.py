"""`moviola.train` on videos: pairs of clips and texts, and clips without any words."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import moviola
from moviola.media import write_video
from moviola.types import Refusal, UsageError
from moviola.verbs.recognise import recognise

QUICK = {"steps": 2, "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Forty-four films of eight frames with a caption beside each."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for n in range(44):
        frames = np.full((8, 32, 32, 3), rng.integers(0, 255, 3), np.uint8) + rng.integers(
            0, 9, (8, 32, 32, 3)
        )
        write_video(folder / f"{n:02}.mp4", frames.astype(np.uint8), 4)
        (folder / f"{n:02}.txt").write_text(f"film number {n}\n")
    return folder


@pytest.fixture(scope="module")
def wordless(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordless")
    for film in sorted(videos.glob("*.mp4"))[:6]:
        (folder / film.name).write_bytes(film.read_bytes())
    return folder


def test_the_two_commands_of_frozen_in_time(videos, tmp_path):
    """One frame first, then more from the same weights; clips are held out to measure retrieval."""
    first = moviola.train(
        videos,
        tmp_path / "first",
        objective="frozen-in-time",
        model="frozen-small",
        options={"frames": 1},
        lr=1e-3,
        **QUICK,
    )
    assert first.held_out == 2
    assert set(first.after) == {"held-out R@1, clip to text", "held-out R@1, text to clip"}
    second = moviola.train(
        videos, tmp_path / "second", objective="frozen-in-time", init=tmp_path / "first", **QUICK
    )
    one, two = (moviola.load(made.folder, device="cpu").module.state_dict() for made in (first, second))
    name = "video_model.conv1.weight"
    assert one.keys() == two.keys()
    assert not torch.equal(one[name], two[name])
    torch.testing.assert_close(one[name], two[name], atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("objective", "model"), [("tiktok-videomae", "vmae-small"), ("sts-statistics", "sts-small")]
)
def test_clips_without_words(objective, model, wordless, tmp_path):
    """Pre-trained on clips alone, fine-tuned to name classes, then asked; words are refused."""
    made = moviola.train(wordless, tmp_path / "run", objective=objective, model=model, **QUICK)
    assert (made.pairs, made.held_out, made.after) == (6, 0, {})
    with pytest.raises(UsageError, match="the data needs captions"):
        moviola.train(wordless, tmp_path / "no", objective=objective, model=model, hold_out=2, **QUICK)
    for n, film in enumerate(sorted(wordless.glob("*.mp4"))):
        place = tmp_path / "data" / ("one", "two")[n % 2] / film.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(film.read_bytes())
    run = {"objective": objective, "views": (1, 1), "held_out": 0.34, "steps": 1, "batch_size": 2}
    report = recognise(tmp_path / "data", tmp_path / "named", init=tmp_path / "run", **run)
    assert report.classes == ("one", "two")
    assert set(report.after) == {"top-1", "mean per class"}
    named = moviola.load(tmp_path / "named", device="cpu")
    assert named.adaptation == "classifier"
    found = moviola.classify(named, tmp_path / "data")
    assert {one.best.name for one in found.results} <= {"one", "two"}
    with pytest.raises(Refusal, match="which cannot name classes that it never saw"):
        recognise(tmp_path / "data", tmp_path / "b", init=tmp_path / "run", base_to_new=True, **run)
    with pytest.raises(Refusal, match="trains a video encoder of its own"):
        recognise(tmp_path / "data", tmp_path / "c", **run)
    fresh = recognise(tmp_path / "data", tmp_path / "fresh", model=model, **run)
    assert fresh.steps == 1


def test_texts_that_only_the_objective_knows_are_held_out_too(tmp_path):
    """`caption_en` is no usual name of captions, but the objective asks for it."""
    rows = []
    for n in range(44):
        Image.new("RGB", (16, 16), (5 * n, 90, 200 - 4 * n)).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "caption_en": f"shade {n}", "caption_de": f"Farbe {n}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    made = moviola.train(tmp_path / "pairs.parquet", tmp_path / "run", objective="rs-m-clip", **QUICK)
    assert made.held_out == 2
    assert "held-out R@1, picture to text" in made.after
