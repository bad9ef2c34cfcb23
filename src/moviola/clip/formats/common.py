"""What the readers of all formats share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moviola.clip.config import ClipConfig
from moviola.types import CheckpointError, Recipe

SUPPORTED = (
    "Supported are CLIP models in Hugging Face format, in OpenCLIP format (ViT and ModifiedResNet) "
    "and OpenAI's .pt files."
)


@dataclass
class Parts:
    """A checkpoint in the house's words: configuration, tensors under OpenAI's names, recipe."""

    format: str
    name: str
    config: ClipConfig
    state: dict[str, Tensor]
    recipe: Recipe
    tokenizer: Path | None = None
    licence: str | None = None
    notes: list[str] = field(default_factory=list)


def refuse(source: object, family: str) -> CheckpointError:
    """The refusal of a checkpoint of another family, by its name."""
    return CheckpointError(f"{source} is {family}, which this version does not run.", hint=SUPPORTED)


def ratio(hidden: int, width: int) -> float:
    """The MLP ratio whose product with the width, rounded down, is `hidden` again."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def stated_licence(folder: Path, *configs: Mapping[str, Any]) -> str | None:
    """The licence in a configuration or in the front matter of README.md."""
    for config in configs:
        for key in ("license", "licence"):
            if isinstance(config.get(key), str):
                return config[key]
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S.*?)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1).strip("'\"") if found else None


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a configuration; anything else is an error that names the key."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"The configuration's {key} should be a whole number above zero, got {value!r}."
        )
    return value


def triple(value: Any, key: str) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError(f"The configuration's {key} should be three numbers, got {value!r}.")
    return float(value[0]), float(value[1]), float(value[2])


def scalar_logit_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some files hold the logit scale as a list of one number."""
    scale = state.get("logit_scale")
    if scale is not None and scale.numel() == 1:
        state["logit_scale"] = scale.reshape(())
    return state
