"""`moviola adapt` with methods on frozen vectors; systems that train have tests of their own."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from moviola.cli import main
from moviola.types import CheckpointError, Refusal, UsageError
from moviola.verbs.adapt import adapt
from moviola.verbs.classify import classify
from moviola.verbs.embed import embed
from moviola.verbs.evaluate import evaluate_zero_shot
from moviola.verbs.index import index
from moviola.verbs.load import load
from tests.verbs.colour_clip import COLOURS, colour_model, picture, video

FLAGS = {"ivory": ("white", "green", "white"), "coral": ("red", "white"), "night": ("black", "blue")}
"""Classes whose names say nothing to the model, so that only their pictures can."""


@pytest.fixture
def flags(tmp_path):
    root = tmp_path / "flags"
    for name, stripes in FLAGS.items():
        for n in range(6):
            picture(root / name / f"{n}.png", *stripes, size=(24, 20 + 3 * n))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", ["linear-probe", "nearest-mean", "gda-clip"])
def test_a_classifier_of_the_users_classes(method, flags, tmp_path):
    base = colour_model()
    report = adapt(flags, tmp_path / "model", method=method, model=base, shots=2)
    assert report.after["top-1"] == 100
    assert report.before["top-1"] < 100
    assert (report.learned_from, report.measured_on) == (6, 12)
    assert report.kind == "classifier"
    assert json.loads((tmp_path / "model" / "adapt.json").read_text()) == report.to_json()

    adapted = load(tmp_path / "model", base=base)
    assert adapted.classes == sorted(FLAGS)
    new = picture(tmp_path / "new.png", "black", "blue", size=(30, 60))
    assert classify(adapted, new).results[0].best.name == "night"
    assert evaluate_zero_shot(adapted, flags).top1 == 100
    assert evaluate_zero_shot(adapted, flags).task == "classification"
    some = classify(adapted, new, ["coral", "ivory"])
    assert {label.name for label in some.results[0].labels} == {"coral", "ivory"}
    clip = video(tmp_path / "v.mp4", ("black", 0.5), ("blue", 0.5))
    assert classify(adapted, clip).results[0].best.name == "night"


def test_only_what_is_new_is_saved_and_the_base_is_checked(flags, tmp_path):
    base = colour_model()
    adapt(flags, tmp_path / "model", method="nearest-mean", model=base)
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"moviola.json", "model.safetensors", "adapt.json"}
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 1000
    other = colour_model()
    other.hash = "0" * 16
    with pytest.raises(CheckpointError, match=r"adapted from 'colours' \(hash .*has the hash 0000"):
        load(tmp_path / "model", base=other)
    with pytest.raises(CheckpointError, match="which cannot be loaded"):
        load(tmp_path / "model", base=tmp_path / "gone")


def test_the_base_is_found_where_it_was_or_moved_along(flags, tmp_path):
    (tmp_path / "a").mkdir()
    load("builtin", device="cpu").save(tmp_path / "a" / "base")
    adapt(flags, tmp_path / "a" / "model", method="nearest-mean", model=tmp_path / "a" / "base", shots=1)
    new = picture(tmp_path / "new.png", "black", "blue")
    before = classify(load(tmp_path / "a" / "model"), new)
    (tmp_path / "a").rename(tmp_path / "b")
    assert classify(load(tmp_path / "b" / "model"), new).results == before.results


def test_search_and_embed_refuse_a_classifier(flags, tmp_path):
    adapt(flags, tmp_path / "model", method="nearest-mean", model="builtin", shots=1)
    for verb in (
        lambda: index(flags, tmp_path / "i", model=tmp_path / "model"),
        lambda: embed(flags, to=tmp_path / "v.npy", model=tmp_path / "model"),
    ):
        with pytest.raises(Refusal, match="only adds a classifier"):
            verb()
    with pytest.raises(Refusal, match="is a classifier already"):
        adapt(flags, tmp_path / "again", method="nearest-mean", model=tmp_path / "model")


def test_vectors_are_computed_once(flags, tmp_path):
    base = colour_model()
    adapt(flags, tmp_path / "a", method="nearest-mean", model=base, shots=1)
    seen = base.module.seen
    assert seen == 18
    adapt(flags, tmp_path / "b", method="linear-probe", model=base, shots=3)
    assert base.module.seen == seen
    adapt(flags, tmp_path / "b", method="linear-probe", model=base, shots=3, cache=None)
    assert base.module.seen == 2 * seen


def test_damaged_pictures_give_their_place_to_others(flags, tmp_path):
    for n in range(4):
        (flags / "coral" / f"{n}.png").write_bytes(b"no picture")
    report = adapt(flags, tmp_path / "model", method="nearest-mean", model=colour_model(), shots=2)
    assert len(report.failed) == 4
    assert report.learned_from == 6
    assert report.measured_on == 8
    for n in (4, 5):
        (flags / "coral" / f"{n}.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="no item that can be read: coral"):
        adapt(flags, tmp_path / "model2", method="nearest-mean", model=colour_model(), shots=2)
    assert not (tmp_path / "model2").exists()


def test_another_set_to_measure_on(flags, tmp_path):
    other = tmp_path / "other"
    for n in range(3):
        picture(other / "night" / f"{n}.png", "blue", "black", size=(30, 40))
    report = adapt(flags, tmp_path / "m", method="nearest-mean", model=colour_model(), test=other)
    assert (report.learned_from, report.measured_on) == (18, 3)
    assert report.after["top-1"] == 100
    picture(other / "dawn" / "0.png", "red")
    with pytest.raises(UsageError, match="not among those to learn: dawn"):
        adapt(flags, tmp_path / "m", method="nearest-mean", model=colour_model(), test=other)


def test_a_class_with_one_picture_and_more_shots_than_pictures(flags, tmp_path):
    picture(flags / "lone" / "0.png", "magenta", "cyan")
    report = adapt(flags, tmp_path / "m", method="nearest-mean", model=colour_model(), shots=4)
    assert "1 of 4 classes have fewer than 4 items, and all of theirs were used: lone." in report.notes
    assert any("one item only" in note for note in report.notes)


def test_a_model_without_words(flags, tmp_path):
    base = colour_model(has_text=False)
    report = adapt(flags, tmp_path / "m", method="linear-probe", model=base, shots=2)
    assert report.before == {}
    assert report.after["top-1"] == 100
    assert classify(load(tmp_path / "m", base=base), flags / "night").ok


def test_random_crops_instead_of_the_picture(flags, tmp_path):
    base = colour_model()
    made = {}
    for name in ("one", "two"):
        report = adapt(
            flags, tmp_path / name, method="gda-clip", model=base, shots=2, passes=3, crop_area=(0.5, 1)
        )
        assert report.learned_from == 6
        assert report.after["top-1"] > 80
        made[name] = load(tmp_path / name, base=base).module.own_state()["weight_DC"]
    assert torch.equal(made["one"], made["two"])
    adapt(flags, tmp_path / "plain", method="gda-clip", model=base, shots=2)
    assert not torch.equal(load(tmp_path / "plain", base=base).module.own_state()["weight_DC"], made["one"])


def test_classes_without_pictures(flags, tmp_path):
    """Words alone make two colours classes beside the flags."""
    base = colour_model()
    report = adapt(flags, tmp_path / "m", method="gda-clip", model=base, shots=4, new_classes="magenta, cyan")
    assert report.classes == (*sorted(FLAGS), "magenta", "cyan")
    assert any("known by name alone" in note for note in report.notes)
    adapted = load(tmp_path / "m", base=base)
    assert classify(adapted, picture(tmp_path / "c.png", "cyan")).results[0].best.name == "cyan"
    for method, names, match in (
        ("gda-clip", "night", "have pictures already: night"),
        ("nearest-mean", "cyan", "cannot take in classes"),
    ):
        with pytest.raises(UsageError, match=match):
            adapt(flags, tmp_path / "n", method=method, model=base, new_classes=names)


def test_without_labels(tmp_path):
    heap = tmp_path / "heap"
    for n in range(30):
        picture(heap / f"{n}.png", ("red", "green", "blue")[n % 3], "white", size=(24, 20 + n))
    test = tmp_path / "test"
    for colour in ("red", "green", "blue"):
        picture(test / colour / "0.png", colour, "white")
    base = colour_model()
    asked = {"method": "gda-clip", "model": base, "unlabelled": True}
    report = adapt(heap, tmp_path / "m", names=["red", "green", "blue"], test=test, **asked)
    assert (report.learned_from, report.measured_on) == (30, 3)
    assert report.after["top-1"] == 100
    with pytest.raises(UsageError, match="no class names"):
        adapt(heap, tmp_path / "m", **asked)
    with pytest.raises(UsageError, match="needs labels"):
        adapt(heap, tmp_path / "m", names=["red", "blue"], **{**asked, "method": "nearest-mean"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no pictures or videos under"):
        adapt(tmp_path / "empty", tmp_path / "m", names=["red", "blue"], **asked)


def test_bad_input(flags, tmp_path):
    def attempt(match, error=UsageError, **changes):
        asked = {"method": "nearest-mean", "model": colour_model(), **changes}
        with pytest.raises(error, match=match):
            adapt(asked.pop("data", flags), asked.pop("to", tmp_path / "m"), **asked)

    attempt("no method 'magic'", method="magic")
    attempt("does not adapt a model", Refusal, method="cloob")
    attempt("has no option temperature", options={"temperature": 1})
    attempt("shots must be at least 1", shots=0)
    attempt("is there already and is no model", to=flags)
    attempt("no single vector per picture", Refusal, model=colour_model(separable=False))
    (flags / "hollow").mkdir()
    attempt("no item that can be read: hollow", shots=1)
    (flags / "hollow").rmdir()
    attempt("given to more than one class: flag", names=["flag", "flag", "night"])
    one = tmp_path / "one"
    picture(one / "cat" / "0.png", "red")
    attempt("one class only", data=one)


def test_the_caller_keeps_their_model(flags, tmp_path):
    base = colour_model()
    adapt(flags, tmp_path / "m", method="nearest-mean", model=base, shots=1)
    assert base.module.logit_scale.requires_grad
    assert base.classes is None


def test_command_line(flags, tmp_path, capsysbinary, monkeypatch):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["moviola", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsysbinary.readouterr().out.decode()

    made = run(
        "adapt",
        "--data",
        flags,
        "--to",
        tmp_path / "m",
        "--method",
        "linear-probe",
        "--shots",
        2,
        "--set",
        "penalty=0.01",
        "--json",
    )
    assert json.loads(made)["method"] == "linear-probe"
    assert "night" in run("classify", tmp_path / "m", flags / "night" / "0.png")


def test_table_of_bytes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": _png(stripes), "path": None}, "label": name}
        for name, stripes in FLAGS.items()
        for _ in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    report = adapt(
        tmp_path / "t.parquet", tmp_path / "m", method="nearest-mean", model=colour_model(), shots=1
    )
    assert report.after["top-1"] == 100


def _png(stripes):
    import io

    pixels = np.zeros((12, 12, 3), np.uint8)
    for place, columns in enumerate(np.array_split(np.arange(12), len(stripes))):
        pixels[:, columns] = COLOURS[stripes[place]]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
