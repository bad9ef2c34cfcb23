"""Hugging Face format, against transformers' own CLIPModel under random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moviola.clip.config import ClipConfig, vit_b_32
from moviola.clip.formats import describe, detect, export, hf
from moviola.clip.formats.hf import KEYS, recipe_from_processor, write_tokenizer
from moviola.clip.loaded import Model, load
from moviola.clip.model import CLIP
from moviola.clip.preprocess import Preprocess
from moviola.clip.tokenizer import Tokenizer
from moviola.types import CheckpointError, Recipe, Refusal, UsageError

transformers = pytest.importorskip("transformers")
Make = Callable[..., Model]


def their_model(tokenizer: Tokenizer, **changes: object) -> nn.Module:
    text = {
        "vocab_size": tokenizer.size,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.context_length,
        "eos_token_id": tokenizer.end_id,
        "bos_token_id": tokenizer.start_id,
        "pad_token_id": tokenizer.end_id,
        "hidden_act": changes.pop("act", "quick_gelu"),
    }
    vision = {
        "hidden_size": 60,
        "intermediate_size": 119,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": text["hidden_act"],
    }
    text |= changes.pop("text", {})  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save(model: nn.Module, tokenizer: Tokenizer, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    write_tokenizer(tokenizer, folder)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.4] * 3,
        image_std=[0.2] * 3,
    )
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def their_vectors(model: nn.Module, folder: Path, pictures: list[Image.Image], texts: list[str]) -> tuple:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = torch.as_tensor(np.stack(processor(pictures)["pixel_values"]))
    words = tokenizer(texts, padding=True, return_tensors="pt")
    image = model.get_image_features(pixel_values=pixels).pooler_output  # type: ignore[operator]
    text = model.get_text_features(**words).pooler_output  # type: ignore[operator]
    return pixels, image.numpy(), text.numpy()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_embeddings_equal_transformers(
    act: str, toy_tokenizer: Tokenizer, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    theirs = their_model(toy_tokenizer, act=act)
    folder = save(theirs, toy_tokenizer, tmp_path)
    texts = ["a photo of a cat.", "it's two dogs", ""]
    pixels, image, text = their_vectors(theirs, folder, pictures, texts)
    ours = load(folder, device="cpu")
    torch.testing.assert_close(ours.preprocess.pictures(pictures), pixels, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.embed_pictures(pictures, normalize=False), image, atol=1e-5)
    np.testing.assert_allclose(ours.embed_texts(texts, normalize=False), text, atol=1e-5)
    assert ours.logit_scale == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("stored", ["sharded", "bin", "sharded-bin", "half"])
def test_every_way_weights_are_stored(stored: str, toy_tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = their_model(toy_tokenizer)
    whole = load(save(theirs, toy_tokenizer, tmp_path / "whole"), device="cpu")
    folder = tmp_path / "other"
    if stored == "half":
        save(theirs.half(), toy_tokenizer, folder)
    else:
        save(theirs, toy_tokenizer, folder, max_shard_size="60KB" if stored == "sharded" else "1GB")
    if stored == "sharded":
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    if stored in ("bin", "sharded-bin"):
        state = dict(theirs.state_dict())
        (folder / "model.safetensors").unlink()
        if stored == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            names = list(state)
            parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
            for name, keys in parts.items():
                torch.save({k: state[k] for k in keys}, folder / name)
            places = {k: name for name, keys in parts.items() for k in keys}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    other = load(folder, device="cpu")
    if stored == "half":
        near = other.embed_texts(["a cat"]) @ whole.embed_texts(["a cat"]).T
        assert near.min() > 0.999
    else:
        assert other.hash == whole.hash


def test_legacy_and_explicit_end_ids_pool_alike(toy_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """2 is the mistake of the first exports: transformers then pools at the largest id."""
    theirs = their_model(toy_tokenizer)
    folder = save(theirs, toy_tokenizer, tmp_path)
    before = load(folder, device="cpu").embed_texts(["a cat", ""])
    data = json.loads((folder / "config.json").read_text())
    data["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(data))
    legacy = load(folder, device="cpu")
    assert legacy.module.config.text.eot_id is None  # type: ignore[union-attr]
    np.testing.assert_array_equal(legacy.embed_texts(["a cat", ""]), before)


def test_an_end_id_that_is_not_the_largest(tmp_path: Path) -> None:
    """A padded vocabulary: pooled at the first end id, as transformers does."""
    base = Tokenizer.from_merges([("a", "t</w>")], context_length=12)
    vocab = {**base.vocab, "<pad-1>": base.size, "<pad-2>": base.size + 1}
    tokenizer = Tokenizer(vocab, base.merges, context_length=12)
    theirs = their_model(tokenizer)
    folder = save(theirs, tokenizer, tmp_path)
    ours = load(folder, device="cpu")
    assert ours.module.config.text.eot_id == base.end_id  # type: ignore[union-attr]
    tokens = torch.from_numpy(tokenizer(["a cat", "at"]))
    mask = (tokens != 0).long()
    with torch.no_grad():
        text = theirs.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output  # type: ignore[operator]
    np.testing.assert_allclose(ours.embed_texts(["a cat", "at"], normalize=False), text.numpy(), atol=1e-5)


def test_names_of_wrappers_and_repaired_spelling(toy_tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = their_model(toy_tokenizer)
    folder = save(theirs, toy_tokenizer, tmp_path)
    expected = load(folder, device="cpu").hash
    (folder / "model.safetensors").unlink()
    renamed = {f"clip.{k.replace('layrnorm', 'layernorm')}": v for k, v in theirs.state_dict().items()}
    renamed["clip.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save(renamed, folder / "pytorch_model.bin")
    assert load(folder, device="cpu").hash == expected


@pytest.mark.parametrize("kind", ["vit", "vit-gelu"])
def test_an_export_is_read_by_transformers_and_by_us(
    kind: str, make_model: Make, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    model = make_model(kind, licence="mit")
    folder = export(model, tmp_path / "out", "hf")
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    texts = ["a photo of a cat.", "it's two dogs"]
    _, image, text = their_vectors(theirs, folder, pictures, texts)
    np.testing.assert_allclose(model.embed_pictures(pictures, normalize=False), image, atol=1e-5)
    np.testing.assert_allclose(model.embed_texts(texts, normalize=False), text, atol=1e-5)
    again = load(folder, device="cpu")
    assert again.hash == model.hash
    assert again.recipe == model.recipe
    assert again.licence == "mit"
    with pytest.raises(CheckpointError, match="holds other files"):
        export(model, folder, "hf")


def test_what_the_format_cannot_hold_is_refused(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"ModifiedResNet.*--format openclip"):
        export(make_model("resnet"), tmp_path / "a", "hf")
    for format in ("hf", "openclip"):
        with pytest.raises(Refusal, match="convolutional stem, which no other CLIP format can hold"):
            export(make_model("stem"), tmp_path / "b", format)
    with pytest.raises(UsageError, match="Use hf or openclip"):
        export(make_model(), tmp_path / "c", "onnx")
    with pytest.raises(Refusal, match="system 'x-clip'"):
        export(make_model(system="x-clip"), tmp_path / "d")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Names of a paper-size model, both ways
# --------------------------------------------------------------------------------------------------


def test_keys_cover_a_paper_size_model_both_ways() -> None:
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig())
        ours = CLIP(vit_b_32())
    official, house = theirs.state_dict(), ours.state_dict()
    read, written = KEYS.from_official(official), KEYS.to_official(house)
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in house.items()}
    saved = {k: v.shape for k, v in official.items() if not k.endswith("position_ids")}
    assert {k: v.shape for k, v in written.items()} == saved


# --------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_transformers() -> None:
    assert hf.read_config({"model_type": "clip"}, source="x") == vit_b_32()


def test_old_configs_with_dict_suffixes() -> None:
    data = {
        "model_type": "clip",
        "projection_dim": 64,
        "text_config_dict": {"hidden_size": 64, "num_attention_heads": 1},
    }
    config = hf.read_config({**data, "vision_config_dict": None}, source="x")
    assert (config.text.width, config.embed_dim) == (64, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, r"SigLIP \(model_type 'siglip'\).*Supported are CLIP models"),
        ({"model_type": "blip"}, "BLIP"),
        ({"model_type": "chinese_clip"}, "Chinese-CLIP"),
        ({"model_type": "clip_vision_model"}, "the vision half of a CLIP"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, r"another family \(BertModel"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
        ({"text_config": {"hidden_act": "gelu"}}, "activations 'gelu' .* 'quick_gelu'"),
        ({"vision_config": {"num_channels": 4}}, "4 channels"),
    ],
)
def test_other_families_are_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **changes}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_folder_without_weights_says_which_are_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match=r"no weights: expected one of model\.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "projection_dim": "many"}')
    with pytest.raises(CheckpointError, match="projection_dim should be a whole number"):
        load(tmp_path)


def test_weights_that_do_not_fit_list_the_names(toy_tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = their_model(toy_tokenizer)
    folder = save(theirs, toy_tokenizer, tmp_path)
    (folder / "model.safetensors").unlink()
    state = dict(theirs.state_dict())
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"1 unexpected: extra\.weight"):
        load(folder)
    del state["extra.weight"], state["vision_model.pre_layrnorm.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.ln_pre\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, Recipe(size=(32, 32))),
        ({"size": 32, "crop_size": 32, "resample": 2}, Recipe(size=(32, 32), interpolation="bilinear")),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, Recipe(size=(32, 32))),
        (
            {"size": {"height": 32, "width": 32}, "do_center_crop": False, "image_mean": [0, 0, 0]},
            Recipe(size=(32, 32), resize="squash", crop="none", mean=(0.0, 0.0, 0.0)),
        ),
        (
            {"do_normalize": False},
            Recipe(size=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        ),
        ({"size": {"shortest_edge": 40}}, Recipe(size=(32, 32), resize_size=(40, 40))),
        (
            {"size": {"height": 40, "width": 36}},
            Recipe(size=(32, 32), resize="squash", resize_size=(40, 36)),
        ),
        ({"size": {"shortest_edge": 30}}, r"scales to \(30, 30\) and crops to \(32, 32\), which pads"),
        ({"size": {"longest_edge": 32}}, r"needs whole sizes, got \(None, None\)"),
        ({"size": 48, "crop_size": 48}, r"makes pictures of \(48, 48\), the tower takes \(32, 32\)"),
        ({"do_center_crop": False}, "does not crop"),
        ({"do_resize": False}, "turns resizing or rescaling off"),
        ({"resample": 0}, "filter 0"),
        ({"rescale_factor": 1.0}, "expected 1/255"),
        ({"image_std": [1]}, "image_std should be three numbers"),
    ],
)
def test_image_processors_become_recipes_or_are_refused(data: dict, expected: Recipe | str) -> None:
    if isinstance(expected, Recipe):
        assert recipe_from_processor(data, (32, 32), source="x") == expected
    else:
        with pytest.raises(CheckpointError, match=expected):
            recipe_from_processor(data, (32, 32), source="x")


@pytest.mark.parametrize("size", [(57, 91), (75, 64), (40, 77), (64, 133), (37, 41), (200, 201)])
@pytest.mark.parametrize(
    "data",
    [
        {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 41}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
        {"size": {"height": 40, "width": 37}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    ],
)
def test_scaling_to_more_than_the_crop_equals_transformers(data: dict, size: tuple[int, int]) -> None:
    """Exact; but where OpenAI's offset of the crop is rounded up, theirs lies one pixel before."""
    draw = np.random.default_rng(sum(size))
    frame = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
    prepare = Preprocess(recipe_from_processor(data, (32, 32), source="x"))
    assert prepare.decode_hint == max(data["size"].values())
    got = prepare.picture(Image.fromarray(frame))
    # the same with the crop left out, and then cut where OpenAI's transform cuts
    scaled = transformers.CLIPImageProcessorPil(**data, do_center_crop=False)(Image.fromarray(frame))
    whole = torch.as_tensor(scaled["pixel_values"][0])
    top, left = (round((side - 32) / 2) for side in whole.shape[1:])
    expected = whole[:, top : top + 32, left : left + 32]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # the fast path of video, within what its docstring states
    fast = prepare.frames(frame[None])[0]
    levels = (fast - expected).abs() * torch.tensor(prepare.recipe.std).view(3, 1, 1) * 255
    assert levels.max() <= 2.01
    assert levels.mean() <= (0.05 if data.get("resample") == 2 else 0.01)
    theirs = torch.as_tensor(
        transformers.CLIPImageProcessorPil(**data)(Image.fromarray(frame))["pixel_values"][0]
    )
    if all((side - 32) % 4 != 3 for side in whole.shape[1:]):
        torch.testing.assert_close(got, theirs, rtol=0, atol=1e-5)
    else:
        up = [int((side - 32) % 4 == 3) for side in whole.shape[1:]]
        ours = got[:, : 32 - up[0], : 32 - up[1]]
        torch.testing.assert_close(ours, theirs[:, up[0] :, up[1] :], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(size=(32, 32), resize_size=(40, 40)),
        Recipe(size=(32, 32), resize="squash", resize_size=(40, 36)),
    ],
)
def test_a_margin_around_the_crop_survives_every_format_that_knows_it(
    recipe: Recipe, make_model: Make, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    plain = make_model()
    made = {"config": plain.config, "tokenizer": plain.tokenizer, "device": "cpu"}
    model = Model(plain.module, recipe=recipe, **made)  # type: ignore[arg-type]
    assert model.recipe.resize_size == recipe.resize_size
    assert model.recipe.hash != plain.recipe.hash
    for folder in (export(model, tmp_path / "hf", "hf"), model.save(tmp_path / "native")):
        again = load(folder, device="cpu")
        assert again.recipe == model.recipe
        np.testing.assert_array_equal(again.embed_pictures(pictures), model.embed_pictures(pictures))
    assert np.abs(model.embed_pictures(pictures) - plain.embed_pictures(pictures)).max() > 1e-3
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
    theirs = torch.as_tensor(np.stack(processor(pictures)["pixel_values"]))
    torch.testing.assert_close(model.preprocess.pictures(pictures), theirs, rtol=0, atol=1e-5)
    with pytest.raises(Refusal, match=r"one size for both\. Export it with --format hf"):
        export(model, tmp_path / "openclip", "openclip")
    uneven = Model(plain.module, recipe=Recipe(size=(32, 32), resize_size=(40, 36)), **made)  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="one short side"):
        export(uneven, tmp_path / "uneven", "hf")


def test_describe_says_what_a_checkpoint_is(toy_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(their_model(toy_tokenizer), toy_tokenizer, tmp_path)
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# Card\n")
    assert detect(folder) == "hf"
    about = json.loads(json.dumps(describe(folder)))
    assert about["licence"] == "mit"
    assert about["activation"] == "quick_gelu"
    assert about["vision"] == "ViT/8, 3 layers of 60, 3 heads"
    assert about["format"] == "hf"
    assert about["tokenizer"]["tokens"] == toy_tokenizer.size
    assert about["recipe"]["size"] == [32, 32]
    assert about["parameters"] == sum(p.numel() for p in their_model(toy_tokenizer).parameters())
    assert about["hash"] == load(folder, device="cpu").hash


def test_configs_round_trip_through_json(make_model: Make) -> None:
    for kind in ("vit", "resnet", "stem"):
        config = ClipConfig.from_json(make_model(kind).config)
        assert ClipConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
