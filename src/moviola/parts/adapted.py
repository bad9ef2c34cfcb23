"""A model that keeps another one frozen inside and adds to it: what `moviola adapt` makes.

Axis letters: B batch, T frames, C channels or classes, H height, W width, D embedding width, N texts,
M videos, L tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from torch import Tensor, nn

from moviola.clip.keys import check_names
from moviola.types import ClipBatch, Encoder, FrameSpec

if TYPE_CHECKING:
    from moviola.clip.loaded import Model

BASE = "base."


class Adapted(nn.Module):
    """`base` is frozen and in eval mode; everything that is not below it is the adaptation.

    Implements `moviola.types.Encoder` by asking the base: a subclass changes what it adapts. Only
    `own_state()` is saved, beside the name and hash of the base; `from_base` builds the module again.
    With `adaptation = "classifier"` it also answers `classify_image` and `classify_video`.
    """

    adaptation: Literal["none", "embedding", "classifier"] = "classifier"
    config: Any

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.eval().requires_grad_(False)

    @classmethod
    @abstractmethod
    def from_base(cls, base: Model, config: Mapping[str, Any], classes: Sequence[str]) -> Self:
        """The module with new weights, from the JSON form of its configuration and its class names."""

    # ------------------------------------------------------------------------------------- weights

    def own_state(self) -> dict[str, Tensor]:
        """The adaptation's own tensors: all that are not the base's."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith(BASE)}

    def load_own(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """Copy what `own_state` gave; missing, unexpected or misshapen names raise `CheckpointError`."""
        check_names(self.own_state(), state, source=source)
        self.load_state_dict(dict(state), strict=False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.base.eval()
        return self

    # --------------------------------------------------------------------------- what the base says

    @property
    def encoder(self) -> Encoder:
        return cast(Encoder, self.base)

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def context_length(self) -> int:
        return self.encoder.context_length

    @property
    def frame_spec(self) -> FrameSpec:
        return self.encoder.frame_spec

    @property
    def has_text(self) -> bool:
        return self.encoder.has_text

    @property
    def separable(self) -> bool:
        return self.encoder.separable

    @property
    def pad_id(self) -> int:
        return int(getattr(self.base, "pad_id", 0))

    @property
    def logit_scale(self) -> Tensor | None:
        return getattr(self.base, "logit_scale", None)

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        return self.encoder.encode_text(tokens_NL)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.encoder.encode_image(pixels_BCHW)

    def encode_video(self, batch: ClipBatch) -> Tensor:
        return self.encoder.encode_video(batch)

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return self.encoder.pool(video, mask_BT)

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        return self.encoder.score(text_ND, video, mask_MT)

    # --------------------------------------------------------------------------------- classifiers

    def classify_image(self, pixels_BCHW: Tensor) -> Tensor:
        """pixels_BCHW -> logits_BC over the classes it was adapted to."""
        raise NotImplementedError(f"{type(self).__name__} has no classifier of its own.")

    def classify_video(self, batch: ClipBatch) -> Tensor:
        """The mean of its frames' logits: ClipBatch -> logits_BC."""
        frames_BTCHW = batch.frames_BTCHW
        logits_BTC = self.classify_image(frames_BTCHW.flatten(0, 1)).unflatten(0, frames_BTCHW.shape[:2])
        weight_BT1 = batch.mask_BT.to(logits_BTC.dtype).unsqueeze(-1)
        return (logits_BTC * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)
