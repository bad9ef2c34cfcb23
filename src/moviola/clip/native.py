"""The house's own model folder: `moviola.json`, `model.safetensors`, `tokenizer.json`.

Every model of the house is such a folder: the built-in one, trained and adapted ones, video models.
`system` says which system's class reads `config`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moviola.clip.foreign_tokenizer import AnyTokenizer, read_tokenizer
from moviola.clip.keys import check_exact
from moviola.types import CheckpointError, Recipe, printable

MANIFEST, WEIGHTS = "moviola.json", "model.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Native:
    """A native folder as read: its manifest and, unless only described, its tensors."""

    system: str
    name: str
    config: dict[str, Any]
    recipe: Recipe
    base: dict[str, Any] | None
    classes: list[str] | None
    licence: str | None
    tokenizer: AnyTokenizer | None
    state: dict[str, Tensor]


def is_native(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_native(folder: str | Path) -> Native:
    """Read a native folder. Weights stay mapped to the file until they are changed or moved."""
    folder = Path(folder)
    data = read_json(folder / MANIFEST)
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise CheckpointError(f"{printable(folder / MANIFEST)} is not a model's manifest: it has no format.")
    if data["format"] > FORMAT:
        raise CheckpointError(
            f"{printable(folder)} has format {data['format']}, this version reads up to {FORMAT}.",
            hint="Upgrade with: pip install -U moviola",
        )
    missing = [key for key in ("system", "name", "config", "recipe") if key not in data]
    if missing:
        raise CheckpointError(f"{printable(folder / MANIFEST)} lacks {', '.join(missing)}.")
    recipe = Recipe.from_json(data["recipe"])
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder / "tokenizer.json", context_length=recipe.context_length)
        if recipe.tokenizer is not None and recipe.tokenizer != tokenizer.hash:
            raise CheckpointError(
                f"{printable(folder)} was made with another tokenizer: its recipe names {recipe.tokenizer}, "
                f"tokenizer.json is {tokenizer.hash}.",
                hint="Put the model's own tokenizer.json back.",
            )
    return Native(
        system=data["system"],
        name=data["name"],
        config=data["config"],
        recipe=recipe,
        base=data.get("base"),
        classes=data.get("classes"),
        licence=data.get("licence"),
        tokenizer=tokenizer,
        state=read_safetensors(folder / WEIGHTS),
    )


def write_native(
    folder: str | Path,
    *,
    system: str,
    name: str,
    config: Mapping[str, Any],
    recipe: Recipe,
    state: Mapping[str, Tensor],
    tokenizer: AnyTokenizer | None = None,
    base: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    licence: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a native folder whole or not at all. `dtype` stores float weights in another precision."""
    manifest = {
        "format": FORMAT,
        "system": system,
        "name": name,
        "config": dict(config),
        "recipe": recipe.to_json(),
        "base": None if base is None else dict(base),
        "classes": None if classes is None else list(classes),
        "licence": licence,
    }

    def fill(temporary: Path) -> None:
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        write_safetensors(temporary / WEIGHTS, state, dtype=dtype)
        if tokenizer is not None:
            tokenizer.save(temporary)

    return write_folder(Path(folder), fill, marker=MANIFEST)


def write_folder(folder: Path, fill: Callable[[Path], None], *, marker: str | None) -> Path:
    """Fill a new folder beside `folder`, then put it in its place by renaming.

    A folder that is already there is replaced only when it is empty or holds `marker`, the file that
    says it is a model of the same kind (None: only when it is empty).
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{printable(folder)} is a file, expected a folder to write the model to.")
    replaceable = marker is not None and (folder / marker).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not replaceable:
        raise CheckpointError(
            f"{printable(folder)} holds other files, so it is not overwritten.",
            hint="Name a new or empty folder.",
        )
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.writing")
    temporary.mkdir()
    try:
        fill(temporary)
        _sync(temporary)
        if folder.exists():
            old = temporary.with_suffix(".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _sync(folder: Path) -> None:
    """Have the files on the disk before the folder gets its name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def write_safetensors(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Tensors to one file, contiguous and on the CPU."""
    tensors = {}
    for key, tensor in state.items():
        tensor = tensor.detach().to(
            "cpu", dtype if dtype is not None and tensor.is_floating_point() else None
        )
        # a fresh copy for views: the format refuses tensors that share memory
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
    save_file(tensors, path, metadata=metadata or {"format": "pt"})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"There are no weights at {printable(path)}.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{printable(path)} is not a whole safetensors file: {error}.",
            hint="Download or copy it again.",
        ) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{printable(path)} is not valid JSON: {error}.") from error


def assign(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> nn.Module:
    """Give a module built on the meta device these tensors themselves, without a second copy.

    Half precision becomes float32; missing, unexpected or misshapen names raise `CheckpointError`.
    """
    check_exact(module, state, source=source)
    ready = {k: t.float() if t.is_floating_point() else t for k, t in state.items()}
    for key, tensor in module.state_dict().items():
        if key not in ready:  # only BatchNorm's step counter may be absent
            ready[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    module.load_state_dict(ready, assign=True)
    return module
