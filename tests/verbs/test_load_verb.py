"""`load` dispatches by name, folder, file and system."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import moviola
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.tokenizer import Tokenizer
from moviola.types import CheckpointError, Refusal, StoreError, UsageError
from moviola.verbs.load import as_model, info, load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random CLIP saved as a native folder."""
    tokenizer = Tokenizer.train(["a red circle", "a blue square", "two dogs"], vocab_size=600)
    config = ClipConfig(
        embed_dim=16,
        vision=VitConfig(image_size=32, patch_size=16, width=16, layers=1, heads=2),
        text=TextConfig(vocab_size=tokenizer.size, width=16, layers=1, heads=2),
    )
    torch.manual_seed(0)
    model = Model(CLIP(config), config=config.to_json(), tokenizer=tokenizer, name="tiny", device="cpu")
    return model.save(tmp_path_factory.mktemp("model") / "tiny")


def test_a_native_folder_comes_back(tiny):
    model = load(tiny, device="cpu")
    assert (model.name, model.system, model.dim) == ("tiny", "clip", 16)
    assert as_model(model) is model


def test_a_system_starts_from_a_clip_and_comes_back_from_its_folder(tiny, tmp_path):
    model = load("xpool", init=tiny, device="cpu")
    assert (model.system, model.separable, model.base["name"]) == ("xpool", False, "tiny")
    again = load(model.save(tmp_path / "xpool"), device="cpu")
    assert (again.system, again.hash) == ("xpool", model.hash)
    frames = np.random.default_rng(0).normal(size=(3, 12, 16)).astype(np.float32)
    np.testing.assert_allclose(
        model.score("a red circle", frames), again.score("a red circle", frames), rtol=1e-5
    )


def test_searching_with_a_system_that_re_ranks(tiny, tmp_path):
    model = load("xpool", init=tiny, device="cpu")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    frames = np.zeros((30, 48, 48, 3), np.uint8)
    frames[15:, :, :, 1] = 200
    from moviola.media import write_video

    write_video(tmp_path / "green.mp4", frames, 10)
    report = moviola.index(tmp_path, tmp_path / "i", model=model)
    assert report.ok
    assert report.new == 3
    results = moviola.search(tmp_path / "i", "a red circle", model=model)
    assert results.measure == "model"
    assert [m.score for m in results] == sorted((m.score for m in results), reverse=True)


def test_a_slug_without_a_clip_says_how(tiny):
    with pytest.raises(UsageError, match="init='builtin'"):
        load("xpool")


def test_a_system_that_does_not_start_from_a_clip_refuses(tiny):
    with pytest.raises((Refusal, UsageError)):
        load("clip", init=tiny)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here"):
        load(tmp_path / "nothing-here")


def test_the_built_in_model_loads_offline():
    model = load(device="cpu")
    assert model.has_text
    assert model.separable
    vectors = model.embed_texts(["a photo of a dog", "a red circle"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert moviola.info()["hash"] == model.hash


@pytest.fixture
def bare(tiny, tmp_path):
    """An OpenAI .pt with its tokenizer elsewhere, and a picture."""
    torch.save(load(tiny, device="cpu").module.state_dict(), tmp_path / "tiny.pt")
    shutil.copyfile(tiny / "tokenizer.json", tmp_path / "words.json")
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "red.png")
    return tmp_path


def manifest_of(folder):
    return json.loads((folder / "i" / "moviola-index.json").read_text())


@pytest.mark.filterwarnings("ignore:.*QuickGELU")
def test_an_index_remembers_the_tokenizer_of_an_openai_file(bare, monkeypatch):
    i, words = bare / "i", bare / "words.json"
    monkeypatch.chdir(bare)
    report = moviola.index("red.png", i, model="tiny.pt", device="cpu", tokenizer="words.json")
    assert report.new == 1
    card = manifest_of(bare)["model"]
    assert card["tokenizer"] == str(words)
    assert card["recipe"]["tokenizer"] == Tokenizer.from_file(words).hash
    monkeypatch.chdir("/")
    expected = moviola.search(i, "a red circle", device="cpu", tokenizer=words)
    assert [m.score for m in moviola.search(i, "a red circle", device="cpu")] == [expected[0].score]
    assert moviola.index(bare / "red.png", i, device="cpu").unchanged == 1  # needs no words
    assert manifest_of(bare)["model"] == card
    # the model's file was moved: named again, it still takes the index's tokenizer
    (bare / "tiny.pt").rename(bare / "moved.pt")
    again = moviola.search(i, "a red circle", device="cpu", model=bare / "moved.pt")
    assert again[0].score == expected[0].score


@pytest.mark.filterwarnings("ignore:.*QuickGELU")
def test_a_tokenizer_that_is_gone_or_another_is_said(bare):
    i, words = bare / "i", bare / "words.json"
    moviola.index(bare / "red.png", i, model=bare / "tiny.pt", device="cpu", tokenizer=words)
    other = Tokenizer.train(["some other words", "two dogs"], vocab_size=600)
    other.save(bare)
    good = words.read_bytes()
    words.write_bytes((bare / "tokenizer.json").read_bytes())
    with pytest.raises(
        StoreError, match=r"words\.json has changed since.*expected [0-9a-f]{16}.*--tokenizer"
    ):
        moviola.search(i, "a red circle", device="cpu")
    assert len(moviola.search(i, image=bare / "red.png", device="cpu")) == 1  # needs no words
    with pytest.raises(StoreError, match=r"was made with the tokenizer.*words\.json.*the one given is"):
        moviola.search(i, "a red circle", device="cpu", tokenizer=bare / "tokenizer.json")
    with pytest.raises(StoreError, match="made with the model"):
        moviola.index(bare / "red.png", i, device="cpu", tokenizer=bare / "tokenizer.json")
    words.unlink()
    with pytest.raises(StoreError, match=r"the tokenizer .*words\.json, which is gone.*--tokenizer FILE"):
        moviola.search(i, "a red circle", device="cpu")
    # named once to `index`, its new place is remembered
    (bare / "place.json").write_bytes(good)
    assert moviola.index(bare / "red.png", i, device="cpu", tokenizer=bare / "place.json").unchanged == 1
    assert len(moviola.search(i, "a red circle", device="cpu")) == 1


@pytest.mark.filterwarnings("ignore:.*QuickGELU")
def test_manifests_of_before_and_indexes_without_a_tokenizer_can_be_asked(bare):
    i, words = bare / "i", bare / "words.json"
    moviola.index(bare / "red.png", i, model=bare / "tiny.pt", device="cpu", tokenizer=words)
    old = manifest_of(bare)
    del old["model"]["tokenizer"]
    (i / "moviola-index.json").write_text(json.dumps({**old, "format": 1}))
    assert len(moviola.search(i, "a red circle", device="cpu", tokenizer=words)) == 1
    with pytest.raises(CheckpointError, match="came without a tokenizer"):
        moviola.search(i, "a red circle", device="cpu")
    shutil.rmtree(i)
    moviola.index(bare / "red.png", i, model=bare / "tiny.pt", device="cpu")
    assert len(moviola.search(i, "a red circle", device="cpu", tokenizer=words)) == 1
    moviola.index(bare / "red.png", i, device="cpu", tokenizer=words)
    assert len(moviola.search(i, "a red circle", device="cpu")) == 1


def test_a_runs_folder_is_loaded_as_the_model_in_it(tmp_path):
    model = load("builtin", device="cpu")
    model.save(tmp_path / "run" / "model")
    assert load(tmp_path / "run").hash == model.hash
    assert info(tmp_path / "run")["hash"] == model.hash
