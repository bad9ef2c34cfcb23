"""What video encoders built for a fixed number of frames share.

Axis letters: B batch, T frames, C channels, H height, W width, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moviola.types import ClipBatch, FrameSpec, UsageError


def hold_last_frame(frames_BTCHW: Tensor, mask_BT: Tensor) -> Tensor:
    """Each clip's own frames, and then its last one for as long as `mask_BT` says that there are no more."""
    if bool(mask_BT.all()):
        return frames_BTCHW
    place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_BT = torch.minimum(place_T, (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0))
    return frames_BTCHW[torch.arange(len(mask_BT), device=mask_BT.device)[:, None], last_BT]


class FixedFrames:
    """A mixin for `Encoder`s that take clips of exactly `frames` frames.

    A picture is a video of that many equal frames, so both lie in one space; a shorter clip is
    filled up with its last frame, as `frame_spec` says to whoever prepares it.
    """

    frames: int

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.frames, "middle", "repeat-last")

    def frames_of(self, batch: ClipBatch) -> Tensor:
        """The pixels of a batch, checked: frames_BTCHW with T = `frames`."""
        frames_BTCHW = batch.frames_BTCHW
        if frames_BTCHW.ndim != 5 or frames_BTCHW.shape[1] != self.frames:
            raise UsageError(
                f"This model takes clips of {self.frames} frames, (B, {self.frames}, 3, H, W), got "
                f"{tuple(frames_BTCHW.shape)}.",
                hint="Sample by its frame_spec, or build it for that many frames.",
            )
        return frames_BTCHW

    def still(self, pixels_BCHW: Tensor) -> ClipBatch:
        """Pictures as clips of `frames` equal frames."""
        count = len(pixels_BCHW)
        frames_BTCHW = pixels_BCHW.unsqueeze(1).expand(-1, self.frames, -1, -1, -1)
        mask_BT = torch.ones(count, self.frames, dtype=torch.bool, device=pixels_BCHW.device)
        return ClipBatch(frames_BTCHW, mask_BT.float() * 0, mask_BT)
