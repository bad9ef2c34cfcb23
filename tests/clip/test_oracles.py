"""Parity with what OpenAI's own code computes: every output and every gradient of the oracles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.keys import load_exact
from moviola.clip.model import CLIP


def build(c: dict) -> CLIP:
    text = TextConfig(
        context_length=c["context_length"],
        vocab_size=c["vocab_size"],
        width=c["transformer_width"],
        layers=c["transformer_layers"],
        heads=c["transformer_heads"],
    )
    size, width, heads = c["image_resolution"], c["vision_width"], c["vision_heads"]
    vision: VitConfig | ResNetConfig
    if c["kind"] == "vit":
        vision = VitConfig(size, c["vision_patch_size"], width, c["vision_layers"], heads)
    else:
        vision = ResNetConfig(size, width, tuple(c["vision_layers"]), heads)
    return CLIP(ClipConfig(c["embed_dim"], vision, text)).eval()


def close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    bound = tolerance * expected.abs().max().item() + 1e-7
    assert got.shape == expected.shape, name
    assert (got - expected).abs().max().item() <= bound, name


@pytest.mark.parametrize("name", ["00-clip-vit", "00-clip-rn"])
def test_every_output_and_gradient(name: str, oracles_dir: Path) -> None:
    about = json.loads((oracles_dir / name / "a.json").read_text())
    data = load_file(oracles_dir / name / "a.safetensors")
    model = build(about["config"])
    load_exact(model, {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")})

    image, tokens = data["in/image"], data["in/text"]
    seen = model.visual(image, range(4))
    read = model.forward_text(tokens, range(4))
    logits, logits_T = model(image, tokens)
    labels = torch.arange(len(image))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits_T, labels)) / 2
    got = {
        "image_features": seen.vector_BD,
        "text_features": read.vector_BD,
        "logits_per_image": logits,
        "logits_per_text": logits_T,
        "contrastive_loss": loss,
        "text_block0": read.layers[0],
        "text_ln_final": read.tokens_BLD,
    }
    if about["config"]["kind"] == "vit":
        got |= {"visual_ln_pre": model.visual.embed(image), "visual_block0": seen.layers[0]}
    else:
        got["visual_stem"] = model.visual.stem(image)
        got |= {f"visual_layer{n + 1}": seen.layers[n] for n in range(4)}
    outputs = {k.removeprefix("out/") for k in data if k.startswith("out/")}
    assert outputs <= set(got), outputs - set(got)
    for key in outputs:
        close(key, got[key].detach(), data[f"out/{key}"].reshape(got[key].shape), about["tolerance"])

    loss.backward()
    own = dict(model.named_parameters())
    gradients = {k.removeprefix("grad/"): v for k, v in data.items() if k.startswith("grad/")}
    assert gradients
    for key, expected in gradients.items():
        gradient = own[key].grad
        assert gradient is not None, key
        close(key, gradient, expected, about["tolerance_grad"])


def test_short_texts_may_be_cut_without_changing_a_vector(oracles_dir: Path) -> None:
    about = json.loads((oracles_dir / "00-clip-vit" / "a.json").read_text())
    model = build(about["config"])
    tokens = torch.zeros(3, 16, dtype=torch.long)
    for row, length in enumerate((2, 5, 9)):
        tokens[row, 0], tokens[row, 1 : length - 1], tokens[row, length - 1] = 98, 7 + row, 99
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), model.forward_text(tokens).vector_BD)
