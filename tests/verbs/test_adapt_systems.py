"""Every system that adapts by training, through the user's call: train, be killed, go on, save, load, use."""

from __future__ import annotations

import pytest
import torch

from moviola.systems.registry import all_systems, entry_module
from moviola.types import UsageError
from moviola.verbs import adapt_train
from moviola.verbs.adapt import adapt
from moviola.verbs.adapt_train import run_folder
from moviola.verbs.classify import classify
from moviola.verbs.load import load
from tests.verbs.colour_clip import picture, video

TRAINED = [s for s in all_systems() if getattr(getattr(entry_module(s), "ADAPTATION", None), "start", None)]
CLASSES = {"red thing": ("red",), "blue thing": ("blue", "blue", "white"), "green thing": ("green",)}


@pytest.fixture
def folder(tmp_path):
    for name, stripes in CLASSES.items():
        for n in range(4):
            picture(tmp_path / "data" / name / f"{n}.png", *stripes, size=(40, 30 + n))
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=TRAINED, ids=lambda system: system.slug)
def slug(request):
    return request.param.slug


def test_train_save_load_use(slug, folder, tmp_path):
    report = adapt(folder, tmp_path / "m", method=slug, shots=2, steps=2, batch_size=3)
    assert report.measured_on == 6
    assert (tmp_path / "m" / "metrics.jsonl").is_file()
    assert not run_folder(tmp_path / "m").exists()
    adapted = load(tmp_path / "m")
    assert adapted.system == slug
    assert adapted.classes == sorted(CLASSES)
    made = classify(adapted, folder)
    assert len(made.results) == 12
    clip = video(tmp_path / "v.mp4", ("red", 1.0))
    assert classify(adapted, clip).ok
    own = sum(t.numel() * t.element_size() for t in adapted.module.own_state().values())
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < own + 20_000


def test_a_killed_run_goes_on_and_ends_the_same(slug, folder, tmp_path, monkeypatch):
    whole = adapt(folder, tmp_path / "whole", method=slug, shots=2, steps=4, batch_size=3)
    train = adapt_train.train

    def killed(*args, **kwargs):
        train(*args, **kwargs, stop_at=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt_train, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        adapt(folder, tmp_path / "m", method=slug, shots=2, steps=4, batch_size=3)
    assert run_folder(tmp_path / "m").is_dir()
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(adapt_train, "train", train)
    again = adapt(folder, tmp_path / "m", method=slug, shots=2, steps=4, batch_size=3)
    assert again.after == whole.after
    one, two = load(tmp_path / "whole").module.own_state(), load(tmp_path / "m").module.own_state()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_settings_do_not_go_on_with_a_run(slug, folder, tmp_path, monkeypatch):
    train = adapt_train.train

    def killed(*args, **kwargs):
        train(*args, **kwargs, stop_at=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt_train, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        adapt(folder, tmp_path / "m", method=slug, shots=2, steps=4, batch_size=3)
    monkeypatch.setattr(adapt_train, "train", train)
    with pytest.raises(UsageError, match="another configuration"):
        adapt(folder, tmp_path / "m", method=slug, shots=2, steps=5, batch_size=3)


def test_bad_settings(slug, folder, tmp_path):
    for changes, match in (
        ({"options": {"magic": 1}}, "has no option magic"),
        ({"epochs": 1, "steps": 1}, "epochs or steps"),
        ({"batch_size": 0}, "batch size"),
    ):
        with pytest.raises(UsageError, match=match):
            adapt(folder, tmp_path / "m", method=slug, shots=2, **changes)
    video(folder / "red thing" / "v.mp4", ("red", 1.0))
    with pytest.raises(UsageError, match="is a video"):
        adapt(folder, tmp_path / "m", method=slug, steps=1, held_out=0)
