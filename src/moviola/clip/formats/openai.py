"""OpenAI's `.pt`: a TorchScript archive or a plain state dict. The configuration follows from the shapes.

The file carries no tokenizer, and neither the head counts nor the activation: heads are 64 wide in
every OpenAI release, and the activation is QuickGELU.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.formats.common import Parts, ratio, scalar_logit_scale
from moviola.clip.formats.openclip import plain_names
from moviola.clip.weights import read_weights
from moviola.types import CheckpointError, Recipe, printable

_MARKS = ("input_resolution", "context_length", "vocab_size")
_HEAD = 64


def read(path: Path) -> Parts:
    """Read a `.pt` (or a bare `.bin` or `.pth`) that holds CLIP's weights."""
    state = plain_names(read_weights(path))
    marked = [state.pop(mark, None) is not None for mark in _MARKS]
    config = infer_config(state, source=str(printable(path)))
    notes = []
    if not any(marked):
        notes.append(
            f"{printable(path)} does not say its activation; QuickGELU is assumed, as OpenAI's models have. "
            "For a model trained by OpenCLIP with GELU, give its folder with open_clip_config.json instead."
        )
        warnings.warn(notes[0], stacklevel=2)
    size = config.vision.image_size
    assert isinstance(size, int)
    return Parts(
        format="openai",
        name=path.stem,
        config=config,
        state=scalar_logit_scale(state),
        recipe=Recipe(size=(size, size)),
        notes=notes,
    )


def infer_config(state: Mapping[str, Tensor], *, source: str) -> ClipConfig:
    """The configuration of a CLIP whose tensors carry OpenAI's names."""
    needed = ("text_projection", "positional_embedding", "token_embedding.weight", "ln_final.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"{source} is not a CLIP of OpenAI's layout: it lacks {', '.join(missing)}. "
            f"Its first names are {', '.join(list(state)[:4])}.",
            hint="Give a folder with its configuration, in Hugging Face or OpenCLIP format.",
        )
    width = state["ln_final.weight"].shape[0]
    text = TextConfig(
        context_length=state["positional_embedding"].shape[0],
        vocab_size=state["token_embedding.weight"].shape[0],
        width=width,
        layers=_count(state, r"transformer\.resblocks\.(\d+)\."),
        heads=max(1, width // _HEAD),
        mlp_ratio=_mlp_ratio(state, "transformer", width),
    )
    tower: VitConfig | ResNetConfig
    if "visual.proj" in state:
        grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
        wide, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
        tower = VitConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=wide,
            layers=_count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            heads=max(1, wide // _HEAD),
            mlp_ratio=_mlp_ratio(state, "visual.transformer", wide),
        )
    elif "visual.attnpool.positional_embedding" in state:
        grid = math.isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1)
        wide = state["visual.layer1.0.conv1.weight"].shape[0]
        a, b, c, d = (_count(state, rf"visual\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
        tower = ResNetConfig(
            image_size=grid * 32, width=wide, layers=(a, b, c, d), heads=max(1, wide * 32 // _HEAD)
        )
    else:
        raise CheckpointError(
            f"{source} has a picture tower of an unknown kind: neither visual.proj nor visual.attnpool.",
            hint="Give a folder with its configuration, in Hugging Face or OpenCLIP format.",
        )
    return ClipConfig(state["text_projection"].shape[1], tower, text, "quick_gelu")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(m.group(1)) for m in map(re.compile(pattern).match, state) if m]
    return max(found, default=-1) + 1


def _mlp_ratio(state: Mapping[str, Tensor], tower: str, width: int) -> float:
    hidden = state.get(f"{tower}.resblocks.0.mlp.c_fc.weight", torch.empty(4 * width, 0)).shape[0]
    return ratio(hidden, width)
