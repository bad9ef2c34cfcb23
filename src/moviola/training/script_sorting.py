"""Training a video encoder on the words spoken in several segments of each video, which it learns to sort.

The objective of TVTS (Zeng et al. 2023, arXiv 2209.15280).

Axis letters: B clips, T frames, U tubes, K patches kept, S segments of a clip, N texts, L tokens, D width, C
channels, H, W of the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.training.repeats import text_numbers
from moviola.training.video_text import VideoText, fewer_frames
from moviola.types import Batch, ClipBatch, Needs, ScriptField, UsageError


class ScriptSorting(VideoText):
    """`VideoText` of clips and the mean of their transcripts, and the sorting of these.

    keep          share of every tube's patches that is kept, drawn anew for every tube; in training alone
    sort_weight   of the sort term: the cross-entropy of each transcript's segment
    shortest, longest, gap   seconds of a segment, and between two (`types.ScriptField`)
    captions      rows without timed words train by their caption, without the sort term

    The sort term reads the transcripts' features without their gradient: it does not train the text tower.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        keep: float = 0.25,
        sort_weight: float = 2.0,
        shortest: float = 3.0,
        longest: float = 5.0,
        gap: float = 1.0,
        captions: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if not 0 < keep <= 1 or sort_weight < 0:
            raise UsageError(f"keep lies in (0, 1], sort_weight is not negative; got {keep}, {sort_weight}.")
        self.keep, self.sort_weight = keep, sort_weight
        count = 4 if model is None else model.config.segments
        self.needs = Needs((ScriptField(count, (shortest, longest), gap, optional=captions),))

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        clip: ClipBatch = batch["clip"]
        if self.frames is not None:
            clip = fewer_frames(clip, self.frames, draw=self.training)
        spoken_BSL = cast(Tensor, batch["script"])
        there_BS = _transcripts(spoken_BSL, batch.get("script_mask"))
        frames_BTCHW, keep_BUK = clip.frames_BTCHW, None
        if self.training and self.keep < 1:
            keep_BUK = model.video_model.draw_keep(*frames_BTCHW.shape[:2], self.keep)
        seen = model.video_model(frames_BTCHW, keep_BUK=keep_BUK)
        features_ND = model.text_model(spoken_BSL[there_BS])
        text_BSD = _rows(model.txt_proj(features_ND), there_BS)
        made = {
            "video": model.vid_proj(seen.vector_BD).float(),
            "text": (text_BSD.sum(1) / there_BS.sum(1, keepdim=True)).float(),
            "still": torch.zeros_like(there_BS[:, 0]),
            "caption": text_numbers(spoken_BSL.flatten(1)),
            "logit_scale": model.logit_scale,
        }
        if self.sort_weight:
            features_BSD = _rows(features_ND.detach(), there_BS)
            made["sort"] = model.pred_model(seen.tokens_BLD, features_BSD).float()
            made["sorted"] = there_BS.all(1)
        return made

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = super().loss(model, outputs)
        if "sort" in outputs:
            whole_B = outputs["sorted"]
            logits_BSS = outputs["sort"][whole_B]
            place_BS = torch.arange(logits_BSS.shape[1], device=logits_BSS.device).expand(len(logits_BSS), -1)
            summed = F.cross_entropy(logits_BSS.flatten(0, 1), place_BS.flatten(), reduction="sum")
            losses["sort"] = self.sort_weight * summed / outputs["sort"][..., 0].numel()
        return losses


def _transcripts(spoken_BSL: Tensor, there_BS: Tensor | None) -> Tensor:
    """Which texts there are: a row has all of its transcripts, or one caption in the first place."""
    if spoken_BSL.ndim != 3:
        raise UsageError(f"Transcripts are tokens (B, segments, L), got {tuple(spoken_BSL.shape)}.")
    if there_BS is None:
        return torch.ones(spoken_BSL.shape[:2], dtype=torch.bool, device=spoken_BSL.device)
    caption_B = there_BS[:, 0] & (there_BS.sum(1) == 1)
    if there_BS.shape != spoken_BSL.shape[:2] or not bool((there_BS.all(1) | caption_B).all()):
        raise UsageError(
            "Some transcripts are empty: a row has words in every segment, or one caption in the first.",
            hint="Draw other segments, or leave the row out.",
        )
    return there_BS


def _rows(x_ND: Tensor, there_BS: Tensor) -> Tensor:
    """Vectors of the texts there are, back in their places, zeros elsewhere: x_BSD."""
    x_BSD = x_ND.new_zeros(*there_BS.shape, x_ND.shape[-1])
    x_BSD[there_BS] = x_ND
    return x_BSD
