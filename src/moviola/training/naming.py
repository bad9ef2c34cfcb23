"""Naming: each picture against the words of every class there is, where classes are few and known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.training.objectives import BasePairObjective
from moviola.types import Batch, LabelField, Needs, PictureField, UsageError


class Naming(BasePairObjective):
    """Cross-entropy over the classes; every text runs once a step, and none is a false negative.

    `tokens_FCL` are the classes' texts in F forms, of which each step draws one. A subclass may give other
    `logits`. `UsageError` for labels that are no class.
    """

    needs = Needs((PictureField(), LabelField()))

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        tokens_FCL: Tensor | None = None,
        weight_decay: float = 0.1,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        self.register_buffer("tokens_FCL", tokens_FCL, persistent=False)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """logits_BC of the batch's pictures."""
        tokens_FCL, towers = self.get_buffer("tokens_FCL"), cast(Any, model)
        form = int(torch.randint(len(tokens_FCL), (1,)))
        scores_CB = towers.score(towers.encode_text(tokens_FCL[form]), towers.encode_image(batch["image"]))
        return cast(Tensor, scores_CB.T)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits_BC, label_B = self.logits(model, batch), batch["label"]
        if len(label_B) and not 0 <= int(label_B.min()) <= int(label_B.max()) < logits_BC.shape[1]:
            raise UsageError(
                f"Labels must lie from 0 to {logits_BC.shape[1] - 1}, got {int(label_B.min())} to "
                f"{int(label_B.max())}."
            )
        return {"logits": logits_BC, "label": label_B}

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"cross-entropy": F.cross_entropy(outputs["logits"].float(), outputs["label"])}
