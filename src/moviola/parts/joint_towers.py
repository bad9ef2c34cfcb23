"""A video tower named as timm's ViT beside DistilBERT, each projected to where their cosine is the score.

What Frozen in Time (Bain et al. 2021) and its followers share, in the authors' names.

Axis letters: N texts, M videos, L tokens, D embedding width, T frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import VitConfig
from moviola.clip.keys import Keys
from moviola.clip.native import assign
from moviola.parts.backbones.hf_text import DistilBertTower, HfTextConfig
from moviola.types import Recipe

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class JointConfig(Protocol):
    @property
    def vision(self) -> VitConfig: ...
    @property
    def text(self) -> HfTextConfig: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def temperature(self) -> float: ...


class JointTowers(nn.Module):
    """The half of `moviola.types.Encoder` that does not depend on the video tower.

    Texts are filled up with id 0. With `projected` each side has a linear map, the text's after a ReLU.
    """

    has_text = True
    separable = True
    adaptation: Literal["none", "embedding", "classifier"] = "none"
    config: JointConfig

    def __init__(self, config: JointConfig, video_model: nn.Module, *, projected: bool = True) -> None:
        super().__init__()
        self.config = config
        self.video_model: Any = video_model
        self.text_model = DistilBertTower(config.text, config.text.width)
        self.txt_proj: nn.Module = nn.Identity()
        self.vid_proj: nn.Module = nn.Identity()
        if projected:
            self.txt_proj = nn.Sequential(nn.ReLU(), nn.Linear(config.text.width, config.embed_dim))
            self.vid_proj = nn.Sequential(nn.Linear(config.vision.width, config.embed_dim))

    def start_towers(
        self, image: Mapping[str, Tensor], text: Mapping[str, Tensor], keys: Keys, new: Sequence[str]
    ) -> None:
        """Take the weights of an image ViT by timm's names and of the library's DistilBERT, in place.

        Parameters whose names hold one of `new` stay as they are; heads of either source are left out.
        """
        state = {k: t for k, t in self.state_dict().items() if any(part in k for part in new)}
        text = {k.removeprefix("distilbert."): t for k, t in text.items()}
        towers = {f"video_model.{k}": t for k, t in image.items() if not k.startswith(("head", "pre_logits"))}
        towers |= {
            f"text_model.{k}": t for k, t in text.items() if k.startswith(("embeddings", "transformer"))
        }
        assign(self, state | keys.from_official(towers), source="image ViT's or DistilBERT's")

    @property
    def recipe(self) -> Recipe:
        """The short side scaled, the centre kept, ImageNet's mean and standard deviation."""
        size = self.config.vision.image_size
        size = (size, size) if isinstance(size, int) else size
        return Recipe(
            size, interpolation="bilinear", mean=_MEAN, std=_STD, context_length=self.context_length
        )

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
        return self.text_model.token_embedding

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of 1 / temperature, fixed."""
        return torch.tensor(-math.log(self.config.temperature))

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        return cast(Tensor, self.txt_proj(self.text_model(tokens_NL)))

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return video

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Cosines over the temperature; a length below 1e-8 counts as that."""
        cosine_NM = F.normalize(text_ND, dim=-1, eps=1e-8) @ F.normalize(video, dim=-1, eps=1e-8).T
        return cosine_NM / self.config.temperature
