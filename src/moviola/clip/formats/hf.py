"""CLIP in Hugging Face format: `config.json` with `model_type` clip, weights, image processor, tokenizer."""

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
    ratio,
    refuse,
    scalar_logit_scale,
    stated_licence,
    triple,
)
from moviola.clip.keys import Keys, Rule
from moviola.clip.loaded import Model
from moviola.clip.native import read_json, write_folder, write_safetensors
from moviola.clip.tokenizer import Tokenizer, find_tokenizer
from moviola.clip.weights import read_weights, strip_prefix
from moviola.types import CheckpointError, Recipe, Refusal, printable

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_FAMILIES = {
    "align": "ALIGN",
    "altclip": "AltCLIP (XLM-RoBERTa texts)",
    "blip": "BLIP",
    "blip-2": "BLIP-2",
    "bridgetower": "BridgeTower",
    "chinese_clip": "Chinese-CLIP (BERT texts)",
    "clap": "CLAP (sound and text)",
    "clip_text_model": "the text half of a CLIP",
    "clip_vision_model": "the vision half of a CLIP",
    "clipseg": "CLIPSeg",
    "clvp": "CLVP",
    "coca": "CoCa",
    "eva": "EVA",
    "flava": "FLAVA",
    "git": "GIT",
    "groupvit": "GroupViT",
    "jina_clip": "Jina CLIP (EVA pictures, BERT texts)",
    "llava": "LLaVA",
    "metaclip_2": "MetaCLIP 2",
    "owlv2": "OWLv2",
    "owlvit": "OWL-ViT",
    "siglip": "SigLIP",
    "siglip2": "SigLIP 2",
    "vision-text-dual-encoder": "a dual encoder of two other towers",
    "xclip": "X-CLIP (the video model of Microsoft)",
}


def _tower(ours: str, theirs: str) -> list[Rule]:
    block, layer = f"{ours}transformer.resblocks.{{n}}", f"{theirs}.encoder.layers.{{n}}"
    qkv = tuple(f"{layer}.self_attn.{part}_proj.{{p}}" for part in "qkv")
    return [
        Rule(f"{block}.attn.in_proj_{{p}}", qkv),
        Rule(f"{block}.attn.out_proj.{{p}}", f"{layer}.self_attn.out_proj.{{p}}"),
        Rule(f"{block}.ln_1.{{p}}", f"{layer}.layer_norm1.{{p}}"),
        Rule(f"{block}.ln_2.{{p}}", f"{layer}.layer_norm2.{{p}}"),
        Rule(f"{block}.mlp.c_fc.{{p}}", f"{layer}.mlp.fc1.{{p}}"),
        Rule(f"{block}.mlp.c_proj.{{p}}", f"{layer}.mlp.fc2.{{p}}"),
    ]


KEYS = Keys(
    *_tower("visual.", "vision_model"),
    Rule("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Rule("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Rule("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rule("visual.ln_pre.{p}", "vision_model.pre_layrnorm.{p}"),
    Rule("visual.ln_post.{p}", "vision_model.post_layernorm.{p}"),
    Rule("visual.proj", "visual_projection.weight", transpose=True),
    *_tower("", "text_model"),
    Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rule("ln_final.{p}", "text_model.final_layer_norm.{p}"),
    Rule("text_projection", "text_projection.weight", transpose=True),
    Rule("logit_scale", "logit_scale"),
    ignore=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)


def read(folder: Path) -> Parts:
    """Read a folder whose `config.json` says `model_type` clip."""
    data = read_json(folder / "config.json")
    config = read_config(data, source=str(printable(folder)))
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{printable(folder)} has a config.json but no weights: expected one of {', '.join(WEIGHTS)}."
        )
    state = KEYS.from_official(_plain_names(read_weights(weights)))
    # turned matrices are laid out anew: products with them run as they were trained
    state = scalar_logit_scale({k: v.contiguous() for k, v in state.items()})
    return Parts(
        format="hf",
        name=folder.name,
        config=config,
        state=state,
        recipe=_read_recipe(folder, config),
        tokenizer=find_tokenizer(folder),
        licence=stated_licence(folder, data),
    )


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as CLIPModel writes them, without a wrapper's prefix and with its famous misspelling."""
    for prefix in ("model.", "clip.", "clip_model."):
        state = strip_prefix(state, prefix)
    return {
        k.replace("vision_model.pre_layernorm.", "vision_model.pre_layrnorm."): v for k, v in state.items()
    }


def read_config(data: Mapping[str, Any], *, source: str) -> ClipConfig:
    kind = data.get("model_type")
    if kind != "clip":
        family = _FAMILIES.get(str(kind))
        names = ", ".join(data.get("architectures") or ()) or "unnamed architecture"
        raise refuse(
            source,
            f"{family} (model_type '{kind}')"
            if family
            else f"a model of another family ({names}, model_type {kind!r})",
        )
    text = {**(data.get("text_config") or {}), **(data.get("text_config_dict") or {})}
    vision = {**(data.get("vision_config") or {}), **(data.get("vision_config_dict") or {})}
    for name, part in (("text_config", text), ("vision_config", vision)):
        if abs(part.get("layer_norm_eps", 1e-5) - 1e-5) > 1e-9:
            raise refuse(
                source, f"a CLIP with {name}.layer_norm_eps {part['layer_norm_eps']} (1e-5 is known)"
            )
    acts = [part.get("hidden_act", "quick_gelu") for part in (text, vision)]
    if acts[0] != acts[1] or acts[0] not in _ACTIVATIONS:
        raise refuse(source, f"a CLIP with the activations {acts[0]!r} (text) and {acts[1]!r} (vision)")
    if vision.get("num_channels", 3) != 3:
        raise refuse(source, f"a CLIP for pictures of {vision['num_channels']} channels")
    width, vocab = number(vision, "hidden_size", 768), number(text, "vocab_size", 49408)
    text_width = number(text, "hidden_size", 512)
    eos = text.get("eos_token_id", 49407)
    return ClipConfig(
        embed_dim=number(data, "projection_dim", 512),
        vision=VitConfig(
            image_size=number(vision, "image_size", 224),
            patch_size=number(vision, "patch_size", 32),
            width=width,
            layers=number(vision, "num_hidden_layers", 12),
            heads=number(vision, "num_attention_heads", 12),
            mlp_ratio=ratio(number(vision, "intermediate_size", 3072), width),
        ),
        text=TextConfig(
            context_length=number(text, "max_position_embeddings", 77),
            vocab_size=vocab,
            width=text_width,
            layers=number(text, "num_hidden_layers", 12),
            heads=number(text, "num_attention_heads", 8),
            mlp_ratio=ratio(number(text, "intermediate_size", 2048), text_width),
            # 2 was written into every early export by mistake and means "the largest id" in transformers
            eot_id=None if eos in (None, 2, vocab - 1) else int(eos),
        ),
        activation=_ACTIVATIONS[acts[0]],
    )


def _read_recipe(folder: Path, config: ClipConfig) -> Recipe:
    data: Mapping[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            data = read_json(folder / name)
            data = data.get("image_processor", data)
            break
    size = config.vision.image_size
    expected = (size, size) if isinstance(size, int) else size
    return recipe_from_processor(data, expected, source=str(printable(folder)))


def recipe_from_processor(data: Mapping[str, Any], expected: tuple[int, int], *, source: str) -> Recipe:
    """An image processor's settings as a recipe; those that a recipe cannot say are refused by name."""
    problem = f"The image processor of {source}"
    if data.get("do_resize", True) is False or data.get("do_rescale", True) is False:
        raise CheckpointError(f"{problem} turns resizing or rescaling off, which a recipe cannot say.")
    if abs(data.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise CheckpointError(f"{problem} rescales by {data['rescale_factor']}; expected 1/255.")
    resample = data.get("resample", 3)
    if resample not in (2, 3):
        raise CheckpointError(
            f"{problem} scales with filter {resample}; known are 2 (bilinear), 3 (bicubic)."
        )
    size, crop = data.get("size", expected[0]), data.get("crop_size", expected[0])
    crop_size = (crop, crop) if isinstance(crop, int) else (crop.get("height"), crop.get("width"))
    cropping = data.get("do_center_crop", True)
    made: tuple[Any, Any]
    if isinstance(size, dict) and "shortest_edge" not in size:
        made = (size.get("height"), size.get("width"))
        resize = "squash"
        final: tuple[Any, Any] | None = crop_size if cropping else made
    else:
        short = size["shortest_edge"] if isinstance(size, dict) else size
        made, resize = (short, short), "shortest"
        final = crop_size if cropping else None
    if final is None:
        raise CheckpointError(f"{problem} does not crop, so pictures would differ in size.")
    if not all(isinstance(side, int) and side > 0 for side in (*final, *made)):
        raise CheckpointError(f"{problem} needs whole sizes, got {made} and a crop of {final}.")
    if final != expected:
        raise CheckpointError(f"{problem} makes pictures of {final}, the tower takes {expected}.")
    if made[0] < final[0] or made[1] < final[1]:
        raise CheckpointError(
            f"{problem} scales to {made} and crops to {final}, which pads with black; a recipe cannot."
        )
    plain = data.get("do_normalize", True) is False
    defaults = Recipe()
    return Recipe(
        size=expected,
        resize="squash" if resize == "squash" else "shortest",
        crop="none" if resize == "squash" and made == final else "center",
        resize_size=None if made == final else made,
        interpolation="bicubic" if resample == 3 else "bilinear",
        mean=(0.0, 0.0, 0.0) if plain else triple(data.get("image_mean", defaults.mean), "image_mean"),
        std=(1.0, 1.0, 1.0) if plain else triple(data.get("image_std", defaults.std), "image_std"),
    )


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write(model: Model, folder: Path) -> Path:
    """Write the model as a folder that `transformers.CLIPModel.from_pretrained` reads."""
    config = ClipConfig.from_json(model.config)
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        raise Refusal(
            f"'{model.name}' has a ModifiedResNet, which Hugging Face's CLIP does not have.",
            hint="Export it with --format openclip.",
        )
    if vision.stem:
        raise Refusal(
            f"'{model.name}' has a convolutional stem, which no other CLIP format can hold.",
            hint="Keep it as a Moviola folder: model.save(folder).",
        )
    if not isinstance(vision.image_size, int):
        raise Refusal(f"'{model.name}' takes {vision.image_size} pictures; this format needs squares.")
    made = model.recipe.resize_size
    if made is not None and model.recipe.resize == "shortest" and made[0] != made[1]:
        raise Refusal(
            f"'{model.name}' scales pictures so that they cover {made}; this format has one short side."
        )

    tokenizer = model.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise Refusal(f"'{model.name}' has a tokenizer of another family than CLIP's; this format has none.")

    def fill(temporary: Path) -> None:
        _dump(temporary / "config.json", config_json(config, model))
        _dump(temporary / "preprocessor_config.json", _processor_json(model.recipe))
        state = KEYS.to_official(model.module.state_dict())
        write_safetensors(temporary / "model.safetensors", state)
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary)

    return write_folder(folder, fill, marker=None)


def config_json(config: ClipConfig, model: Model) -> dict[str, Any]:
    vision, text = config.vision, config.text
    assert isinstance(vision, VitConfig)
    act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    eos = text.vocab_size - 1 if text.eot_id is None else text.eot_id
    start = eos - 1
    if model.tokenizer is not None:
        start, eos = model.tokenizer.start_id, model.tokenizer.end_id
    common = {"hidden_act": act, "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            **common,
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "projection_dim": config.embed_dim,
            "bos_token_id": start,
            "eos_token_id": eos,
            "pad_token_id": eos,
        },
        "vision_config": {
            **common,
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
            "projection_dim": config.embed_dim,
        },
        **({"license": model.licence} if model.licence else {}),
    }


def _processor_json(recipe: Recipe) -> dict[str, Any]:
    rows, columns = recipe.size
    height, width = recipe.resize_size or recipe.size
    squash = recipe.resize == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "do_center_crop": recipe.crop == "center",
        "crop_size": {"height": rows, "width": columns},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 3 if recipe.interpolation == "bicubic" else 2,
        "image_mean": list(recipe.mean),
        "image_std": list(recipe.std),
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and the older pair of files with the names of the marks."""
    tokenizer.save(folder)
    _dump(folder / "vocab.json", tokenizer.vocab)
    lines = "\n".join(f"{a} {b}" for a, b in tokenizer.merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    marks = {
        "bos_token": tokenizer.start,
        "eos_token": tokenizer.end,
        "pad_token": tokenizer.end,
        "unk_token": tokenizer.unknown or tokenizer.end,
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length}
    _dump(folder / "tokenizer_config.json", {**settings, **marks})
    _dump(folder / "special_tokens_map.json", marks)


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
