"""The shape of a CLIP: every constant of both towers is a field; the published sizes are presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from moviola.types import CheckpointError

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class VitConfig:
    """A vision transformer. `image_size` is (height, width), or one int for a square.

    `stem` lists stride-2 convolution stages before the patch convolution as (width, residual
    blocks); it is empty in every published CLIP. The built-in model uses it, since convolutions
    learn faster from few pictures. The patch convolution then covers `patch_size / 2**len(stem)` stem cells.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    stem: tuple[tuple[int, int], ...] = ()
    kind: Literal["vit"] = "vit"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = _pair(self.image_size)
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class ResNetConfig:
    """OpenAI's ModifiedResNet with attention pooling. `width` is the stem's output width."""

    image_size: int = 224
    width: int = 64
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    heads: int = 32
    kind: Literal["resnet"] = "resnet"


@dataclass(frozen=True)
class TextConfig:
    """The causal text transformer.

    `eot_id=None` pools at the largest id, as OpenAI's code does; a number pools at its first place.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    eot_id: int | None = None


@dataclass(frozen=True)
class ClipConfig:
    """A whole CLIP: two towers that meet in `embed_dim`."""

    embed_dim: int = 512
    vision: VitConfig | ResNetConfig = field(default_factory=VitConfig)
    text: TextConfig = field(default_factory=TextConfig)
    activation: Activation = "quick_gelu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClipConfig:
        """The inverse of `to_json`; a field that is not known raises `CheckpointError`."""
        vision = dict(data["vision"])
        vision_class = ResNetConfig if vision.get("kind") == "resnet" else VitConfig
        return cls(
            embed_dim=data["embed_dim"],
            vision=build_config(vision_class, vision),
            text=build_config(TextConfig, data["text"]),
            activation=data["activation"],
        )


def build_config(cls: Any, data: Mapping[str, Any]) -> Any:
    """A flat configuration from its JSON form: lists become tuples, unknown fields are an error."""
    unknown = sorted(set(data) - {f.name for f in fields(cls)})
    if unknown:
        raise CheckpointError(
            f"The model's configuration has fields this version does not know: {', '.join(unknown)}.",
            hint="Upgrade with: pip install -U moviola",
        )
    return cls(**{k: _tuples(v) for k, v in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def vit_b_32() -> ClipConfig:
    return ClipConfig()


def vit_b_16() -> ClipConfig:
    return ClipConfig(vision=VitConfig(patch_size=16))


def vit_l_14(image_size: int = 224) -> ClipConfig:
    return ClipConfig(
        embed_dim=768,
        vision=VitConfig(image_size=image_size, patch_size=14, width=1024, layers=24, heads=16),
        text=TextConfig(width=768, heads=12),
    )


def rn50() -> ClipConfig:
    return ClipConfig(embed_dim=1024, vision=ResNetConfig())
