"""`compare`: the figures of each model alone, every video decoded once, the same items for all."""

from __future__ import annotations

import json

import pytest

import moviola
from moviola.media import video as video_module
from moviola.types import Clip, UsageError
from moviola.verbs.common import look_at, looks_at
from moviola.verbs.compare import compare
from moviola.verbs.evaluate import evaluate_zero_shot
from tests.verbs.colour_clip import picture, video

CLASSES = {"red": ("red", "white"), "blue": ("blue", "black"), "green": ("green", "cyan")}


@pytest.fixture(scope="module")
def models():
    return [moviola.load(device="cpu"), moviola.load("x-clip", init="builtin", device="cpu")]


@pytest.fixture
def clips(tmp_path):
    for name, colours in CLASSES.items():
        for n in range(2):
            video(tmp_path / "data" / name / f"{n}.mp4", *[(colour, 0.4 + 0.2 * n) for colour in colours])
    picture(tmp_path / "data" / "red" / "still.png", "red")
    return tmp_path / "data"


def test_figures_are_those_of_each_model_alone(models, clips):
    report = compare(models, clips, templates="a photo of {}.", frames=4)
    for model, told in zip(models, report.reports, strict=True):
        alone = evaluate_zero_shot(model, clips, templates="a photo of {}.", frames=4)
        assert told == alone
        assert told.n == 7
    told = report.to_json()
    assert json.loads(json.dumps(told)) == told
    assert [row[0] for row in report.rows()[1:]] == [model.name for model in models]


def test_a_video_is_decoded_once_for_all(models, clips, monkeypatch):
    opened = []
    reader = video_module.Reader

    def counting(path, *rest, **options):
        opened.append(path)
        return reader(path, *rest, **options)

    film = Clip(clips / "red" / "1.mp4")
    alone = [look_at(film, model, frames=5) for model in models]
    monkeypatch.setattr(video_module, "Reader", counting)
    together = looks_at(film, models, frames=5)
    pixels_read = len(opened)
    opened.clear()
    look_at(film, models[0], frames=5)
    assert pixels_read == len(opened) == 1
    for one, other in zip(alone, together, strict=True):
        assert (one.frames_THWC == other.frames_THWC).all()
        assert (one.times_T == other.times_T).all()


def test_what_one_cannot_read_is_left_out_for_all(models, clips):
    (clips / "blue" / "1.mp4").write_bytes(b"no film")
    report = compare(models, clips)
    assert [one.n for one in report.reports] == [6, 6]
    assert len(report.failed) == 1
    assert not report.ok
    assert "1.mp4" in str(report)


def test_one_model_is_refused(models, clips):
    with pytest.raises(UsageError, match="two models or more"):
        compare(models[:1], clips)
