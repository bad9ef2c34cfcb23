"""CLIP's loss for tables in which few captions are told of many pictures.

Axis letters: B pictures, L tokens, U distinct texts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moviola.training.objectives import Contrastive
from moviola.types import Batch


class Distinct(Contrastive):
    """Equal captions of a batch are one text, which fits all its pictures, and no false negatives.

    For one process and no gradient caching, as all batches with `positives`.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        text_UL, own_B = batch["text"].unique(dim=0, return_inverse=True)
        positives_BU = F.one_hot(own_B, len(text_UL)).bool()
        return super().outputs(model, {"image": batch["image"], "text": text_UL, "positives": positives_BU})
