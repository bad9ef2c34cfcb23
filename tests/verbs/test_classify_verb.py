"""`classify`: the right class, true probabilities, and refusals that say why."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moviola.types import Refusal, UsageError
from moviola.verbs.classify import NothingClassified, class_names, classify
from tests.verbs.colour_clip import COLOURS, colour_model, picture, video

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    picture(folder / "blue.png", "blue")
    picture(folder / "mostly.png", "red", "red", "green")
    video(folder / "clip.mp4", ("cyan", 2), ("yellow", 1))
    return folder


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("templates", [None, ["a photo of a {}.", "a picture showing {}"], "general"])
def test_the_right_class_of_pictures_and_videos(media: Path, separable: bool, templates: object) -> None:
    got = classify(colour_model(separable=separable), media / "blue.png", NAMES, templates=templates)
    assert got.results[0].best.name == "blue"
    if separable:
        got = classify(colour_model(), media, NAMES, templates=templates)
        best = {Path(one.file).name: one.best.name for one in got.results}
        assert best == {"blue.png": "blue", "mostly.png": "red", "clip.mp4": "cyan"}


def test_probabilities_are_the_softmax_of_scaled_cosines(media: Path) -> None:
    model = colour_model()
    got = classify(model, media / "blue.png", "blue, red", templates="{}")
    text_CD = model.embed_texts(["blue", "red"])
    blue, red = (10.0 * text_CD[:, NAMES.index("blue")]).tolist()
    wanted = math.exp(blue) / (math.exp(blue) + math.exp(red))
    assert got.results[0].best.probability == pytest.approx(wanted, rel=1e-5)
    assert sum(label.probability for label in got.results[0].labels) == pytest.approx(1)


def test_a_model_that_is_not_separable_decides_by_its_own_score(media: Path) -> None:
    """Its worst frame counts: both colours of the video are as bad as a third one."""
    got = classify(colour_model(separable=False), media / "clip.mp4", ["cyan", "yellow", "red"])
    (one,) = got.results
    assert one.kind == "video"
    assert [label.probability for label in one.labels] == pytest.approx([1 / 3] * 3, abs=1e-3)
    got = classify(colour_model(), media / "clip.mp4", ["cyan", "yellow", "red"])
    assert got.results[0].labels[-1].probability < 0.01


def test_k_and_order(media: Path) -> None:
    got = classify(colour_model(), media / "mostly.png", NAMES, k=2)
    assert [label.name for label in got.results[0].labels] == ["red", "green"]
    assert len(classify(colour_model(), media / "blue.png", NAMES, k=99).results[0].labels) == 8


def test_json_and_text(media: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"x")
    got = classify(colour_model(), [media / "blue.png", tmp_path / "bad.jpg"], "red, blue")
    data = got.to_json()
    assert data["results"][0]["classes"][0]["name"] == "blue"
    assert data["failed"][0]["file"].endswith("bad.jpg")
    assert data["ok"] is False
    assert "blue 100.0%" in str(got)
    assert "1 could not be read" in str(got)


def test_cut_prompts_are_noted(media: Path) -> None:
    long = "red " + "thing " * 40
    with pytest.raises(UsageError, match="context holds 32"):
        classify(colour_model(), media / "blue.png", ["blue", long])
    got = classify(colour_model(), media / "blue.png", ["blue", long], truncate=True)
    assert "1 texts were cut" in got.notes[0]


def test_one_class_is_said_to_mean_nothing(media: Path) -> None:
    got = classify(colour_model(), media / "blue.png", ["red"])
    assert got.results[0].best.probability == 1.0
    assert "only one class" in str(got)


def test_classes_of_the_model_and_of_a_file(media: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red\nblue\n\n")
    assert classify(colour_model(), media / "blue.png", tmp_path / "classes.txt").classes == ("red", "blue")
    model = colour_model()
    model.classes = ["blue", "green"]
    assert classify(model, media / "blue.png").classes == ("blue", "green")
    with pytest.raises(UsageError, match="stores no class names"):
        classify(colour_model(), media / "blue.png")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("red,,blue", "Class 2 of 3 has an empty name"),
        (["red", ""], "empty name"),
        ("red, blue, red", "named twice: red"),
        ("", "no classes"),
        ([], "no classes"),
    ],
)
def test_class_names_that_cannot_be_meant(classes: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        class_names(classes)  # type: ignore[arg-type]


def test_other_errors(media: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs \{\}"):
        classify(colour_model(), media, NAMES, templates=["a photo"])
    with pytest.raises(UsageError, match="k must be at least 1"):
        classify(colour_model(), media, NAMES, k=0)
    with pytest.raises(Refusal, match="no text tower"):
        classify(colour_model(has_text=False), media, NAMES)
    with pytest.raises(UsageError, match="does not know 8 of the 8 classes"):
        classify(colour_model(adaptation="classifier"), media, NAMES)
    with pytest.raises(UsageError, match="reads no templates"):
        classify(colour_model(adaptation="classifier"), media, NAMES, templates="simple")
    with pytest.raises(NothingClassified, match="no pictures or videos"):
        classify(colour_model(), tmp_path, NAMES)
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(NothingClassified, match="none of the 1 files"):
        classify(colour_model(), tmp_path, NAMES)
