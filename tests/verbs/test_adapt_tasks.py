"""`adapt_tasks` on small pictures: every method, kills, what lies in the folder, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import moviola
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data.classes import read_classes
from moviola.metrics.continual import average_accuracy, backward_transfer
from moviola.systems.adaptation.vr_lwf import ADAPTATION
from moviola.types import Refusal, UsageError
from moviola.verbs.adapt_tasks import adapt_tasks, read_tasks, relabelled, task_groups
from tests.verbs.colour_clip import COLOURS, TOKENIZER, colour_model

NAMES = ("black", "blue", "green", "red", "white", "yellow")
METHODS = ("vr-lwf", "imm", "a-gem", "rkr")  # those with something of their own to resume
FAST = {"shots": 6, "steps": 4, "batch_size": 6, "lr": 1e-3, "device": "cpu", "cache": None}


def tiny(seed=0):
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    text = TextConfig(context_length=32, vocab_size=TOKENIZER.size, width=16, layers=1, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = CLIP(ClipConfig(16, vision, text))
    return Model(module, config=module.config.to_json(), tokenizer=TOKENIZER, name="tiny", device="cpu")


def write(root, names, count, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for n in range(count):
            noise = rng.normal(0, 12, (20, 20, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{n}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write(tmp_path_factory.mktemp("photos"), NAMES, 10)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write(tmp_path_factory.mktemp("others"), ("cyan", "magenta"), 5, seed=1)


def weights(folder):
    return moviola.load(folder / "model", device="cpu").module.state_dict()


def test_three_tasks_a_report_and_a_plain_model(photos, others, tmp_path):
    base = tiny()
    start = {name: t.clone() for name, t in base.module.state_dict().items()}
    before = torch.get_rng_state()
    report = adapt_tasks(photos, tmp_path / "run", model=base, tasks=3, unrelated=others, **FAST)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, start[name]) for name, t in base.module.state_dict().items())
    assert report.tasks == (("black", "blue"), ("green", "red"), ("white", "yellow"))
    assert report.learned_from == (12, 12, 12)
    assert report.measured_on == 24
    assert np.array(report.matrix).shape == (3, 3)
    assert len(report.unrelated) == 4
    assert report.average[1] == average_accuracy(report.matrix, 1)
    assert report.transfer[2] == backward_transfer(report.matrix, 2)
    told = json.loads((tmp_path / "run" / "report.json").read_text())
    assert told["matrix"] == [[round(value, 4) for value in row] for row in report.matrix]
    assert told["mean_of_tasks_and_unrelated"] == pytest.approx(report.both, abs=1e-4)
    assert "Task 2 (green, red)" in str(report)
    assert "backward transfer" in str(report)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "model",
        "run",
        "run.json",
        "report.json",
        "matrix.png",
    }
    assert not list(folder.glob("run/task-*/checkpoint.pt"))
    assert [path.parent.name for path in folder.glob("run/task-*/after.safetensors")] == ["task-3"]
    # a plain CLIP for every other verb, whose figures are the report's
    made = moviola.load(folder / "model", device="cpu")
    assert (made.system, made.base["hash"], made.base["name"]) == ("clip", base.hash, "tiny")
    assert any(not torch.equal(t, start[name]) for name, t in made.module.state_dict().items())
    zero_shot = moviola.evaluate_zero_shot(made, others)
    assert zero_shot.top1 == pytest.approx(report.unrelated[-1])
    assert moviola.evaluate_zero_shot(base, others).top1 == pytest.approx(report.unrelated[0])


def test_learning_raises_the_accuracy_of_a_task(photos, tmp_path):
    settings = {**FAST, "steps": 60, "lr": 3e-3, "flip": 0.0}
    report = adapt_tasks(photos, tmp_path / "run", model=tiny(), method="fine-tune", tasks=1, **settings)
    assert report.average[0] > report.before[0] + 30
    assert report.unrelated == ()
    assert any("not measured" in note for note in report.notes)


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_call_ends_where_an_uninterrupted_one_does(photos, tmp_path, method):
    """Killed inside the second task, and once more right after it."""
    settings = {**FAST, "tasks": 2, "method": method, "model": tiny()}
    whole = adapt_tasks(photos, tmp_path / "whole", **settings)
    for stop in (6, 8):

        def kill(done, total, note="", stop=stop):
            if done >= stop:
                raise Killed

        with pytest.raises(Killed):
            adapt_tasks(photos, tmp_path / "killed", on_progress=kill, **settings)
        assert (tmp_path / "killed" / "run" / "task-1" / "done.json").is_file()
        assert not (tmp_path / "killed" / "model").exists()
    again = adapt_tasks(photos, tmp_path / "killed", **settings)
    assert again.matrix == whole.matrix
    assert again.before == whole.before
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name
    # a call for what is done already learns nothing more
    steps = []
    once_more = adapt_tasks(
        photos, tmp_path / "killed", on_progress=lambda *told, **note: steps.append(told), **settings
    )
    assert once_more.matrix == whole.matrix
    assert steps == []


def test_another_call_does_not_go_on_in_the_same_folder(photos, tmp_path):
    adapt_tasks(photos, tmp_path / "run", model=tiny(), tasks=2, **FAST)
    for change in ({"lr": 2e-3}, {"method": "lwf"}, {"tasks": 3}, {"seed": 1}, {"options": {"alpha": 1.0}}):
        with pytest.raises(UsageError, match="another configuration"):
            adapt_tasks(photos, tmp_path / "run", model=tiny(), **{**FAST, "tasks": 2, **change})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="other files"):
        adapt_tasks(photos, tmp_path / "mine", model=tiny(), tasks=2, **FAST)


def test_tasks_by_name_in_any_order_and_what_is_left_out(photos, tmp_path):
    groups = [["yellow", "blue"], ["red"]]
    report = adapt_tasks(
        photos,
        tmp_path / "run",
        model=tiny(),
        tasks=groups,
        templates=["a photo of a {}", "thing {}"],
        **FAST,
    )
    assert report.tasks == (("yellow", "blue"), ("red",))
    assert report.learned_from == (12, 6)
    assert report.measured_on == 12
    assert any("3 of 6 classes are in no task" in note for note in report.notes)
    data = read_classes(photos)
    made = relabelled(data, groups)
    assert made.classes == ("yellow", "blue", "red")
    assert {data.classes[old] for old, new in zip(data.labels_N, made.labels_N, strict=True) if new == 1} == {
        "blue"
    }


def test_every_method_is_there_by_name(photos, tmp_path):
    assert set(METHODS) < set(ADAPTATION.sequence)
    for method in set(ADAPTATION.sequence) - set(METHODS):
        report = adapt_tasks(photos, tmp_path / method, model=tiny(), method=method, tasks=2, **FAST)
        assert report.method == method
        assert report.matrix


def test_tasks_as_they_are_typed(photos):
    assert read_tasks(" 5 ") == 5
    assert read_tasks("red, blue;green") == [["red", "blue"], ["green"]]
    for text, said in (
        ("red, blue;", "at least one class"),
        ("", "at least one class"),
        ("-1", "not there: -1"),
    ):
        with pytest.raises(UsageError, match=said):
            task_groups(read_classes(photos), read_tasks(text))


def test_pictures_that_cannot_be_read_are_left_out(tmp_path):
    root = write(tmp_path / "photos", ("blue", "red"), 8)
    for n in range(3):
        (root / "red" / f"{n}.png").write_bytes(b"no picture")
    report = adapt_tasks(root, tmp_path / "run", model=tiny(), tasks=[["blue"], ["red"]], **FAST)
    assert len(report.failed) == 3
    assert sum(report.learned_from) + report.measured_on <= 16
    for n in range(3, 8):
        (root / "red" / f"{n}.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="red"):
        adapt_tasks(root, tmp_path / "other", model=tiny(), tasks=[["blue"], ["red"]], **FAST)


def groups_of(*tasks):
    return lambda photos, to: adapt_tasks(photos, to, model=tiny(), tasks=list(tasks), **FAST)


def call(**settings):
    return lambda photos, to: adapt_tasks(photos, to, **{"model": tiny(), "tasks": 2, **FAST, **settings})


BAD = {
    "not divisible": (call(tasks=4), "cannot be shared evenly"),
    "no task": (call(tasks=0), "cannot be shared evenly"),
    "a class repeated": (groups_of(["red", "blue"], ["green", "red"]), "repeat classes: red"),
    "an empty task": (groups_of(["red", "blue"], []), "at least one class"),
    "no such class": (groups_of(["red", "pink"]), "not there: pink"),
    "one class": (groups_of(["red"]), "one class only"),
    "no such option": (call(options={"beta": 1}), "no option beta"),
    "alpha below 0": (call(options={"alpha": -1.0}), "alpha"),
    "one sentence": (call(options={"n_pseudo": 1}), "at least 2"),
    "no such method": (call(method="magic"), "no method"),
    "another kind of method": (call(method="linear-probe"), "one task after the other"),
    "nothing left to measure": (call(shots=10), "No picture is left"),
    "epochs and steps": (call(epochs=1), "not both"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, photos, tmp_path):
    run, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        run(photos, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_models_that_cannot_be_trained_as_a_whole_are_refused(photos, tmp_path):
    with pytest.raises(Refusal, match="pair of towers"):
        adapt_tasks(photos, tmp_path / "run", model=colour_model(separable=False), tasks=2, **FAST)
    half = moviola.load("builtin", device="cpu", dtype="bfloat16")
    with pytest.raises(UsageError, match="float32"):
        adapt_tasks(photos, tmp_path / "run", model=half, tasks=2, **FAST)


def test_names_given_to_two_classes(photos):
    data = read_classes(photos, names={name: "thing" if name in ("red", "blue") else name for name in NAMES})
    with pytest.raises(UsageError, match="more than one class: thing"):
        task_groups(data, 2)
