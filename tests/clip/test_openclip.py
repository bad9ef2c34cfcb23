from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from moviola.clip.config import ClipConfig
from moviola.clip.formats import describe, detect, export
from moviola.clip.formats.openclip import CONFIG, WEIGHTS, read_config, read_recipe
from moviola.clip.loaded import Model, load
from moviola.types import CheckpointError, Recipe

Make = Callable[..., Model]


@pytest.mark.parametrize("kind", ["vit", "vit-gelu", "resnet"])
def test_an_export_loads_with_equal_vectors(
    kind: str, make_model: Make, tmp_path: Path, pictures: list[Image.Image], texts: list[str]
) -> None:
    model = make_model(kind)
    folder = export(model, tmp_path / "out", "openclip")
    assert detect(folder) == "openclip"
    again = load(folder, device="cpu")
    assert again.config == model.config
    assert again.hash == model.hash
    assert again.recipe == model.recipe
    np.testing.assert_array_equal(again.embed_texts(texts), model.embed_texts(texts))
    np.testing.assert_array_equal(again.embed_pictures(pictures), model.embed_pictures(pictures))


@pytest.mark.parametrize("stored", ["bin", "text prefix", "wrapped", "no counters"])
def test_every_way_weights_are_stored(stored: str, make_model: Make, tmp_path: Path) -> None:
    model = make_model("resnet")
    folder = export(model, tmp_path / "out", "openclip")
    state = load_file(folder / WEIGHTS[0])
    (folder / WEIGHTS[0]).unlink()
    if stored == "text prefix":
        own = ("visual.", "logit_scale")
        state = {k if k.startswith(own) else f"text.{k}": v for k, v in state.items()}
        save_file(state, folder / WEIGHTS[0])
    elif stored == "no counters":
        save_file({k: v for k, v in state.items() if "num_batches" not in k}, folder / WEIGHTS[0])
    elif stored == "wrapped":
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / WEIGHTS[1]
        )
    else:
        torch.save(state, folder / WEIGHTS[1])
    assert load(folder, device="cpu").hash == model.hash


CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}


def changed(**changes: dict | object) -> dict:
    made = {k: dict(v) if isinstance(v, dict) else v for k, v in CFG.items()}
    for key, value in changes.items():
        if isinstance(value, dict) and key in made:
            made[key] |= value  # type: ignore[operator]
        else:
            made[key] = value
    return made


def test_options_that_change_nothing_are_accepted() -> None:
    plain = read_config(CFG, source="x")
    assert plain.activation == "gelu"
    idle = changed(
        vision_cfg={"patch_dropout": 0.5, "output_tokens": True, "ls_init_value": None, "pool_type": "tok"},
        text_cfg={
            "no_causal_mask": False,
            "proj_type": "linear",
            "norm_kwargs": {"eps": 1e-5},
            "pool_type": "argmax",
        },
        custom_text=True,
    )
    assert read_config(idle, source="x") == plain


def test_sizes_heads_and_activations_are_read() -> None:
    config = read_config(
        changed(
            vision_cfg={
                "image_size": [32, 48],
                "head_width": 32,
                "mlp_ratio": 3.0,
                "act_kwargs": {"approximate": "tanh"},
            },
            text_cfg={"pool_type": "eos", "eos_id": 7, "act_kwargs": {"approximate": "tanh"}},
        ),
        source="x",
    )
    assert config.vision.image_size == (32, 48)
    assert config.vision.heads == 2
    assert config.text.eot_id == 7
    assert config.activation == "gelu_tanh"
    residual = read_config(
        changed(vision_cfg={"layers": [1, 2, 3, 4], "head_width": 64, "patch_size": None}), source="x"
    )
    assert residual.vision.kind == "resnet"
    assert residual.vision.heads == 32
    assert read_config(changed(quick_gelu=True), source="x").activation == "quick_gelu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multimodal_cfg": {}}, "CoCa"),
        (
            {"vision_cfg": {"timm_model_name": "eva02_base_patch16_clip_224"}},
            "EVA with the timm tower 'eva02",
        ),
        ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "timm tower 'convnext_base'"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text tower 'roberta-base'"),
        ({"init_logit_bias": -10}, "SigLIP"),
        ({"text_cfg": {"no_causal_mask": True}}, r"text_cfg\.no_causal_mask = True"),
        ({"text_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "norm_kwargs"),
        ({"vision_cfg": {"pool_type": "avg"}}, r"vision_cfg\.pool_type = 'avg'"),
        ({"vision_cfg": {"ls_init_value": 1e-4}}, "ls_init_value"),
        ({"vision_cfg": {"no_ln_pre": True}}, "no_ln_pre"),
        ({"vision_cfg": {"qk_norm": True}}, "qk_norm"),
        ({"vision_cfg": {"some_new_thing": 3}}, "some_new_thing = 3"),
        (
            {"quick_gelu": True, "text_cfg": {"act_kwargs": {"approximate": "tanh"}}},
            "QuickGELU and act_kwargs",
        ),
        ({"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "two activations"),
        ({"embed_dim": None}, "embed_dim should be a whole number"),
    ],
)
def test_what_plain_clip_lacks_is_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": changed(**changes)}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_siglip_weights_are_seen_even_without_their_option(make_model: Make, tmp_path: Path) -> None:
    folder = export(make_model(), tmp_path / "out", "openclip")
    state = load_file(folder / WEIGHTS[0])
    save_file({**state, "logit_bias": torch.zeros(())}, folder / WEIGHTS[0])
    with pytest.raises(CheckpointError, match="logit_bias"):
        load(folder)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, Recipe(size=(32, 32))),
        (
            {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
            Recipe(
                size=(32, 32),
                resize="squash",
                crop="none",
                interpolation="bilinear",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            ),
        ),
        ({"size": [32, 32], "mode": "RGB", "interpolation": "random"}, Recipe(size=(32, 32))),
        ({"size": 64}, r"makes \(64, 64\) pictures"),
        ({"resize_mode": "longest"}, "resize_mode 'longest'"),
        ({"interpolation": "lanczos"}, "'lanczos' interpolation"),
        ({"mode": "L"}, "expected RGB"),
    ],
)
def test_preprocessing_is_read_or_refused(data: dict, expected: Recipe | str) -> None:
    config = read_config(CFG, source="x")
    if isinstance(expected, Recipe):
        assert read_recipe(data, config, source="x") == expected
    else:
        with pytest.raises(CheckpointError, match=expected):
            read_recipe(data, config, source="x")


def test_a_bare_model_config_and_missing_parts(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(CFG))
    with pytest.raises(
        CheckpointError, match=r"no OpenCLIP weights: expected one of open_clip_model\.safetensors"
    ):
        load(tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(CheckpointError, match="no model_cfg with vision_cfg and text_cfg"):
        load(tmp_path)


def test_a_folder_with_both_configs_is_read_by_its_weights(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    both = export(model, tmp_path / "both", "hf")
    openclip = export(model, tmp_path / "openclip", "openclip")
    (both / CONFIG).write_bytes((openclip / CONFIG).read_bytes())
    assert detect(both) == "hf"
    (both / WEIGHTS[0]).write_bytes((openclip / WEIGHTS[0]).read_bytes())
    assert detect(both) == "openclip"
    assert load(both, device="cpu").hash == model.hash


def test_a_checkpoint_without_tokenizer_takes_the_one_given(
    make_model: Make, tmp_path: Path, texts: list[str]
) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out", "openclip")
    elsewhere = (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    bare = load(folder, device="cpu")
    with pytest.raises(CheckpointError, match="--tokenizer PATH"):
        bare.embed_texts(texts)
    for given in (elsewhere, str(elsewhere), tmp_path, model.tokenizer):
        np.testing.assert_array_equal(
            load(folder, device="cpu", tokenizer=given).embed_texts(texts), model.embed_texts(texts)
        )


def test_describe_a_residual_network(make_model: Make) -> None:
    about = describe(make_model("resnet"))
    assert about["vision"] == "ModifiedResNet, stages 1-2-1-1, width 16"
    assert about["text"].endswith("620 tokens")
    assert ClipConfig.from_json(make_model("resnet").config).activation == about["activation"]
    assert "convolutional stem 8-16" in describe(make_model("stem"))["vision"]
