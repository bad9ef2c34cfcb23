"""`recognise` with the plain CLIP on tiny made videos: learning, protocols, kills, lists, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data.classes import ClassSet, read_classes
from moviola.data.media_set import file_stream
from moviola.types import Clip, Recipe, Refusal, UsageError
from moviola.verbs import recognise as verb
from moviola.verbs.classify import classify
from moviola.verbs.evaluate import evaluate_zero_shot
from moviola.verbs.load import load
from moviola.verbs.recognise import recognise, recognition_of
from moviola.verbs.recognise_data import halves, mirrors_badly
from tests.verbs.colour_clip import TOKENIZER, colour_model, picture, video

CLASSES = {"red thing": ("red", "black"), "blue thing": ("blue", "white"), "green thing": ("green", "cyan")}
CONFIG = ClipConfig(
    32,
    VitConfig(image_size=16, patch_size=8, width=32, layers=1, heads=2),
    TextConfig(context_length=32, vocab_size=TOKENIZER.size, width=32, layers=1, heads=2),
)
QUICK: dict[str, Any] = {"objective": "clip", "views": (1, 1), "batch_size": 3, "steps": 2, "device": "cpu"}


def tiny() -> Model:
    torch.manual_seed(3)
    recipe = Recipe(size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, context_length=32)
    return Model(
        CLIP(CONFIG), config=CONFIG.to_json(), recipe=recipe, tokenizer=TOKENIZER, name="tiny", device="cpu"
    )


def clips(root: Path, classes: dict[str, tuple[str, ...]], count: int) -> Path:
    for name, colours in classes.items():
        for n in range(count):
            video(root / name / f"{n}.mp4", *[(colour, 0.4 + 0.1 * n) for colour in colours])
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return clips(tmp_path / "data", CLASSES, 4)


# --------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------


def test_it_learns_and_is_measured(folder: Path, tmp_path: Path) -> None:
    base = tiny()
    kept = {name: tensor.clone() for name, tensor in base.module.state_dict().items()}
    report = recognise(
        folder, tmp_path / "run", objective="clip", init=base, steps=20, batch_size=6, lr=3e-3, views=(2, 3),
        device="cpu", options={"mixup": 0.0, "cutmix": 0.0}, held_out=0.25,
    )  # fmt: skip
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.module.state_dict().items())
    assert (report.learned_from, report.measured_on, report.steps) == (9, 3, 20)
    assert report.after["top-1"] == 100
    assert report.before["top-1"] < 100
    assert set(report.after) == {"top-1", "mean per class"}
    assert report.per_class == dict.fromkeys(sorted(CLASSES), 100.0)
    assert set(report.per_class_before) == set(CLASSES)
    assert report.losses["class"] < 1.0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "run.json", "model", "metrics.jsonl", "measured.json", "checkpoint.pt"
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"] == "recognition"
    told = report.to_json()
    assert json.loads(json.dumps(told)) == told
    assert "top-1:" in str(report)

    made = load(tmp_path / "run" / "model", device="cpu")
    assert (made.system, made.name) == ("clip", "tiny trained by clip")
    assert made.classes == sorted(CLASSES)
    one = classify(made, folder / "blue thing" / "3.mp4", templates="a photo of a {}.", frames=8)
    assert one.results[0].best.name == "blue thing"


def test_figures_are_those_of_evaluation(folder: Path, tmp_path: Path) -> None:
    """With one view, before is zero-shot evaluation of the base and after that of the saved model."""
    other = clips(tmp_path / "other", CLASSES, 5)
    report = recognise(folder, tmp_path / "run", init=tiny(), test=other, **{**QUICK, "lr": 1e-3})
    for model, told in (
        (tiny(), report.before),
        (load(tmp_path / "run" / "model", device="cpu"), report.after),
    ):
        found = evaluate_zero_shot(model, other, templates="a photo of a {}.", frames=8)
        assert told["top-1"] == pytest.approx(found.top1)
        assert told["mean per class"] == pytest.approx(found.mean_per_class)
    assert (report.learned_from, report.measured_on) == (12, 15)


def test_one_step_is_the_objectives_gradient(folder: Path, tmp_path: Path) -> None:
    """Only what the objective says trains; frozen weights come out as they went in."""
    recognise(folder, tmp_path / "run", init=tiny(), options={"train": "visual."}, **{**QUICK, "lr": 1e-3})
    before, after = (
        tiny().module.state_dict(),
        load(tmp_path / "run" / "model", device="cpu").module.state_dict(),
    )
    for name, tensor in before.items():
        moved = not torch.equal(tensor, after[name])
        assert moved == name.startswith("visual."), name


def test_shots(folder: Path, tmp_path: Path) -> None:
    report = recognise(folder, tmp_path / "run", init=tiny(), shots=1, **QUICK)
    assert (report.learned_from, report.measured_on) == (3, 9)
    report = recognise(folder, tmp_path / "run2", init=tiny(), shots=9, **QUICK)
    assert report.learned_from == 12
    assert any("fewer than 9" in note for note in report.notes)
    assert any("Nothing was left to measure on" in note for note in report.notes)
    assert report.before == report.after == {}


def test_folders_of_splits(folder: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    folder.rename(both / "train")
    clips(both / "val", CLASSES, 2)
    report = recognise(both, tmp_path / "run", init=tiny(), **QUICK)
    assert (report.learned_from, report.measured_on) == (12, 6)


def test_pictures_among_clips(folder: Path, tmp_path: Path) -> None:
    for n in range(3):
        picture(folder / "red thing" / f"p{n}.png", "red", "black")
    report = recognise(folder, tmp_path / "run", init=tiny(), **{**QUICK, "steps": 4})
    assert report.learned_from + report.measured_on == 15
    assert np.isfinite(report.losses["class"])


# --------------------------------------------------------------------------------------------------
# Base and new classes
# --------------------------------------------------------------------------------------------------


def test_halves_are_by_frequency(tmp_path: Path) -> None:
    counts = {"a": 2, "b": 5, "c": 5, "d": 1, "e": 3}
    media = [Clip(tmp_path / f"{name}{n}.mp4") for name, count in counts.items() for n in range(count)]
    ids = [str(one.path) for one in media]
    labels = [number for number, count in enumerate(counts.values()) for _ in range(count)]
    data = ClassSet(
        tmp_path, ids, file_stream(media, ids), [],
        classes=list(counts), labels=labels, split=None, skipped=[],
    )  # fmt: skip
    assert [half.tolist() for half in halves(data)] == [[1, 2, 4], [0, 3]]


def test_base_to_new(tmp_path: Path) -> None:
    names = {"red": ("red",), "blue": ("blue",), "green": ("green",), "white": ("white",)}
    data = clips(tmp_path / "data", {name: names[name] for name in ("red", "blue")}, 2)
    clips(data, {name: names[name] for name in ("green", "white")}, 3)
    other = clips(tmp_path / "other", names, 2)
    report = recognise(
        data, tmp_path / "run", init=tiny(), base_to_new=True, shots=2, test=other, templates="{}",
        **{**QUICK, "steps": 25, "lr": 2e-3, "options": {"mixup": 0.0, "cutmix": 0.0}},
    )  # fmt: skip
    assert report.classes == ("green", "white")
    assert (report.learned_from, report.measured_on) == (4, 8)
    assert report.after["base"] == 100
    assert set(report.after) == {"base", "new", "harmonic mean"}
    base, new = report.after["base"], report.after["new"]
    assert report.after["harmonic mean"] == pytest.approx(2 * base * new / (base + new) if base + new else 0)
    assert set(report.per_class) == set(names)
    made = load(tmp_path / "run" / "model", device="cpu")
    new_only = read_classes(other, names=["blue", "red"])
    assert report.after["new"] == pytest.approx(
        evaluate_zero_shot(made, new_only, templates="{}", frames=8).top1
    )


def test_base_to_new_needs_four_classes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two each at least, and there are 3"):
        recognise(folder, tmp_path / "run", init=tiny(), base_to_new=True, **QUICK)


# --------------------------------------------------------------------------------------------------
# Kills
# --------------------------------------------------------------------------------------------------


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = verb.run_loop

    def run(*args: Any, **kwargs: Any) -> None:
        loop(*args, **kwargs, stop_at=step)
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "run_loop", run)


def test_a_killed_run_goes_on_and_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "steps": 4, "lr": 1e-3}
    whole = recognise(folder, tmp_path / "whole", init=tiny(), **settings)
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            recognise(folder, tmp_path / "run", init=tiny(), **settings)
    assert not (tmp_path / "run" / "model").exists()
    again = recognise(folder, tmp_path / "run", init=tiny(), **settings)
    assert (again.before, again.after) == (whole.before, whole.after)
    assert again.per_class_before == whole.per_class_before
    one, two = (
        load(tmp_path / name / "model", device="cpu").module.state_dict() for name in ("whole", "run")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    once_more = recognise(folder, tmp_path / "run", init=tiny(), **settings)  # finished: nothing left to do
    assert (once_more.before, once_more.after) == (whole.before, whole.after)


def test_a_finished_run_is_measured_by_other_views(folder: Path, tmp_path: Path) -> None:
    other = clips(tmp_path / "other", CLASSES, 2)
    first = recognise(folder, tmp_path / "run", init=tiny(), test=other, **QUICK)
    more = clips(tmp_path / "more", CLASSES, 3)
    again = recognise(folder, tmp_path / "run", init=tiny(), test=more, **{**QUICK, "views": (2, 1)})
    assert (first.measured_on, again.measured_on) == (6, 9)
    assert again.before == {}  # the model as it started is gone
    assert "after" in str(again)


def test_other_settings_do_not_go_on_with_a_run(folder: Path, tmp_path: Path) -> None:
    recognise(folder, tmp_path / "run", init=tiny(), **QUICK)
    for changes in (
        {"steps": 3},
        {"lr": 1e-2},
        {"templates": "{}"},
        {"shots": 1},
        {"flip": 0.0},
        {"options": {"mixup": 0.1}},
    ):
        with pytest.raises(UsageError, match="another configuration"):
            recognise(folder, tmp_path / "run", init=tiny(), **{**QUICK, **changes})
    video(folder / "red thing" / "more.mp4", ("red", 1.0))
    with pytest.raises(UsageError, match="another configuration"):
        recognise(folder, tmp_path / "run", init=tiny(), **QUICK)


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    made = []
    for workers in (0, 1):
        to = tmp_path / f"run{workers}"
        recognise(folder, to, init=tiny(), workers=workers, **{**QUICK, "lr": 1e-3})
        made.append(load(to / "model", device="cpu").module.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# --------------------------------------------------------------------------------------------------
# Lists
# --------------------------------------------------------------------------------------------------


def test_a_list_as_released(folder: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in CLASSES:
        rows = [f"{n}.mp4 {mark}" for n, mark in enumerate("1122")]
        key = name.replace(" ", "_")
        (lists / f"{key}_test_split1.txt").write_text("\n".join(rows))
        (folder / name).rename(folder / key)
    report = recognise(lists, tmp_path / "run", init=tiny(), media_root=folder, **QUICK)
    assert report.classes == tuple(sorted(CLASSES))
    assert (report.learned_from, report.measured_on) == (6, 6)
    (folder / "red_thing" / "0.mp4").unlink()
    report = recognise(lists, tmp_path / "run2", init=tiny(), media_root=folder, **QUICK)
    assert [one.path for one in report.failed] == ["0.mp4"]


def test_numbered_lists_for_both(folder: Path, tmp_path: Path) -> None:
    names = sorted(CLASSES)
    for split, numbers in (("train", (0, 1)), ("val", (2, 3))):
        rows = [f"{name}/{n}.mp4 {label}" for label, name in enumerate(names) for n in numbers]
        (tmp_path / f"{split}.txt").write_text("\n".join(rows))
    options = {"init": tiny(), "media_root": folder, "test": tmp_path / "val.txt", **QUICK}
    report = recognise(tmp_path / "train.txt", tmp_path / "run", names=names, **options)
    assert (report.learned_from, report.measured_on) == (6, 6)
    with pytest.raises(UsageError, match=r"1 labels .* not among its 2 classes: 2\."):
        recognise(tmp_path / "train.txt", tmp_path / "run", names=names[:2], **options)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_classes_that_cannot_be_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names are given to more than one class: thing"):
        recognise(folder, tmp_path / "run", init=tiny(), names=["thing", "thing", "other"], **QUICK)
    with pytest.raises(UsageError, match="one class only"):
        recognise(folder, tmp_path / "run", init=tiny(), names=["red thing"], **QUICK)
    other = clips(tmp_path / "other", {"grey thing": ("black",), "red thing": ("red",)}, 1)
    with pytest.raises(UsageError, match="not among those to learn: grey thing"):
        recognise(folder, tmp_path / "run", init=tiny(), test=other, **QUICK)
    assert not (tmp_path / "run").exists()


def test_unreadable_clips(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (0, 1):
        (folder / "red thing" / f"{n}.mp4").write_bytes(b"no video")
    report = recognise(folder, tmp_path / "run", init=tiny(), shots=2, **QUICK)
    assert report.learned_from == 6  # their places went to others of the class
    assert {Path(one.path).name for one in report.failed} == {"0.mp4", "1.mp4"}
    for n in (2, 3):
        (folder / "red thing" / f"{n}.mp4").write_bytes(b"no video")
    with pytest.raises(UsageError, match=r"that can be read: red thing"):
        recognise(folder, tmp_path / "run2", init=tiny(), shots=2, **QUICK)


def test_a_clip_that_breaks_in_training_is_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = verb.run_loop

    def run(*args: Any, **kwargs: Any) -> None:
        (folder / "red thing" / "0.mp4").write_bytes(b"no video")
        loop(*args, **kwargs)

    monkeypatch.setattr(verb, "run_loop", run)
    other = clips(tmp_path / "other", CLASSES, 1)
    report = recognise(folder, tmp_path / "run", init=tiny(), test=other, **{**QUICK, "steps": 8})
    assert report.skipped == 2  # twice in eight steps of three out of twelve
    told = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert all("text file" in line["reason"] for line in told)


def test_videos_of_one_frame(folder: Path, tmp_path: Path) -> None:
    video(folder / "red thing" / "one.mp4", ("red", 0.1))
    report = recognise(folder, tmp_path / "run", init=tiny(), **{**QUICK, "steps": 4, "views": (4, 3)})
    assert report.learned_from + report.measured_on == 13
    assert not report.failed


def test_bad_settings(folder: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"options": {"magic": 1}}, "has no option magic"),
        ({"epochs": 1}, "epochs or steps"),
        ({"batch_size": 0}, "batch size"),
        ({"views": (0, 3)}, "at least one clip"),
        ({"templates": "clip"}, "no set of templates"),
        ({"crop_area": (0.0, 1.0)}, "area of a crop"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"objective": "no-such-system"}, "no system called"),
    ):
        with pytest.raises(UsageError, match=match):
            recognise(folder, tmp_path / "run", init=tiny(), **{**QUICK, **changes})
    with pytest.raises(Refusal, match="not trained to name classes"):
        recognise(folder, tmp_path / "run", init=tiny(), **{**QUICK, "objective": "cloob"})
    with pytest.raises(Refusal, match="no text tower"):
        recognise(folder, tmp_path / "run", init=colour_model(has_text=False), **QUICK)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        recognise(folder, tmp_path / "mine", init=tiny(), **QUICK)
    assert not (tmp_path / "run").exists()


def test_classes_that_say_a_side_are_not_mirrored(tmp_path: Path) -> None:
    assert mirrors_badly(["pushing from left to right", "leftovers", "turning right"]) == [
        "pushing from left to right", "turning right"
    ]  # fmt: skip
    data = clips(tmp_path / "data", {"moves left": ("red",), "moves right": ("blue",)}, 3)
    report = recognise(data, tmp_path / "run", init=tiny(), **{**QUICK, "batch_size": 2})
    assert any("not mirrored" in note for note in report.notes)


def test_objectives() -> None:
    assert recognition_of("clip")[0] == "clip"
    with pytest.raises(Refusal, match="These are: clip"):
        recognition_of("xpool")


def test_frames_are_the_systems_own_unless_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    made = verb.ClassClips

    def noting(*rest: Any, **options: Any) -> Any:
        seen.append(options["frames"])
        return made(*rest, **options)

    monkeypatch.setattr(verb, "ClassClips", noting)
    for name, frames in (("vifi-clip", None), ("clip", None), ("vifi-clip", 3)):
        recognise(
            folder, tmp_path / f"{name}-{frames}", init=tiny(), frames=frames, **{**QUICK, "objective": name}
        )
    assert seen == [16, 8, 3]
