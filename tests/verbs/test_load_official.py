"""`load` knows the authors' checkpoints by the names in them."""

from __future__ import annotations

import pytest
import torch

import moviola
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.formats.openai import infer_config
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.systems.registry import all_systems, entry_class, entry_module
from moviola.types import CheckpointError, UsageError

MARKED = [system for system in all_systems() if system.marks and system.slug not in ("dist", "vifi-clip")]
"""The files of those two hold more than the model's own names; they have tests of their own."""


def clip() -> CLIP:
    """Heads of 64, as released checkpoints have: their number is not in the weights."""
    torch.manual_seed(0)
    vision = VitConfig(image_size=64, patch_size=16, width=64, layers=1, heads=1)
    text = TextConfig(vocab_size=8192, width=64, layers=1, heads=1)
    return CLIP(ClipConfig(32, vision, text))


def official(system):
    """A model of the system and its weights under the authors' names."""
    module, cls = entry_module(system), entry_class(system)
    if system.slug == "grain":  # its authors' towers normalise queries and keys, a plain CLIP's do not
        config = module.GrainConfig(clip().config, width=512, heads=8, layers=1, hidden=64)
        made = cls(config).eval()
    else:
        made = cls.from_clip(clip()).eval()
    return made, module.KEYS.to_official(made.state_dict())


@pytest.mark.parametrize("system", MARKED, ids=lambda system: system.slug)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_checkpoint_loads_by_its_names(system, wrapped, tmp_path):
    if not hasattr(entry_class(system), "from_clip"):
        pytest.skip("its own test builds the authors' checkpoint")
    made, state = official(system)
    if wrapped and system.slug == "grain":  # two models in one file
        tower, decoder = (
            {f"module.{k.removeprefix(p)}": v for k, v in state.items() if k.startswith(p)}
            for p in ("clip.", "decoder.")
        )
        state = {"epoch": 3, "backbone_state_dict": tower, "state_dict": decoder}
    elif wrapped:
        state = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "theirs.pt")
    loaded = moviola.load(tmp_path / "theirs.pt", device="cpu")
    assert loaded.system == system.slug
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module.encode_image(pixels), made.encode_image(pixels))
    folder = loaded.save(tmp_path / "ours")
    assert moviola.load(folder, device="cpu").hash == loaded.hash


@pytest.mark.parametrize("system", MARKED, ids=lambda system: system.slug)
def test_a_name_too_many_is_told(system, tmp_path):
    if not hasattr(entry_class(system), "from_clip"):
        pytest.skip("its own test builds the authors' checkpoint")
    _, state = official(system)
    torch.save({**state, "surprise.weight": torch.zeros(2)}, tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match="surprise"):
        moviola.load(tmp_path / "theirs.pt", device="cpu")


def test_a_plain_clip_is_still_a_plain_clip(tmp_path):
    state = clip().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    loaded = moviola.load(tmp_path / "plain.pt", device="cpu")
    assert loaded.system == "clip"
    assert infer_config(state, source="it").embed_dim == 32


@pytest.mark.parametrize("slug", ["long-clip", "protoclip"])
def test_a_systems_plain_clip_is_exported(slug, tmp_path):
    base = clip()
    tokenizer = moviola.load("builtin", device="cpu").tokenizer
    model = Model(base, config=base.config.to_json(), tokenizer=tokenizer, device="cpu")
    model = moviola.load(slug, init=model, device="cpu")
    folder = moviola.export(model, tmp_path / "plain", format="openclip")
    again = moviola.load(folder, device="cpu")
    assert again.system == "clip"
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(again.module.encode_image(pixels), model.module.encode_image(pixels))


@pytest.mark.parametrize("slug", ["maple", "gopro"])
def test_authors_prompts_need_their_model_and_names(slug, tmp_path):
    """The authors save what was learned; it is put on the model it was learned on."""
    system = next(s for s in all_systems() if s.slug == slug)
    base, classes = moviola.load("builtin", device="cpu"), ["cat", "dog"]
    module = entry_module(system).ADAPTATION.start(base, classes)
    state = entry_module(system).KEYS.to_official(module.own_state())
    theirs = tmp_path / "model.pth.tar-5"  # as Dassl names it
    torch.save({"state_dict": state, "epoch": 5}, theirs)
    with pytest.raises(UsageError, match="Name both"):
        moviola.load(theirs)
    loaded = moviola.load(theirs, base="builtin", classes=["fox", "owl", "cat"])
    assert loaded.system == slug
    assert loaded.classes == ["fox", "owl", "cat"]
    own = module.own_state()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.module.own_state().items())
    again = moviola.load(loaded.save(tmp_path / "ours"))
    assert again.hash == loaded.hash


def test_vifi_clips_files_lack_the_token_table_of_the_clip_they_began_with(tmp_path):
    base = Model(clip(), config=clip().config.to_json(), device="cpu", name="began")
    system = next(s for s in all_systems() if s.slug == "vifi-clip")
    made, state = official(system)
    theirs = {"model": state | {"prompt_learner.complete_text_embeddings": torch.zeros(3, 77, 64)}}
    torch.save(theirs, tmp_path / "theirs.pth")
    with pytest.raises(UsageError, match="base"):
        moviola.load(tmp_path / "theirs.pth", device="cpu")
    loaded = moviola.load(tmp_path / "theirs.pth", device="cpu", base=base)
    assert loaded.system == "vifi-clip"
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module.encode_image(pixels), made.encode_image(pixels))
