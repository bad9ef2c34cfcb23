"""Standard fine-tuning: the picture tower and a linear head by cross-entropy on class labels.

Axis letters: B batch, C classes (and channels in pictures), H height, W width, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.model import CLIP
from moviola.training.objectives import BasePairObjective
from moviola.types import Batch, LabelField, Needs, PictureField


class FineTuning(BasePairObjective):
    """Standard fine-tuning: cross-entropy of a linear head that starts as the class texts' unit vectors."""

    needs: Needs = Needs((PictureField(), LabelField()))

    def __init__(self, model: CLIP, text_CD: Tensor) -> None:
        super().__init__(model)
        self.head_CD = nn.Parameter(text_CD.clone())

    def logits(self, model: nn.Module, image_BCHW: Tensor) -> Tensor:
        vectors_BD = F.normalize(cast(CLIP, model).encode_image(image_BCHW), dim=-1)
        return cast(CLIP, model).logit_scale.detach().exp() * vectors_BD @ self.head_CD.T

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"logits": self.logits(model, batch["image"]), "label": batch["label"]}

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"labels": F.cross_entropy(outputs["logits"], outputs["label"])}
