"""Tiny random CLIPs and a toy tokenizer, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.tokenizer import Tokenizer

TEXTS = ["a photo of a cat.", "It's two dogs &amp; one bird!", "", "日本 café"]


@pytest.fixture(scope="session")
def toy(oracles_dir: Path) -> dict:
    return json.loads((oracles_dir / "00-clip-tokenizer" / "a.json").read_text())


@pytest.fixture(scope="session")
def toy_tokenizer(toy: dict) -> Tokenizer:
    return Tokenizer.from_merges([(a, b) for a, b in toy["toy_merges"]], context_length=24)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(5)
    sizes = ((40, 40), (36, 60), (80, 44))
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def text_config(tokenizer: Tokenizer, **changes: object) -> TextConfig:
    made = {
        "context_length": tokenizer.context_length,
        "vocab_size": tokenizer.size,
        "width": 64,
        "layers": 2,
        "heads": 1,
    }
    return TextConfig(**{**made, **changes})  # type: ignore[arg-type]


CONFIGS: dict[str, Callable[[Tokenizer], ClipConfig]] = {
    "vit": lambda t: ClipConfig(24, VitConfig(32, 8, 128, 2, 2), text_config(t)),
    "vit-gelu": lambda t: ClipConfig(
        24, VitConfig(32, 16, 96, 2, 2, mlp_ratio=3.5), text_config(t, heads=4), "gelu"
    ),
    "resnet": lambda t: ClipConfig(24, ResNetConfig(64, 16, (1, 2, 1, 1), 8), text_config(t)),
    "stem": lambda t: ClipConfig(
        24, VitConfig(32, 8, 64, 1, 2, stem=((8, 1), (16, 1))), text_config(t), "gelu"
    ),
}


def randomize(module: nn.Module) -> nn.Module:
    """Random biases, norms and running statistics too, so that no two tensors can be mixed up unseen."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and name != "logit_scale":
                spread = 0.05 * torch.randn(tensor.shape)
                tensor.copy_(tensor + spread if tensor.ndim > 1 else (1 if "weight" in name else 0) + spread)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape))
    return module.eval()


@pytest.fixture
def make_model(toy_tokenizer: Tokenizer) -> Callable[..., Model]:
    def make(kind: str = "vit", **options: object) -> Model:
        config = CONFIGS[kind](toy_tokenizer)
        torch.manual_seed(0)
        module = randomize(CLIP(config))
        made = {"tokenizer": toy_tokenizer, "name": f"tiny-{kind}", "device": "cpu", **options}
        return Model(module, config=config.to_json(), **made)  # type: ignore[arg-type]

    return make
