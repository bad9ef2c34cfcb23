"""Implicit alignment of neighbouring frames: a point in each, and what surrounds it (ILA, arXiv 2304.10465).

Convolutions look at the patches of two neighbouring frames, side by side as channels, and name a point in
either frame. A soft mask around each point says which patches the two share. In training the masks of the
points around it are averaged: nine places are the product of three on either axis, so the axes are averaged
before they are multiplied.

Axis letters: B clips, T frames, t = T - 1 pairs of neighbours, N = B * t, L tokens (class token first),
P = W * W patches, W side of the grid (rows, then columns), D width, C half the channels (all of them in
pairs_NCWW), J jittered places, X any axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.types import UsageError


@dataclass(frozen=True)
class AlignmentConfig:
    """Places are in [-1, 1] on either axis of a frame, as the distances are that the mask is made of.

    interactive   how the first convolution mixes a pair: by depth and then by point, or fully (SSv2)
    channels      of the convolutions, half of them for the earlier frame and half for the later
    reach         how far from the centre a point can lie
    plateau       distance from the point within which the mask is 1; beyond, it falls by `slope`
    jitter        distance of the places around a point whose masks are averaged in training
    """

    interactive: Literal["separable", "full"] = "separable"
    channels: int = 256
    reach: float = 0.75
    plateau: float = 0.25
    slope: float = 1.5
    jitter: float = 0.2


def soft_mask(point_X2: Tensor, side: int, *, plateau: float, slope: float, jitter: float = 0.0) -> Tensor:
    """mask_XWW of points (x, y): 1 near the point, falling with the distance on either axis; rows are y.

    With `jitter`, the mean of the masks of the point and its eight neighbours at that distance.
    """
    point_X2J = point_X2[..., None]
    if jitter:
        point_X2J = point_X2J + jitter * point_X2.new_tensor([-1.0, 0.0, 1.0])
    grid_W = torch.linspace(-1, 1, side, device=point_X2.device)
    distance_X2JW = (grid_W - point_X2J[..., None]).abs()
    weight_X2W = (1 - slope * (distance_X2JW - plateau)).clamp(0, 1).mean(dim=-2)
    return weight_X2W[..., 1, :, None] * weight_X2W[..., 0, None, :]


def over_frames(earlier_Bt: Tensor, later_Bt: Tensor) -> Tensor:
    """What pairs say of their two frames, (B, t, ...) each, as (B, T, ...): the mean where two say it."""
    inner_B = (earlier_Bt[:, 1:] + later_Bt[:, :-1]) / 2
    return torch.cat([earlier_Bt[:, :1], inner_B, later_Bt[:, -1:]], dim=1)


class Alignment(NamedTuple):
    """Masks of the earlier and later frame of each pair, and what was seen of the pairs, by frames."""

    earlier_BtP: Tensor
    later_BtP: Tensor
    seen_BTPC: Tensor


def pooled(a_BTLD: Tensor, found: Alignment) -> tuple[Tensor, Tensor]:
    """earlier_BtD and later_BtD: the masked patches of each pair's two frames, summed."""
    earlier_BtD = torch.einsum("btp,btpd->btd", found.earlier_BtP, a_BTLD[:, :-1, 1:])
    return earlier_BtD, torch.einsum("btp,btpd->btd", found.later_BtP, a_BTLD[:, 1:, 1:])


def misalignment(a_BTLD: Tensor, found: Alignment) -> Tensor:
    """1 - cosine of what the masks keep of two neighbours, mean over all pairs."""
    earlier_BtD, later_BtD = pooled(a_BTLD, found)
    return (1 - F.cosine_similarity(earlier_BtD.float(), later_BtD.float(), dim=-1)).mean()


def _convolved(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class Separable(nn.Module):
    """A 3 x 3 convolution by depth, then one by point, a BatchNorm and ReLU after each."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Sequential(*_convolved(inputs, inputs, groups=inputs))
        self.pointwise_conv = nn.Sequential(*_convolved(inputs, outputs, kernel=1))

    def forward(self, x_NDWW: Tensor) -> Tensor:
        return cast(Tensor, self.pointwise_conv(self.depthwise_conv(x_NDWW)))


class ImplicitAlignment(nn.Module):
    """a_BTLD -> Alignment. At first every point is the centre of its frame, whatever the frames show."""

    def __init__(
        self, width: int, grid: tuple[int, int], frames: int, config: AlignmentConfig | None = None
    ) -> None:
        super().__init__()
        config = config or AlignmentConfig()
        rows, columns = grid
        if frames < 2:
            raise UsageError(f"Pairs of frames are aligned: 2 frames or more are needed, got {frames}.")
        if rows != columns or rows < 4:
            raise UsageError(
                f"The alignment needs a square grid of 4 x 4 patches or more, got {rows} x {columns}.",
                hint="Its maps are halved twice: use smaller patches or larger pictures.",
            )
        if config.channels < 8 or config.channels % 8:
            raise UsageError(f"The channels must be a multiple of 8, got {config.channels}.")
        self.config, self.frames, self.side, self.jitter = config, frames, rows, config.jitter
        full, half, quarter = config.channels, config.channels // 2, config.channels // 4
        separable = config.interactive == "separable"
        first = [Separable(2 * width, full)] if separable else _convolved(2 * width, full)
        self.interactive_block = nn.Sequential(*first, *_convolved(full, full))
        self.conv = nn.Conv3d(half, half, (3, 1, 1), padding=(1, 0, 0))
        self.fc = nn.Linear(half, width)
        maps: list[nn.Module] = []
        for inputs in (full, half):
            conv, norm, relu = _convolved(inputs, half)
            maps += [conv, norm, nn.MaxPool2d(2), relu]
        self.prediction_block = nn.Sequential(
            *maps,
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(2),
            nn.Conv1d(half, quarter, 1, groups=2),
            nn.ReLU(),
            last := nn.Conv1d(quarter, 4, 1, groups=2),
            nn.Tanh(),
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))

    def look(self, a_BTLD: Tensor) -> Tensor:
        """pairs_NCWW, twice the half C as channels: what the convolutions see of neighbouring frames."""
        side, width = self.side, self.fc.out_features
        if a_BTLD.shape[1:] != (self.frames, side * side + 1, width):
            raise UsageError(
                f"The alignment takes {self.frames} frames of {side * side + 1} tokens, {width} wide, "
                f"got {tuple(a_BTLD.shape)}."
            )
        patches_BTWWD = a_BTLD[:, :, 1:].unflatten(2, (side, side))
        pairs_BtWWD = torch.cat([patches_BTWWD[:, :-1], patches_BTWWD[:, 1:]], dim=-1)
        return cast(Tensor, self.interactive_block(pairs_BtWWD.flatten(0, 1).permute(0, 3, 1, 2)))

    def points(self, pairs_NCWW: Tensor) -> Tensor:
        """point_Bt4: x and y in the earlier frame, then in the later."""
        point_N4 = self.config.reach * self.prediction_block(pairs_NCWW).flatten(1)
        return cast(Tensor, point_N4.unflatten(0, (-1, self.frames - 1)))

    def masks(self, point_Bt4: Tensor) -> tuple[Tensor, Tensor]:
        """earlier_BtP and later_BtP; the points are jittered in training."""
        made = partial(soft_mask, side=self.side, plateau=self.config.plateau, slope=self.config.slope)
        mask_Bt2P = made(point_Bt4.unflatten(-1, (2, 2)), jitter=self.jitter * self.training).flatten(-2)
        return mask_Bt2P[:, :, 0], mask_Bt2P[:, :, 1]

    def forward(self, a_BTLD: Tensor) -> Alignment:
        pairs_NCWW = self.look(a_BTLD)
        pairs_Bt2CP = pairs_NCWW.flatten(2).unflatten(1, (2, -1)).unflatten(0, (-1, self.frames - 1))
        seen_BTCP = over_frames(pairs_Bt2CP[:, :, 0], pairs_Bt2CP[:, :, 1])
        seen_BCTP1 = self.conv(seen_BTCP.transpose(1, 2)[..., None])
        return Alignment(*self.masks(self.points(pairs_NCWW)), seen_BCTP1[..., 0].permute(0, 2, 3, 1))
