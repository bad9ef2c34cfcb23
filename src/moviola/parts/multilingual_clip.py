"""A CLIP whose text tower is a transformer of many languages: OpenCLIP's ViT beside XLM-RoBERTa.

Parameters carry OpenCLIP's names: `visual.*`, `text.transformer.*`, `text.proj.*`, `logit_scale`.

Axis letters: B batch, N texts, M videos, T frames, C channels, H height, W width, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import Activation, VitConfig, build_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import mean_of_frames
from moviola.clip.native import assign
from moviola.clip.vit import VisionTransformer
from moviola.parts.backbones.hf_text import HfTextConfig, HfTextTower, Projection
from moviola.types import CheckpointError, ClipBatch, FrameSpec, Recipe


@dataclass(frozen=True)
class MultilingualClipConfig:
    """ViT-B/32 beside XLM-RoBERTa-base, which meet in 512 numbers."""

    embed_dim: int = 512
    vision: VitConfig = field(default_factory=VitConfig)
    text: HfTextConfig = field(default_factory=HfTextConfig)
    activation: Activation = "gelu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MultilingualClipConfig:
        vision, text = build_config(VitConfig, data["vision"]), HfTextConfig.from_json(data["text"])
        return build_config(cls, {**data, "vision": vision, "text": text})


OPENCLIP_KEYS = Keys(
    Rule("{rest}", "{rest}"),
    ignore=(
        "text.transformer.embeddings.position_ids",
        "text.transformer.embeddings.token_type_ids",
        "text.transformer.pooler.{rest}",
    ),
)
"""OpenCLIP's names are the house's; old files carry position numbers and a pooler that is not used."""


class MultilingualClip(nn.Module):
    """An image tower and a multilingual text tower. Implements `moviola.types.Encoder`.

    Texts are filled up with `pad_id`. A video is the mean of its normalised frame vectors.
    """

    has_text = True
    separable = True
    adaptation: Literal["none", "embedding", "classifier"] = "none"
    frame_spec = FrameSpec(count=None, sampler="middle", padding="mask")

    def __init__(self, config: MultilingualClipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config.vision, config.embed_dim, config.activation)
        self.text = HfTextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Self:
        """Untrained, from the JSON form of its configuration."""
        return cls(MultilingualClipConfig.from_json(data))

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], config: MultilingualClipConfig | None = None) -> Self:
        """From OpenCLIP's state dict; without `config` its sizes are read from the shapes.

        Shapes do not tell the number of heads (taken as one per 64 of width, as in every released model),
        the pooling (the mean) and the padding's id (1). Raises `CheckpointError` for names that do not fit.
        """
        module = cls(config or _config_of(state))
        state = {k: t.reshape(()) if k == "logit_scale" else t for k, t in state.items()}
        assign(module, OPENCLIP_KEYS.from_official(state), source="checkpoint")
        return module.eval()

    @property
    def recipe(self) -> Recipe:
        """OpenCLIP's preparation at the size the tower was built for."""
        size = self.config.vision.image_size
        size = (size, size) if isinstance(size, int) else size
        return Recipe(size=size, context_length=self.context_length)

    @property
    def dim(self) -> int:
        return self.config.embed_dim

    @property
    def context_length(self) -> int:
        return self.config.text.context_length

    @property
    def pad_id(self) -> int:
        return self.config.text.pad_id

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.text.token_embedding

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        return self.text(tokens_NL)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.visual(pixels_BCHW).vector_BD

    def encode_video(self, batch: ClipBatch) -> Tensor:
        frames_BTCHW = batch.frames_BTCHW
        frames_BTD = self.encode_image(frames_BTCHW.flatten(0, 1)).unflatten(0, frames_BTCHW.shape[:2])
        return mean_of_frames(frames_BTD, batch.mask_BT)

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return video

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Cosine times the logit scale: text_ND, video_MD -> scores_NM."""
        return self.logit_scale.exp() * F.normalize(text_ND, dim=-1) @ F.normalize(video, dim=-1).T


def _config_of(state: Mapping[str, Tensor]) -> MultilingualClipConfig:
    """Sizes of an OpenCLIP checkpoint with a RoBERTa-like text tower, from its shapes."""

    def layers(prefix: str) -> int:
        numbers = {int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix)}
        return len(numbers)

    text = "text.transformer."
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        side = round(math.sqrt(len(state["visual.positional_embedding"]) - 1))
        mlp = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
        vocabulary, text_width = state[f"{text}embeddings.word_embeddings.weight"].shape
        positions = len(state[f"{text}embeddings.position_embeddings.weight"])
        types = len(state[f"{text}embeddings.token_type_embeddings.weight"])
        hidden = len(state[f"{text}encoder.layer.0.intermediate.dense.bias"])
        embed_dim = state["visual.proj"].shape[1]
    except KeyError as error:
        raise CheckpointError(
            f"Not a CLIP with a RoBERTa-like text tower: it has no {error.args[0]}.",
            hint="Expected OpenCLIP's names: visual.*, text.transformer.*, text.proj.*, logit_scale.",
        ) from error
    projection: Projection = "none"
    if "text.proj.weight" in state or "text.proj.0.weight" in state:
        projection = "linear" if "text.proj.weight" in state else "mlp"
    vision = VitConfig(
        side * patch, patch, width, layers("visual.transformer.resblocks."), max(1, width // 64), mlp / width
    )
    return MultilingualClipConfig(
        embed_dim,
        vision,
        HfTextConfig(
            vocab_size=vocabulary,
            width=text_width,
            layers=layers(f"{text}encoder.layer."),
            heads=max(1, text_width // 64),
            hidden=hidden,
            positions=positions,
            types=types,
            context_length=min(77, positions - 2),
            projection=projection,
        ),
    )
