"""What video encoders share that know no words, take clips of one length and may have a classifier.

Axis letters: B batch, C channels, H height, W width, N and M clips, T frames, L tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from moviola.parts.fixed_frames import FixedFrames, hold_last_frame
from moviola.types import ClipBatch, Refusal


class WordlessClips(FixedFrames):
    """A mixin for `Encoder`s: one vector a clip, no texts. A picture is a clip in which nothing moves."""

    has_text = False
    separable = True
    context_length = 0
    classes: int
    """Of the classifier; 0: there is none."""

    @abstractmethod
    def encode_video(self, batch: ClipBatch) -> Tensor: ...

    @abstractmethod
    def classify_video(self, batch: ClipBatch) -> Tensor: ...

    def held_frames(self, batch: ClipBatch) -> Tensor:
        """frames_BTCHW, checked; a clip that is too short (`mask_BT`) stays on its last frame."""
        return hold_last_frame(self.frames_of(batch), batch.mask_BT)

    @property
    def adaptation(self) -> Literal["none", "classifier"]:
        return "classifier" if self.classes else "none"

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        raise Refusal(
            f"{type(self).__name__} knows no words, so it embeds no texts.",
            hint="Search by example, or fine-tune it to name classes: moviola train --task recognition.",
        )

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.encode_video(self.still(pixels_BCHW))

    def classify_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.classify_video(self.still(pixels_BCHW))

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return video

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Cosines, (N, M), of vectors of clips: there are no texts."""
        return F.normalize(text_ND, dim=-1) @ F.normalize(video, dim=-1).T
