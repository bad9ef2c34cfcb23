"""Random parts of clips, one resampling for a whole batch.

Axis letters: B clips, T frames, C channels, P pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.types import UsageError


def scaled_crops(frames_BTCPP: Tensor, scales: Sequence[float] = (1.0, 0.875, 0.75, 0.66)) -> Tensor:
    """A part of each clip, the same of all its frames, anywhere, scaled to the whole (bilinear).

    Height and width are shares of the side from `scales`, at most one step of that list apart (Wang et al.
    2016, temporal segment networks). Draws come from torch's global generator.
    """
    if not scales or not all(0 < share <= 1 for share in scales):
        raise UsageError(f"Crops are shares of the side above 0 and up to 1, got {tuple(scales)}.")
    count, side = len(frames_BTCPP), frames_BTCPP.shape[-1]
    which_B = torch.randint(len(scales), (count,))
    other_B = (which_B + torch.randint(-1, 2, (count,))).clamp(0, len(scales) - 1)
    share_B2 = torch.tensor(scales)[torch.stack([which_B, other_B], 1)]
    centre_B2 = (2 * torch.rand(count, 2) - 1) * (1 - share_B2)
    theta_B23 = torch.cat([torch.diag_embed(share_B2), centre_B2[..., None]], dim=2).to(frames_BTCPP)
    grid = F.affine_grid(theta_B23, [count, 1, side, side], align_corners=False)
    parts = F.grid_sample(frames_BTCPP.flatten(1, 2), grid, padding_mode="border", align_corners=False)
    return parts.view_as(frames_BTCPP)
