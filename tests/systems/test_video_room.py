"""Every video encoder of the house is indexed and searched through its own `FrameSpec`, the same way."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from PIL import Image

import moviola
from moviola.media import write_video
from moviola.systems.registry import entry_class, entry_module
from moviola.systems.video import SYSTEMS

ENCODERS = [system for system in SYSTEMS if hasattr(entry_class(system), "encode_video")]
HEADS = {"mug-stan": ("mean", "mug")}
ASKED = [(system, head) for system in ENCODERS for head in HEADS.get(system.slug, (None,))]


def started(system, head=None):
    """The built-in CLIP as this encoder, or a new small model where it cannot start from a CLIP."""
    if hasattr(entry_class(system), "from_clip"):
        model = moviola.load(system.slug, init="builtin", device="cpu")
        if head is not None:
            model.module.use_head(head)
        return model
    from moviola.verbs.train_start import new_model

    training = entry_module(system).TRAINING
    preset = next(name for name in training.presets if name.endswith("small"))
    return new_model(preset, system.slug, training, None)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A film of two scenes, a film of one frame, and a picture."""
    folder = tmp_path_factory.mktemp("room") / "media"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 20, (40, 64, 64, 3), np.uint8)
    scenes = [np.full((20, 64, 64, 3), colour, np.uint8) for colour in ((200, 30, 30), (30, 200, 30))]
    frames = np.concatenate(scenes) + noise
    write_video(folder / "two.mp4", frames, 4)
    write_video(folder / "one.mp4", frames[:1], 4)
    Image.fromarray(frames[0]).save(folder / "still.png")
    return folder


def asked(index, model, folder):
    """What is found by words, or by a picture where the encoder has none."""
    if model.has_text:
        return moviola.search(index, "a red wall", model=model, k=5)
    return moviola.search(index, image=folder / "still.png", model=model, k=5)


@pytest.mark.parametrize(("system", "head"), ASKED, ids=[f"{s.slug}-{h}" if h else s.slug for s, h in ASKED])
def test_index_and_search(system, head, media, tmp_path):
    model = started(system, head)
    report = moviola.index(media, tmp_path / "index", model=model)
    assert report.ok
    assert report.units >= 3
    found = asked(tmp_path / "index", model, media)
    assert {moment.file.rpartition("/")[2] for moment in found} == {"two.mp4", "one.mp4", "still.png"}
    assert all(math.isfinite(moment.score) for moment in found)


@pytest.mark.parametrize("system", ENCODERS, ids=lambda system: system.slug)
def test_a_real_video(system, shared_dir, tmp_path):
    source = shared_dir / "data" / "videos" / "arm_wrestling.mp4"
    if not source.is_file():
        pytest.skip("the shared data has no such video")
    (tmp_path / "media").mkdir()
    shutil.copy(source, tmp_path / "media")
    model = started(system)
    report = moviola.index(tmp_path / "media", tmp_path / "index", model=model)
    assert report.ok
    Image.new("RGB", (64, 64), "red").save(tmp_path / "still.png")
    found = asked(tmp_path / "index", model, tmp_path)
    assert found.moments
    assert all(moment.span.end > moment.span.start for moment in found)
