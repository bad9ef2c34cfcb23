"""Plain contrastive training of an image-text model (the CLIP paper, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.types import Batch, Episode, Needs


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups by the usual rule: no decay on vectors, scalars and embeddings tables of position."""
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith("positional_embedding")
            (plain if exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def multi_positive_loss(logits_BU: Tensor, positive_BU: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy both ways when a picture may fit several texts and a text several pictures.

    logits_BU: pictures by distinct texts; positive_BU: bool, True where they belong together. The
    target is uniform over the positives of each row (and column); rows or columns without a positive
    are left out. With the identity as positives this is CLIP's loss.
    """

    def one_way(logits: Tensor, positive: Tensor) -> Tensor:
        counts = positive.sum(dim=1)
        kept = counts > 0
        target = positive[kept].to(logits.dtype) / counts[kept].unsqueeze(1)
        return -(target * F.log_softmax(logits[kept], dim=1)).sum(dim=1).mean()

    return one_way(logits_BU, positive_BU), one_way(logits_BU.T, positive_BU.T)


def own_text_loss(logits_BU: Tensor, own_B: Tensor, positive_BU: Tensor) -> Tensor:
    """Cross-entropy of each picture for its own text; other texts that fit it too do not count against it.

    Sharper than a uniform target where general texts ("an animal") fit many pictures: those then
    take most of the target from the text that tells the picture from others.
    """
    rows_B = torch.arange(len(own_B), device=own_B.device)
    others_BU = positive_BU.clone()
    others_BU[rows_B, own_B] = False
    return F.cross_entropy(logits_BU.masked_fill(others_BU, -torch.inf), own_B)


class Contrastive(nn.Module):
    """CLIP's symmetric cross-entropy. Implements `moviola.types.PairObjective`.

    `batch["text"]` holds U distinct texts and `batch["positives"]` (B, U) says which fit which
    picture; without `positives`, text i belongs to picture i. Distinct texts are encoded once, which
    also removes the false negatives of captions that occur twice in a batch. With `batch["own"]` (B,)
    a picture is trained towards that text alone, and the others that fit are left out.
    """

    scope: Literal["pair", "token", "local"] = "pair"
    needs = Needs()

    def __init__(self, *, weight_decay: float = 0.1, max_logit_scale: float = 100.0) -> None:
        super().__init__()
        self.weight_decay = weight_decay
        self.max_logit_scale = max_logit_scale

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        towers = cast(Any, model)
        return {
            "image": F.normalize(towers.encode_image(batch["image"]).float(), dim=-1),
            "text": F.normalize(towers.encode_text(batch["text"]).float(), dim=-1),
            "logit_scale": towers.logit_scale,
        }

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        logits_BU = outputs["logit_scale"].exp() * outputs["image"] @ outputs["text"].T
        positive_BU = batch.get("positives")
        if positive_BU is None:
            positive_BU = torch.eye(len(logits_BU), dtype=torch.bool, device=logits_BU.device)
        image_to_text, text_to_image = multi_positive_loss(logits_BU, positive_BU)
        if "own" in batch:
            image_to_text = own_text_loss(logits_BU, batch["own"], positive_BU)
        return {"contrastive": (image_to_text + text_to_image) / 2}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.loss(model, self.outputs(model, batch), batch)

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        return decay_groups(model, self.weight_decay)

    def on_episode(self, model: nn.Module, episode: Episode) -> None:
        return

    def after_step(self, model: nn.Module) -> None:
        with torch.no_grad():
            cast(Tensor, model.logit_scale).clamp_(0, math.log(self.max_logit_scale))
