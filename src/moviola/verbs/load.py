"""`load`: a model by name, folder, file or hub id, whichever system it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moviola.types import (
    CheckpointError,
    Dtype,
    MoviolaError,
    Recipe,
    Refusal,
    System,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moviola.clip.foreign_tokenizer import AnyTokenizer
    from moviola.clip.loaded import Model
    from moviola.clip.native import Native

BUILTIN = "builtin"


def load(
    source: str | Path = BUILTIN,
    *,
    init: str | Path | Model | None = None,
    base: str | Path | Model | None = None,
    classes: Sequence[str] | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | AnyTokenizer | None = None,
    revision: str | None = None,
) -> Model:
    """A model ready to embed.

    `source` is `builtin`; a model folder (ours, Hugging Face CLIP, OpenCLIP), or a run's folder with one in
    it; an OpenAI `.pt`; the file of a system's authors, told by the names in it; a hub id such as
    `openai/clip-vit-base-patch32`; or a system's slug with `init=` naming the CLIP to start from
    (`load("xpool", init="builtin")`). `base` is where the model lies that an adapted one was made from, if
    it was moved; authors' files of prompts need it, and the names of `classes`. `device` is auto, cpu, cuda
    or mps; `dtype` float32, bfloat16 or float16; `tokenizer` a file (or what was read from it) for
    checkpoints that come without one; `revision` a hub revision. Raises `CheckpointError` when it cannot be
    read, is of an unsupported family, or is not there.
    """
    loaded = _load(source, init, base, classes, device, dtype, tokenizer, revision)
    if init is None:
        loaded.source = str(source)
    return loaded


def _load(
    source: str | Path,
    init: str | Path | Model | None,
    base: str | Path | Model | None,
    classes: Sequence[str] | None,
    device: str,
    dtype: Dtype | None,
    tokenizer: str | Path | AnyTokenizer | None,
    revision: str | None,
) -> Model:
    from moviola.clip.formats import BUILTIN_FOLDER
    from moviola.clip.formats import load as load_clip
    from moviola.clip.native import is_native, read_native
    from moviola.systems.registry import entry_class

    if init is not None:
        return _start_system(str(source), init, device=device, dtype=dtype, tokenizer=tokenizer)
    if str(source) == BUILTIN and not Path(source).exists():
        source = BUILTIN_FOLDER
    path = _model_in(Path(source))
    if path.is_dir() and is_native(path):
        native = read_native(path)
        if native.system != "clip":
            return _restore_system(native, path, base=base, device=device, dtype=dtype)
    elif not path.exists() and _is_slug(str(source)):
        raise UsageError(
            f"{source} is a system, not a checkpoint: it needs a CLIP to start from.",
            hint=f"Use load('{source}', init='builtin'), or another CLIP as init.",
        )
    if path.is_dir() and (weights := _library_text_weights(path)) is not None:
        beside = path / "tokenizer.json"
        if tokenizer is None and beside.is_file():
            tokenizer = beside
        path = weights
    official = _official(path) if path.is_file() else None
    if official is not None:
        if hasattr(entry_class(official[0]), "from_base"):
            return _load_adaptation(*official, path, base=base, classes=classes, device=device, dtype=dtype)
        return _load_official(*official, path, base=base, device=device, dtype=dtype, tokenizer=tokenizer)
    place = path if path.is_dir() else source
    return load_clip(place, device=device, dtype=dtype, tokenizer=tokenizer, revision=revision)


def as_model(
    model: str | Path | Model,
    *,
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | AnyTokenizer | None = None,
) -> Model:
    """A loaded model as it is, anything else through `load`."""
    from moviola.clip.loaded import Model as LoadedModel

    if isinstance(model, LoadedModel):
        return model
    return load(model, device=device, dtype=dtype, tokenizer=tokenizer)


def info(source: str | Path = BUILTIN, *, revision: str | None = None) -> dict[str, Any]:
    """What a checkpoint is: format, architecture, activation, recipe, hash, licence if stated."""
    from moviola.clip.formats import describe

    return describe(_model_in(Path(source)) if Path(source).is_dir() else source, revision=revision)


def export(model: str | Path | Model, folder: str | Path, *, format: str = "hf") -> Path:
    """Write `model` as a Hugging Face (`hf`) or OpenCLIP (`openclip`) folder, whole or not at all.

    A system's model that has a plain CLIP in it (`to_clip`) is written as that.
    """
    from moviola.clip.formats import export as export_clip

    return export_clip(_plain(as_model(model, device="cpu")), folder, format=format)


def _plain(model: Model) -> Model:
    """The plain CLIP inside a system's model, where there is one; else the model itself."""
    if model.system == "clip" or not hasattr(model.module, "to_clip"):
        return model
    module: Any = model.module
    return model.around(module.to_clip(), system="clip")


def _model_in(path: Path) -> Path:
    """The folder itself, or of a run's folder (`moviola train`, `adapt --tasks`) the model in it."""
    from moviola.clip.native import is_native

    inside = path / "model"
    return inside if path.is_dir() and not is_native(path) and is_native(inside) else path


def _is_slug(name: str) -> bool:
    from moviola.systems.registry import all_systems

    return any(system.slug == name for system in all_systems())


def _start_system(
    slug: str,
    init: str | Path | Model,
    *,
    device: str,
    dtype: Dtype | None,
    tokenizer: str | Path | AnyTokenizer | None,
) -> Model:
    from moviola.systems.registry import entry_class, find

    system = find(slug)
    cls = entry_class(system)
    if not hasattr(cls, "from_clip"):
        raise Refusal(
            f"{system.slug} ({system.title}) does not start from a CLIP.",
            hint=f"Its call is: {system.call}",
        )
    base = as_model(init, device="cpu", tokenizer=tokenizer)
    module = cls.from_clip(base.module)
    name, origin = f"{system.slug} from {base.name}", {"name": base.name, "hash": base.hash}
    return base.around(module, name=name, system=system.slug, device=device, dtype=dtype, base=origin)


def _restore_system(
    native: Native, folder: Path, *, base: str | Path | Model | None, device: str, dtype: Dtype | None
) -> Model:
    """What was saved of a system's model; an adapted one is put around the model it was made from."""
    from moviola.clip.loaded import Model as LoadedModel
    from moviola.clip.native import assign
    from moviola.systems.registry import model_class

    cls, tokenizer = model_class(native.system), native.tokenizer
    if hasattr(cls, "from_base"):
        found = _base_of(native, folder, base)
        module, tokenizer = cls.from_base(found, native.config, native.classes or ()), found.tokenizer
        module.load_own(native.state, source=native.name)
    else:
        module = cls.from_config(native.config)
        assign(module, native.state, source=native.name)
    return LoadedModel(
        module,
        config=native.config,
        recipe=native.recipe,
        tokenizer=tokenizer,
        name=native.name,
        system=native.system,
        device=device,
        dtype=dtype,
        licence=native.licence,
        base=native.base,
        classes=native.classes,
    )


def _base_of(native: Native, folder: Path, base: str | Path | Model | None) -> Model:
    """The model that `folder` was adapted from: `base`, else where it was, seen from here or from there."""
    told = native.base or {}
    if base is None:
        near = folder / str(told.get("relative", ""))
        base = near if told.get("relative") and near.exists() else str(told.get("source", BUILTIN))
    hint = f"Name it: load({str(folder)!r}, base=...)."
    try:
        found = as_model(base, device="cpu")
    except MoviolaError as error:
        raise CheckpointError(
            f"'{native.name}' was adapted from '{told.get('name')}', which cannot be loaded: {error.problem}",
            hint=hint,
        ) from error
    if found.hash != told.get("hash"):
        raise CheckpointError(
            f"'{native.name}' was adapted from '{told.get('name')}' (hash {told.get('hash')}), "
            f"but '{found.name}' has the hash {found.hash}.",
            hint=hint,
        )
    return found


def _library_text_weights(folder: Path) -> Path | None:
    """The weights of an OpenCLIP folder whose text tower is a library's model (`hf_model_name`)."""
    from moviola.clip.formats import openclip

    if not (folder / openclip.CONFIG).is_file():
        return None
    if "hf_model_name" not in (openclip.model_config(folder / openclip.CONFIG).get("text_cfg") or {}):
        return None
    return next((folder / name for name in openclip.WEIGHTS if (folder / name).is_file()), None)


_WEIGHTS = (".pt", ".pth", ".pyth", ".bin", ".ckpt", ".safetensors")


def _official(path: Path) -> tuple[System, dict[str, Tensor]] | None:
    """The system whose authors wrote this file of weights, told by the names in it, and its tensors."""
    from moviola.clip.weights import is_torchscript, read_weights
    from moviola.systems.registry import all_systems

    known = path.suffix.lower() in _WEIGHTS or ".pth.tar" in path.name.lower()  # Dassl's model.pth.tar-50
    if not known or (path.suffix != ".safetensors" and is_torchscript(path)):
        return None
    state = read_weights(path)
    for system in all_systems():
        if any(marks and set(marks) <= set(state) for marks in (system.marks, *system.more_marks)):
            return system, state
    return None


def _load_official(
    system: System,
    state: dict[str, Tensor],
    path: Path,
    *,
    base: str | Path | Model | None,
    device: str,
    dtype: Dtype | None,
    tokenizer: str | Path | AnyTokenizer | None,
) -> Model:
    from moviola.clip.foreign_tokenizer import read_tokenizer
    from moviola.clip.loaded import Model as LoadedModel
    from moviola.systems.registry import entry_class

    cls = entry_class(system)
    start = None
    if base is not None and "base" in signature(cls.from_official).parameters:
        start = as_model(base, device="cpu")
        tokenizer = tokenizer or start.tokenizer
    module = cls.from_official(state) if start is None else cls.from_official(state, start.module)
    given = read_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    return LoadedModel(
        module,
        config=module.config.to_json(),
        recipe=recipe_of(module) if start is None else start.recipe,
        tokenizer=given,
        name=path.stem,
        system=system.slug,
        device=device,
        dtype=dtype,
        format=f"{system.slug}, official",
    )


def _load_adaptation(
    system: System,
    state: dict[str, Tensor],
    path: Path,
    *,
    base: str | Path | Model | None,
    classes: Sequence[str] | None,
    device: str,
    dtype: Dtype | None,
) -> Model:
    """What a system's authors saved of an adaptation, on the model it was trained on, for any class names."""
    from moviola.systems.registry import entry_class

    if base is None or not classes:
        raise UsageError(
            f"{printable(path)} holds what {system.slug} adds to a model, not the model nor class names.",
            hint=f"Name both: load({str(path)!r}, base=MODEL, classes=[...]).",
        )
    found = as_model(base, device="cpu")
    module = entry_class(system).from_official(state, found, list(classes))
    return found.around(
        module,
        name=path.stem,
        system=system.slug,
        device=device,
        dtype=dtype,
        base=base_card(found),
        classes=list(classes),
        format=f"{system.slug}, official",
    )


def base_card(model: Model) -> dict[str, Any]:
    """How a folder tells of the model it was made from: name, hash and where it was loaded from."""
    told: dict[str, Any] = {"name": model.name, "hash": model.hash}
    if model.source is not None:
        path = Path(model.source)
        told["source"] = str(path.absolute()) if path.exists() else model.source
    return told


def recipe_of(module: Any) -> Recipe:
    """The recipe a system states for its weights; else OpenAI's at the size of its CLIP."""
    own = getattr(module, "recipe", None)
    if isinstance(own, Recipe):
        return own
    from moviola.clip.config import ClipConfig

    config = getattr(module.config, "clip", module.config)
    if not isinstance(config, ClipConfig):
        raise UsageError(f"{type(module).__name__} states no recipe for its pictures.")
    size = config.vision.image_size
    return Recipe(size=(size, size) if isinstance(size, int) else size)
