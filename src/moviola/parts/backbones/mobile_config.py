"""The shape of a MobileCLIP: its configuration, the published sizes, and reading one off a checkpoint.

Heads and causality are not in the weights: `infer_config` takes 64 channels a head, and a causal text tower
beside the ViT only. Both hold for the four published models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from moviola.parts.backbones.fastvit import FastVitConfig, Mixer, mci0, mci1, mci2
from moviola.parts.backbones.mobile_transformer import MobileTextConfig, MobileVitConfig
from moviola.types import CheckpointError


@dataclass(frozen=True)
class MobileClipConfig:
    """Two towers that meet in `embed_dim`. `folded`: built without the branches of training."""

    embed_dim: int = 512
    vision: FastVitConfig | MobileVitConfig = field(default_factory=FastVitConfig)
    text: MobileTextConfig = field(default_factory=MobileTextConfig)
    folded: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MobileClipConfig:
        vision = MobileVitConfig if data["vision"].get("kind") == "mobile-vit" else FastVitConfig
        made = {
            name: _section(kind, data[name])
            for name, kind in (("vision", vision), ("text", MobileTextConfig))
        }
        return cls(**{**data, **made})


def _section(kind: Any, data: Mapping[str, Any]) -> Any:
    unknown = sorted(set(data) - {f.name for f in fields(kind)})
    if unknown:
        raise CheckpointError(
            f"The model's configuration has fields this version does not know: {', '.join(unknown)}.",
            hint="Upgrade with: pip install -U moviola",
        )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def mobileclip_s0() -> MobileClipConfig:
    return MobileClipConfig(vision=mci0(), text=MobileTextConfig("mct", layers=4))


def mobileclip_s1() -> MobileClipConfig:
    return MobileClipConfig(vision=mci1())


def mobileclip_s2() -> MobileClipConfig:
    return MobileClipConfig(vision=mci2())


def mobileclip_b() -> MobileClipConfig:
    """ViT-B/16 at 224 pixels. MobileCLIP-B (LT) is this too, trained longer."""
    return MobileClipConfig(vision=MobileVitConfig(), text=MobileTextConfig(causal=True))


HEAD_WIDTH = 64
"""Channels a head in every published MobileCLIP transformer; the weights do not say."""


class Shapes:
    """Shapes by name, with an error that says what is missing."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.of = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.of

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.of:
            raise CheckpointError(f"This is not a whole MobileCLIP checkpoint: it lacks {name}.")
        return self.of[name]

    def numbers(self, before: str, after: str = "") -> list[int]:
        """The numbers n of names that begin with before + n + "." + after."""
        pattern = re.compile(rf"{re.escape(before)}(\d+)\.{re.escape(after)}")
        found = (pattern.match(name) for name in self.of)
        return sorted({int(match.group(1)) for match in found if match})


def text_config(shapes: Shapes, *, causal: bool, at: str = "text_encoder.") -> MobileTextConfig:
    vocabulary, width = shapes[f"{at}embedding_layer.weight"]
    blocks = shapes.numbers(f"{at}transformer.", "pre_norm_ffn")
    if not blocks:
        raise CheckpointError("This is not a whole MobileCLIP checkpoint: its text tower has no layers.")
    ratios = tuple(shapes[f"{at}transformer.{n}.pre_norm_ffn.1.weight"][0] / width for n in blocks)
    mixer = f"{at}transformer.0.convffn."
    mixed = f"{mixer}conv.conv.weight" in shapes
    return MobileTextConfig(
        "mct" if mixed else "base",
        causal=causal,
        context_length=shapes[f"{at}positional_embedding.pos_embed.pos_embed"][2],
        vocab_size=vocabulary,
        width=width,
        layers=len(blocks),
        heads=max(1, width // HEAD_WIDTH),
        ffn_multipliers=ratios[0] if len(set(ratios)) == 1 else ratios,
        mixer_kernel=shapes[f"{mixer}conv.conv.weight"][3] if mixed else 11,
        mixer_ratio=shapes[f"{mixer}fc1.weight"][0] / width if mixed else 4.0,
    )


def vit_config(shapes: Shapes, at: str) -> MobileVitConfig:
    width, places = shapes[f"{at}cls_token"][2], shapes[f"{at}pos_embed.pos_embed.pos_embed"][2]
    layers = len(shapes.numbers(f"{at}transformer."))
    ratio = shapes[f"{at}transformer.0.pre_norm_ffn.1.weight"][0] / width
    return MobileVitConfig(16 * math.isqrt(places), width, layers, max(1, width // HEAD_WIDTH), ratio)


def fastvit_config(shapes: Shapes, at: str, *, folded: bool) -> FastVitConfig:
    layers: list[int] = []
    dims: list[int] = []
    ratios: list[float] = []
    mixers: list[Mixer] = []
    squeeze, positions, kernel, patch, position = [False], [False], 3, 7, 7
    for n in shapes.numbers(f"{at}network."):
        part = f"{at}network.{n}."
        place = f"{part}{'reparam_conv' if folded else 'pe'}.weight"
        if place in shapes:
            positions[-1], position = True, shapes[place][3]
        elif shapes.numbers(f"{part}proj."):
            squeeze.append(f"{part}proj.0.se.fc1.weight" in shapes)
            positions.append(False)
            patch = shapes[f"{part}proj.0.{'lkb_reparam' if folded else 'lkb_origin.conv'}.weight"][3]
        else:
            hidden, width = shapes[f"{part}0.convffn.fc1.weight"][:2]
            attention = f"{part}0.token_mixer.qkv.weight" in shapes
            if not attention:
                branch = "reparam_conv" if folded else "mixer.rbr_conv.0.conv"
                kernel = shapes[f"{part}0.token_mixer.{branch}.weight"][3]
            layers.append(len(shapes.numbers(part)))
            dims.append(width)
            ratios.append(hidden / width)
            mixers.append("attention" if attention else "repmixer")
    if len(layers) != len(squeeze):
        raise CheckpointError("This is not a whole MobileCLIP checkpoint: its image tower lacks stages.")
    return FastVitConfig(
        tuple(layers),
        tuple(dims),
        tuple(ratios),
        tuple(mixers),
        tuple(squeeze),
        tuple(positions),
        kernel,
        patch,
        position,
        expansion=shapes[f"{at}head.proj"][0] / dims[-1],
    )


def infer_config(state: Mapping[str, Tensor]) -> MobileClipConfig:
    """The configuration of an official state dict. `CheckpointError` where a tensor it needs is missing."""
    shapes, at = Shapes(state), "image_encoder.model."
    vit = f"{at}cls_token" in shapes
    dim, text = shapes["text_encoder.projection_layer"][1], text_config(shapes, causal=vit)
    if vit:
        return MobileClipConfig(dim, vit_config(shapes, at), text)
    folded = f"{at}patch_embed.0.reparam_conv.weight" in shapes
    return MobileClipConfig(dim, fastvit_config(shapes, at, folded=folded), text, folded)
