"""Checkpoints of every family the house reads, told apart by their content."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from moviola.clip import hub
from moviola.clip.config import ClipConfig, VitConfig
from moviola.clip.foreign_tokenizer import AnyTokenizer
from moviola.clip.formats import hf, openai, openclip
from moviola.clip.formats.common import SUPPORTED, Parts, refuse
from moviola.clip.loaded import Device, Dtype, Model, from_native
from moviola.clip.model import CLIP
from moviola.clip.native import assign, is_native, read_json, read_native
from moviola.clip.tokenizer import Tokenizer
from moviola.types import CheckpointError, Refusal, UsageError, printable

Format = Literal["native", "hf", "openclip", "openai"]
EXPORTS = ("hf", "openclip")

_OPENAI_TOKENS = 49408
_FOREIGN = {
    ".onnx": "an ONNX file",
    ".gguf": "a GGUF file",
    ".ggml": "a GGML file",
    ".engine": "a TensorRT engine",
    ".tflite": "a TensorFlow Lite file",
    ".mlmodel": "a Core ML model",
    ".mlpackage": "a Core ML model",
    ".msgpack": "Flax weights",
    ".h5": "TensorFlow weights",
    ".keras": "a Keras model",
    ".npz": "JAX weights",
    ".pkl": "a pickle, which could run code",
    ".pickle": "a pickle, which could run code",
    ".joblib": "a pickle, which could run code",
    ".ckpt": "a training checkpoint",
    ".zip": "an archive",
}


def load(
    source: str | Path,
    *,
    device: Device = "auto",
    dtype: Dtype | torch.dtype | None = None,
    tokenizer: str | Path | AnyTokenizer | None = None,
    revision: str | None = None,
) -> Model:
    """Load a plain CLIP from a folder, a file or a hub id.

    `tokenizer` overrides the checkpoint's own (needed for a `.pt`, which has none). Raises
    `CheckpointError` with the family's name for what this version does not read.
    """
    path, from_hub = locate(source, revision)
    kind = detect(path)
    given = None if tokenizer is None else _tokenizer(tokenizer)
    if kind == "native":
        model = from_native(read_native(path), device=device, dtype=dtype)
        if given is None:
            return model
        raise UsageError("A Moviola folder carries its own tokenizer; tokenizer= is for files without one.")
    parts = read(path, kind)
    if from_hub is not None:
        parts.name = from_hub
        if given is None and parts.tokenizer is None and parts.config.text.vocab_size == _OPENAI_TOKENS:
            parts.tokenizer = hub.fetch_tokenizer()
    if given is None and parts.tokenizer is not None:
        given = Tokenizer.from_file(parts.tokenizer, context_length=parts.config.text.context_length)
    return _assemble(parts, given, device, dtype)


def read(path: Path, kind: Format) -> Parts:
    """Read a checkpoint that is not the house's own."""
    readers = {"hf": hf.read, "openclip": openclip.read, "openai": openai.read}
    return readers[kind](path)


def detect(path: Path) -> Format:
    """Which format lies at a path; other families are refused by name."""
    if path.is_dir():
        if is_native(path):
            return "native"
        has_openclip = (path / openclip.CONFIG).is_file()
        if has_openclip and any((path / name).is_file() for name in openclip.WEIGHTS):
            return "openclip"
        if (path / "config.json").is_file():
            return "hf"
        if has_openclip:
            return "openclip"
        raise _unknown_folder(path)
    if path.suffix.lower() in _FOREIGN:
        raise refuse(printable(path), _FOREIGN[path.suffix.lower()])
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{printable(path)} holds weights without their configuration.",
            hint=f"Give the folder that has config.json or open_clip_config.json too: {path.parent}",
        )
    if path.suffix == ".json":
        raise CheckpointError(
            f"{printable(path)} is a configuration, not a model.", hint=f"Give its folder: {path.parent}"
        )
    return "openai"


def _unknown_folder(path: Path) -> CheckpointError:
    names = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in names:
        return refuse(printable(path), "a PEFT adapter without its base model")
    if "modules.json" in names:
        return CheckpointError(
            f"{printable(path)} is a sentence-transformers model.",
            hint="If it wraps a CLIP, give the folder inside it: 0_CLIPModel.",
        )
    for name in names:
        if Path(name).suffix.lower() in _FOREIGN:
            return refuse(printable(path), f"a folder with {_FOREIGN[Path(name).suffix.lower()]} ({name})")
    files = [name for name in names if name.endswith((".pt", ".pth"))]
    if files:
        return CheckpointError(
            f"{printable(path)} has no configuration.", hint=f"Give the file itself: {path / files[0]}"
        )
    shown = ", ".join(names[:6]) or "nothing"
    return CheckpointError(
        f"{printable(path)} is not a model's folder: expected moviola.json, config.json or "
        f"open_clip_config.json, found {shown}.",
        hint=SUPPORTED,
    )


BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "builtin"


def locate(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The path of a checkpoint, and its hub id where it comes from there."""
    path = Path(source).expanduser()
    if str(source) == BUILTIN and not path.exists():
        return BUILTIN_FOLDER, None
    if path.exists():
        return path, None
    repo = hub.hub_id(str(source)) if isinstance(source, str) else None
    if repo is None:
        raise CheckpointError(
            f"There is no model at {printable(source)}.",
            hint="Give 'builtin', a folder, a .pt file, or a hub id such as openai/clip-vit-base-patch32.",
        )
    return hub.fetch(repo, revision, check=_check_config), repo


def _check_config(path: Path) -> None:
    """Raise for a configuration of a family that is not read."""
    if path.name == "config.json":
        hf.read_config(read_json(path), source=str(printable(path.parent)))
    elif path.name == openclip.CONFIG:
        openclip.read_config(openclip.model_config(path), source=str(printable(path.parent)))


def _tokenizer(given: str | Path | AnyTokenizer) -> AnyTokenizer:
    return Tokenizer.from_file(given) if isinstance(given, str | Path) else given


def _assemble(
    parts: Parts, tokenizer: AnyTokenizer | None, device: Device, dtype: Dtype | torch.dtype | None
) -> Model:
    with torch.device("meta"):
        module = CLIP(parts.config)
    assign(module, parts.state, source=parts.name)
    return Model(
        module,
        config=parts.config.to_json(),
        recipe=parts.recipe,
        tokenizer=tokenizer,
        name=parts.name,
        device=device,
        dtype=dtype,
        licence=parts.licence,
        format=parts.format,
    )


def export(model: Model, folder: str | Path, format: str = "hf") -> Path:
    """Write a plain CLIP for other programs: `hf` for transformers, `openclip` for OpenCLIP.

    The folder is new or empty; it is written whole or not at all. Models those formats cannot hold
    raise `Refusal`.
    """
    if format not in EXPORTS:
        raise UsageError(f"There is no export format {format!r}.", hint=f"Use {' or '.join(EXPORTS)}.")
    if model.system != "clip" or not isinstance(model.module, CLIP):
        raise Refusal(
            f"'{model.name}' is a model of the system '{model.system}'; only a plain CLIP can be exported.",
            hint="Keep it as a Moviola folder: model.save(folder).",
        )
    writer = hf.write if format == "hf" else openclip.write
    return writer(model, Path(folder))


def describe(source: str | Path | Model, *, revision: str | None = None) -> dict[str, Any]:
    """What a checkpoint is, for `moviola info`: plain values that JSON can hold."""
    model = source if isinstance(source, Model) else load(source, device="cpu", revision=revision)
    about: dict[str, Any] = {"name": model.name, "system": model.system, "format": model.format}
    if isinstance(model.module, CLIP):
        about |= _describe_clip(model.module.config)
    tokenizer = model.tokenizer
    return about | {
        "embedding": model.dim,
        "parameters": model.parameters,
        "logit_scale": round(model.logit_scale, 4),
        "tokenizer": None
        if tokenizer is None
        else {"tokens": tokenizer.size, "context_length": tokenizer.context_length, "hash": tokenizer.hash},
        "recipe": model.recipe.to_json(),
        "recipe_hash": model.recipe.hash,
        "hash": model.hash,
        "licence": model.licence,
        "base": model.base,
        "classes": model.classes,
    }


def _describe_clip(config: ClipConfig) -> dict[str, Any]:
    vision, text = config.vision, config.text
    if isinstance(vision, VitConfig):
        stem = f", convolutional stem {'-'.join(str(w) for w, _ in vision.stem)}" if vision.stem else ""
        tower = (
            f"ViT/{vision.patch_size}, {vision.layers} layers of {vision.width}, {vision.heads} heads{stem}"
        )
    else:
        tower = f"ModifiedResNet, stages {'-'.join(map(str, vision.layers))}, width {vision.width}"
    return {
        "vision": tower,
        "text": f"{text.layers} layers of {text.width}, {text.heads} heads, {text.vocab_size} tokens",
        "activation": config.activation,
        "image_size": vision.image_size,
        "context_length": text.context_length,
    }
