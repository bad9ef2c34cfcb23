"""Contrastive objectives of image-text models: CLIP's, SigLIP's, and what all pair objectives share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.training.nce import info_nce, sigmoid_loss
from moviola.types import Batch, Episode, Needs, UsageError


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups by the usual rule: no decay on vectors, scalars and embeddings tables of position."""
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or "positional_embedding" in name.rpartition(".")[2]
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


class BaseObjective(nn.Module):
    """What an objective need not say of itself: the run's own schedule, nothing between the steps."""

    def lr_factors(self, step: int, steps: int) -> Sequence[float] | None:
        return None

    def on_episode(self, model: nn.Module, episode: Episode) -> None:
        return

    def before_step(self, model: nn.Module) -> None:
        return

    def after_step(self, model: nn.Module) -> None:
        return


class BasePairObjective(BaseObjective):
    """What pair objectives share; a subclass writes `outputs` and `loss` (`moviola.types.PairObjective`).

    All parameters of the model and of the objective train by `decay_groups`; the model's
    `logit_scale` is kept in [0, ln `max_logit_scale`] after every step. `model` is for objectives that
    are made to fit one (heads as wide as its vectors, a copy as teacher); it is not kept.
    """

    scope: Literal["pair", "token", "local"] = "pair"
    needs: Needs = Needs()

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        weight_decay: float = 0.1,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if weight_decay < 0 or max_logit_scale < 1:
            raise UsageError(
                f"weight_decay must not be negative and max_logit_scale at least 1, got {weight_decay} "
                f"and {max_logit_scale}."
            )
        self.weight_decay = weight_decay
        self.max_logit_scale = max_logit_scale

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Each row's outputs by themselves."""

    @abstractmethod
    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named losses of the whole batch."""

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.loss(model, self.outputs(model, batch))

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        return decay_groups(nn.ModuleList([model, self]), self.weight_decay)

    def after_step(self, model: nn.Module) -> None:
        with torch.no_grad():
            cast(Tensor, model.logit_scale).clamp_(0, math.log(self.max_logit_scale))


def encode_pairs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The normalised vectors of `image` and `text`, and the logit scale (its logarithm, as stored)."""
    towers = cast(Any, model)
    return {
        "image": F.normalize(towers.encode_image(batch["image"]).float(), dim=-1),
        "text": F.normalize(towers.encode_text(batch["text"]).float(), dim=-1),
        "logit_scale": towers.logit_scale,
    }


class Contrastive(BasePairObjective):
    """CLIP's symmetric cross-entropy (Radford et al. 2021, Figure 3).

    Text i belongs to picture i. Or `batch["text"]` holds U distinct texts and `batch["positives"]`
    (B, U) says which fit which picture: distinct texts are then encoded once, and captions that occur
    twice are no false negatives. With `batch["own"]` (B,) too a picture is trained towards that text
    alone, and the others that fit are left out. Batches with `positives` are for one process and no
    gradient caching.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        extra = {name: batch[name] for name in ("positives", "own") if name in batch}
        return encode_pairs(model, batch) | extra

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        image_BD, text_UD, scale = outputs["image"], outputs["text"], outputs["logit_scale"].exp()
        positive_BU = outputs.get("positives")
        if positive_BU is None:
            return {"contrastive": info_nce(image_BD, text_UD, scale)}
        if positive_BU.shape != (len(image_BD), len(text_UD)):
            raise UsageError(
                f"`positives` is {tuple(positive_BU.shape)} for {len(image_BD)} pictures and "
                f"{len(text_UD)} texts.",
                hint="It cannot be put together from several processes or parts of a batch.",
            )
        logits_BU = scale * image_BD @ text_UD.T
        image_to_text, text_to_image = multi_positive_loss(logits_BU, positive_BU)
        if "own" in outputs:
            image_to_text = own_text_loss(logits_BU, outputs["own"], positive_BU)
        return {"contrastive": (image_to_text + text_to_image) / 2}


class SigLip(BasePairObjective):
    """Every picture with every text is a yes-or-no question (Zhai et al. 2023, arXiv 2303.15343).

    The bias is the objective's and starts at -10; it shifts all scores alike, so the trained model
    does without. Start a new model at a logit scale of ln 10, as `set_scale=True` does.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        bias: float = -10.0,
        set_scale: bool = False,
        weight_decay: float = 1e-4,
        max_logit_scale: float = 200.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))
        if set_scale and model is not None:
            with torch.no_grad():
                cast(Tensor, model.logit_scale).fill_(math.log(10))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return encode_pairs(model, batch)

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = outputs["logit_scale"].exp()
        return {"sigmoid": sigmoid_loss(outputs["image"], outputs["text"], scale, self.logit_bias)}
