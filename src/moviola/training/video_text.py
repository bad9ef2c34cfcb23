"""Training video encoders on pairs of clips and texts, with pictures as clips of one frame.

Losses of Frozen in Time (Bain et al. 2021), which its followers use as well.

Axis letters: B clips of a batch, T frames, N pairs, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.training.objectives import BasePairObjective
from moviola.training.repeats import text_numbers
from moviola.types import Batch, ClipBatch, Needs, TextField, UsageError, VideoField

PairLoss = Literal["norm-softmax", "max-margin"]


def similarity(text_ND: Tensor, video_MD: Tensor) -> Tensor:
    """Cosines, scores_NM; a length below 1e-8 counts as that."""
    return F.normalize(text_ND, dim=-1, eps=1e-8) @ F.normalize(video_MD, dim=-1, eps=1e-8).T


def norm_softmax_loss(scores_NN: Tensor, temperature: Tensor | float = 0.05) -> Tensor:
    """Both directions' cross-entropies of cosines / temperature, added (not averaged). Row i belongs to i."""
    logits_NN, own_N = _square(scores_NN) / temperature, torch.arange(len(scores_NN), device=scores_NN.device)
    return F.cross_entropy(logits_NN, own_N) + F.cross_entropy(logits_NN.T, own_N)


def max_margin_loss(scores_NN: Tensor, margin: float = 0.2, *, own_pairs: bool = False) -> Tensor:
    """The mean of what pair i's score lacks to be `margin` above those of row i and of column i.

    `own_pairs` counts every pair against itself too, as a constant of `margin` (officially `fix_norm=False`).
    A batch of one has no others and the loss 0.
    """
    own_N1 = _square(scores_NN).diagonal().unsqueeze(1)
    lacking_2NN = torch.stack([(margin - own_N1 + x_NN).relu() for x_NN in (scores_NN, scores_NN.T)])
    if own_pairs:
        return lacking_2NN.mean()
    others_NN = ~torch.eye(len(scores_NN), dtype=torch.bool, device=scores_NN.device)
    return lacking_2NN[:, others_NN].mean() if len(scores_NN) > 1 else 0 * lacking_2NN.sum()


def _square(scores_NN: Tensor) -> Tensor:
    if scores_NN.ndim != 2 or scores_NN.shape[0] != scores_NN.shape[1] or not len(scores_NN):
        raise UsageError(f"Row i belongs to column i: expected N x N scores, got {tuple(scores_NN.shape)}.")
    return scores_NN


def fewer_frames(clip: ClipBatch, frames: int, *, draw: bool) -> ClipBatch:
    """At most `frames` frames of each clip, one of each of as many equal parts: its middle, or any (`draw`).

    A clip's real frames come first, as readers give them. Draws come from torch's global generator.
    """
    frames = min(frames, clip.mask_BT.shape[1])
    real_B1 = clip.mask_BT.sum(1, keepdim=True)
    part_BT = torch.arange(frames, device=real_B1.device).expand(len(real_B1), -1)
    within_BT = torch.rand(part_BT.shape, device=real_B1.device) if draw else torch.full(part_BT.shape, 0.5)
    drawn_BT = ((part_BT + within_BT.to(real_B1.device)) * real_B1 / frames).long().minimum(real_B1 - 1)
    chosen_BT = torch.where(real_B1 > frames, drawn_BT, part_BT)
    rows_B1 = torch.arange(len(real_B1), device=real_B1.device)[:, None]
    return ClipBatch(
        clip.frames_BTCHW[rows_B1, chosen_BT],
        clip.times_BT[rows_B1, chosen_BT],
        clip.mask_BT[rows_B1, chosen_BT],
    )


class VideoText(BasePairObjective):
    """Contrast clips with their texts; pictures, clips of one frame, are contrasted among themselves.

    frames   train with at most as many frames of each clip, one drawn from each of as many equal parts;
             None: with all that the model samples
    loss     `norm-softmax` at the model's temperature, or `max-margin` with `margin`

    A batch of both kinds has the mean of both losses, weighed by their rows. A text that occurs twice in a
    batch is a false negative; the first such batch gives a warning.
    """

    needs: Needs = Needs((VideoField(), TextField()))

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        frames: int | None = None,
        loss: PairLoss = "norm-softmax",
        margin: float = 0.2,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay)
        if loss not in get_args(PairLoss) or not margin > 0:
            raise UsageError(
                f"The loss is {' or '.join(get_args(PairLoss))}, the margin above 0; got {loss!r}, {margin}."
            )
        if frames is not None and frames < 1:
            raise UsageError(f"Training needs at least one frame a clip, got {frames}.")
        self.frames, self.pair_loss, self.margin = frames, loss, margin
        self._warned = False

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        clip: ClipBatch = batch["clip"]
        still_B = clip.mask_BT.sum(1) == 1
        if self.frames is not None:
            clip = fewer_frames(clip, self.frames, draw=self.training)
        return {
            "video": model.encode_video(clip).float(),
            "text": model.encode_text(batch["text"]).float(),
            "still": still_B,
            "caption": text_numbers(batch["text"]),
            "logit_scale": model.logit_scale,
        }

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        text_ND, video_ND, still_N = outputs["text"], outputs["video"], outputs["still"]
        if len(text_ND) != len(video_ND):
            raise UsageError(f"Expected a text a clip, got {len(text_ND)} texts and {len(video_ND)} clips.")
        self._warn_of_repeats(outputs["caption"])
        parts = []
        for kind_N in (still_N, ~still_N):
            if kind_N.any():
                scores_NN = similarity(text_ND[kind_N], video_ND[kind_N])
                if self.pair_loss == "norm-softmax":
                    part = norm_softmax_loss(scores_NN, (-outputs["logit_scale"]).exp())
                else:
                    part = max_margin_loss(scores_NN, self.margin)
                parts.append(part * kind_N.float().mean())
        return {"contrastive": torch.stack(parts).sum()}

    def _warn_of_repeats(self, caption_N: Tensor) -> None:
        twice = len(caption_N) - len(caption_N.unique())
        if twice and not self._warned:
            self._warned = True
            warnings.warn(
                f"{twice} of the {len(caption_N)} texts of a batch repeat another one of it, and count "
                "against it. Remove repeated texts, or give rows more texts to draw from.",
                stacklevel=2,
            )
