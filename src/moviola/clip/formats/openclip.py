"""CLIP in OpenCLIP format: `open_clip_config.json` beside safetensors or `.bin` weights.

Parameters are OpenAI's names already; a `CustomTextCLIP` puts the text tower under `text.`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moviola.clip.config import Activation, ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.formats.common import (
    Parts,
    number,
    refuse,
    scalar_logit_scale,
    stated_licence,
    triple,
)
from moviola.clip.loaded import Model
from moviola.clip.native import read_json, write_folder, write_safetensors
from moviola.clip.tokenizer import find_tokenizer
from moviola.clip.weights import read_weights, strip_prefix
from moviola.types import CheckpointError, Recipe, Refusal, printable

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.safetensors",
    "open_clip_model.bin",
)

# options that change nothing when a trained model is only run
_IDLE = {
    "output_tokens",
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
    "pad_id",
    "eos_id",
}
# values that mean "as in plain CLIP"
_PLAIN: dict[str, tuple[Any, ...]] = {
    "pos_embed_type": ("learnable", None),
    "pool_type": ("tok", "argmax", "eos"),
    "proj_type": ("linear",),
    "block_type": ("default", None),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
}
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs"}
_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "output_dict"}


def read(folder: Path) -> Parts:
    """Read a folder with an `open_clip_config.json`."""
    data, model = read_json(folder / CONFIG), model_config(folder / CONFIG)
    config = read_config(model, source=str(printable(folder)))
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{printable(folder)} has no OpenCLIP weights: expected one of {', '.join(WEIGHTS[:2])}."
        )
    state = plain_names(read_weights(weights))
    if "logit_bias" in state:
        raise refuse(printable(folder), "SigLIP (its weights have a logit_bias)")
    return Parts(
        format="openclip",
        name=folder.name,
        config=config,
        state=scalar_logit_scale(state),
        recipe=read_recipe(data.get("preprocess_cfg") or {}, config, source=str(printable(folder))),
        tokenizer=find_tokenizer(folder),
        licence=stated_licence(folder, data, model),
    )


def model_config(path: Path) -> dict[str, Any]:
    """The `model_cfg` of an `open_clip_config.json`, or the whole of a file that is only that."""
    data = read_json(path)
    model = data.get("model_cfg", data) if isinstance(data, dict) else None
    if not isinstance(model, dict) or not {"vision_cfg", "text_cfg"} <= model.keys():
        raise CheckpointError(f"{printable(path)} has no model_cfg with vision_cfg and text_cfg.")
    return model


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names: no `text.` before the text tower, and no mask or version buffers."""
    renamed = {k.removeprefix("text."): v for k, v in strip_prefix(dict(state), "module.").items()}
    return {k: v for k, v in renamed.items() if k != "attn_mask"}


def read_config(model: Mapping[str, Any], *, source: str) -> ClipConfig:
    """The `model_cfg` of OpenCLIP. Options that plain CLIP lacks are refused by name."""
    vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    if "multimodal_cfg" in model:
        raise refuse(source, "CoCa (it has a multimodal_cfg)")
    if vision.get("timm_model_name"):
        kind = "EVA" if "eva" in vision["timm_model_name"] else "a model"
        raise refuse(source, f"{kind} with the timm tower '{vision['timm_model_name']}'")
    if text.get("hf_model_name"):
        raise refuse(source, f"a model with the Hugging Face text tower '{text['hf_model_name']}'")
    if model.get("init_logit_bias") is not None:
        raise refuse(source, "SigLIP (it has an init_logit_bias)")
    _check_options(model, _TOP, "model_cfg", source)
    _check_options(vision, _VISION, "vision_cfg", source)
    _check_options(text, _TEXT, "text_cfg", source)
    acts = {_activation(bool(model.get("quick_gelu")), part, source) for part in (vision, text)}
    if len(acts) != 1:
        raise refuse(source, f"a CLIP with two activations ({' and '.join(sorted(acts))})")
    width, head = number(vision, "width", 768), number(vision, "head_width", 64)
    size = vision.get("image_size", 224)
    size = tuple(size) if isinstance(size, list) else size
    layers = vision.get("layers", 12)
    tower: VitConfig | ResNetConfig
    if isinstance(layers, list | tuple):
        if len(layers) != 4 or not isinstance(size, int):
            raise refuse(source, f"a residual network of {len(layers)} stages for pictures of {size}")
        a, b, c, d = layers
        tower = ResNetConfig(image_size=size, width=width, layers=(a, b, c, d), heads=width * 32 // head)
    else:
        tower = VitConfig(
            image_size=size,
            patch_size=number(vision, "patch_size", 16),
            width=width,
            layers=number(vision, "layers", 12),
            heads=width // head,
            mlp_ratio=float(vision.get("mlp_ratio", 4.0)),
        )
    vocab = number(text, "vocab_size", 49408)
    eos = number(text, "eos_id", 2) if text.get("pool_type") == "eos" else None
    return ClipConfig(
        embed_dim=number(model, "embed_dim"),
        vision=tower,
        text=TextConfig(
            context_length=number(text, "context_length", 77),
            vocab_size=vocab,
            width=number(text, "width", 512),
            layers=number(text, "layers", 12),
            heads=number(text, "heads", 8),
            mlp_ratio=float(text.get("mlp_ratio", 4.0)),
            eot_id=None if eos == vocab - 1 else eos,
        ),
        activation=acts.pop(),
    )


def _check_options(part: Mapping[str, Any], known: set[str], name: str, source: str) -> None:
    for key, value in part.items():
        if key in known or key in _IDLE:
            continue
        if key in _PLAIN and value in _PLAIN[key]:
            continue
        if key not in _PLAIN and value in (None, False):  # an option that is off
            continue
        raise refuse(source, f"a CLIP with the option {name}.{key} = {value!r}")


def _activation(quick: bool, part: Mapping[str, Any], source: str) -> Activation:
    extra = part.get("act_kwargs") or {}
    if quick and extra:
        raise refuse(source, f"a CLIP with QuickGELU and act_kwargs {extra}")
    if quick:
        return "quick_gelu"
    if extra in ({}, {"approximate": "none"}):
        return "gelu"
    if extra == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise refuse(source, f"a CLIP with act_kwargs {extra}")


def read_recipe(data: Mapping[str, Any], config: ClipConfig, *, source: str) -> Recipe:
    """The `preprocess_cfg` of OpenCLIP as a recipe."""
    size = config.vision.image_size
    expected = (size, size) if isinstance(size, int) else size
    given = data.get("size", expected)
    given = (given, given) if isinstance(given, int) else tuple(given)
    mode, filter_ = data.get("resize_mode") or "shortest", data.get("interpolation") or "bicubic"
    if given != expected:
        raise CheckpointError(
            f"The preprocess_cfg of {source} makes {given} pictures, the tower takes {expected}."
        )
    if mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"The preprocess_cfg of {source} asks for resize_mode {mode!r}; known are shortest and squash."
        )
    if filter_ not in ("bicubic", "bilinear", "random"):  # random while training is bicubic after it
        raise CheckpointError(
            f"The preprocess_cfg of {source} asks for {filter_!r} interpolation; known are "
            "bicubic and bilinear."
        )
    if data.get("mode", "RGB") != "RGB":
        raise CheckpointError(f"The preprocess_cfg of {source} asks for mode {data['mode']!r}; expected RGB.")
    defaults = Recipe()
    return Recipe(
        size=expected,
        resize="squash" if mode == "squash" else "shortest",
        crop="none" if mode == "squash" else "center",
        interpolation="bilinear" if filter_ == "bilinear" else "bicubic",
        mean=triple(data.get("mean") or defaults.mean, "mean"),
        std=triple(data.get("std") or defaults.std, "std"),
    )


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write(model: Model, folder: Path) -> Path:
    """Write the model as a folder in OpenCLIP's hub layout."""
    config = ClipConfig.from_json(model.config)

    def fill(temporary: Path) -> None:
        text = json.dumps(config_json(config, model), indent=2)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_safetensors(temporary / WEIGHTS[0], model.module.state_dict())
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)

    config_json(config, model)  # refuses before anything is written
    return write_folder(folder, fill, marker=None)


def config_json(config: ClipConfig, model: Model) -> dict[str, Any]:
    vision, text, recipe = config.vision, config.text, model.recipe
    if recipe.resize_size not in (None, recipe.size):
        raise Refusal(
            f"'{model.name}' scales pictures to {recipe.resize_size} and crops to {recipe.size}; "
            "OpenCLIP's preprocess_cfg has one size for both.",
            hint="Export it with --format hf, or keep it as a Moviola folder: model.save(folder).",
        )
    vision_cfg: dict[str, Any] = {"image_size": vision.image_size, "width": vision.width}
    if isinstance(vision, ResNetConfig):
        vision_cfg |= {"layers": list(vision.layers), "head_width": vision.width * 32 // vision.heads}
        vision_cfg["patch_size"] = None
    elif vision.stem:
        raise Refusal(
            f"'{model.name}' has a convolutional stem, which no other CLIP format can hold.",
            hint="Keep it as a Moviola folder: model.save(folder).",
        )
    else:
        vision_cfg |= {
            "layers": vision.layers,
            "patch_size": vision.patch_size,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": vision.mlp_ratio,
        }
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": text.mlp_ratio,
    }
    if text.eot_id is not None:
        text_cfg |= {"pool_type": "eos", "eos_id": text.eot_id}
    model_cfg: dict[str, Any] = {"embed_dim": config.embed_dim, "quick_gelu": False}
    if config.activation == "gelu_tanh":
        vision_cfg["act_kwargs"] = text_cfg["act_kwargs"] = {"approximate": "tanh"}
    elif config.activation == "quick_gelu":
        model_cfg["quick_gelu"] = True
    return {
        "model_cfg": {**model_cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": {
            "mean": list(recipe.mean),
            "std": list(recipe.std),
            "interpolation": recipe.interpolation,
            "resize_mode": recipe.resize,
        },
        **({"license": model.licence} if model.licence else {}),
    }
