"""A CLIP with a projection head on each tower, for objectives that compare in a space of their own.

Axis letters: B batch, E width of the towers, P width of the heads' vectors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, ResNetConfig, VitConfig
from moviola.clip.keys import load_exact
from moviola.clip.model import CLIP
from moviola.types import Refusal

HEADS = ("text_projection_head.", "image_projection_head.", "logit_scale_proto")
"""How the names of what is not the CLIP's begin."""


@dataclass(frozen=True)
class HeadedClipConfig(ClipConfig):
    """A CLIP with two heads, `head_dim` wide, of `head_layers` hidden layers (0: a linear map).

    The defaults are ProtoCLIP's: OpenAI's ResNet-50 and one hidden layer of 2048.
    """

    embed_dim: int = 1024
    vision: VitConfig | ResNetConfig = field(default_factory=ResNetConfig)
    head_layers: int = 1
    head_width: int = 2048
    head_dim: int = 128

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadedClipConfig:
        made = super().from_json(data)
        assert isinstance(made, cls)
        return replace(made, **{k: data[k] for k in ("head_layers", "head_width", "head_dim")})


def shape_of(config: ClipConfig) -> dict[str, Any]:
    """The fields of a plain `ClipConfig`."""
    return {f.name: getattr(config, f.name) for f in fields(ClipConfig)}


def projection_head(width: int, config: HeadedClipConfig) -> nn.Sequential:
    """Linear - BatchNorm - ReLU as often as there are hidden layers, then Linear."""
    layers: list[nn.Module] = []
    for _ in range(config.head_layers):
        layers += [nn.Linear(width, config.head_width), nn.BatchNorm1d(config.head_width), nn.ReLU()]
        width = config.head_width
    return nn.Sequential(*layers, nn.Linear(width, config.head_dim))


class HeadedClip(CLIP):
    """It embeds as the CLIP that it is; heads and second temperature serve its training alone."""

    config: HeadedClipConfig

    def __init__(self, config: HeadedClipConfig) -> None:
        super().__init__(config)
        self.text_projection_head = projection_head(config.embed_dim, config)
        self.image_projection_head = copy.deepcopy(self.text_projection_head)  # both start alike
        self.logit_scale_proto = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Self:
        """Untrained, from the JSON form of its configuration."""
        return cls(HeadedClipConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: nn.Module, *, seed: int = 0) -> Self:
        """The start of training from any CLIP: its towers, and new heads drawn from `seed`."""
        if not isinstance(clip, CLIP):
            raise Refusal(f"{cls.__name__} starts from a CLIP, got a {type(clip).__name__}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(HeadedClipConfig(**shape_of(clip.config)))
        heads = {k: v for k, v in made.state_dict().items() if k.startswith(HEADS)}
        own = {k: v for k, v in clip.state_dict().items() if not k.startswith(HEADS)}
        load_exact(made, own | heads, source="CLIP")
        return made.to(clip.logit_scale.device).eval()

    def to_clip(self) -> CLIP:
        """The CLIP without heads."""
        clip = CLIP(ClipConfig(**shape_of(self.config)))
        load_exact(clip, {k: v for k, v in self.state_dict().items() if not k.startswith(HEADS)})
        return clip.to(self.logit_scale.device).train(self.training)

    def project(self, image_BE: Tensor, text_BE: Tensor) -> tuple[Tensor, Tensor]:
        """The towers' vectors as they are through the heads: unit vectors (B, P), float32."""
        with torch.autocast(image_BE.device.type, enabled=False):
            image_BP = self.image_projection_head(image_BE.float())
            text_BP = self.text_projection_head(text_BE.float())
        return F.normalize(image_BP, dim=-1), F.normalize(text_BP, dim=-1)
