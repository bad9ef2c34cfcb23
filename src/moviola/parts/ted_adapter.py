"""Adapters on the residual stream of a transformer: over time in an image tower, plain in a text tower.

A TED adapter adds two things to the tokens of a clip's frames: TE, a filter along time of every token, and
TD, a spatial filter of what changed in every patch since the frame before. Both are linear and as narrow as
`channels` in between, and add nothing while their filters are zero, as they begin. (Wang et al. 2024,
M2-CLIP, arXiv 2401.11649; TE is that of ST-Adapter, Pan et al. 2022, arXiv 2206.13559.)

Exact faster forms, compared with the plain ones by tests: the filter along time is three products in the
layout that tokens have; the difference is taken behind the linear map, where it is narrow; the filter of a
frame is two-dimensional.

Axis letters: B clips, T frames, F = B * T frames of all clips, those of a clip together and in order, L
tokens of a frame (class token first), P patches, H, W rows and columns of patches, C channels of an adapter,
D width of the tower, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Attention, ResidualBlock
from moviola.clip.config import Activation
from moviola.types import UsageError


class TimeFilter(nn.Conv1d):
    """Each channel's filter over a frame and its two neighbours: (B, T, ..., C) -> the same. Starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        _zero(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        before_C, now_C, after_C = self.weight.squeeze(1).unbind(-1)
        y = torch.addcmul(cast(Tensor, self.bias), x, now_C)
        y[:, 1:].addcmul_(x[:, :-1], before_C)
        y[:, :-1].addcmul_(x[:, 1:], after_C)
        return y


class FrameFilter(nn.Conv3d):
    """Each channel's 3 x 3 filter over the patches of a frame: x_FHWC -> x_FHWC. Starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (1, 3, 3), padding=(0, 1, 1), groups=channels)
        _zero(self.weight, self.bias)

    def forward(self, x_FHWC: Tensor) -> Tensor:
        kernel_C133 = self.weight.squeeze(2)
        y_FCHW = F.conv2d(x_FHWC.movedim(-1, 1), kernel_C133, self.bias, padding=1, groups=len(kernel_C133))
        return y_FCHW.movedim(1, -1)


class TemporalDifference(nn.Module):
    """TD: what changed in each patch since the frame before, filtered; nothing did in the first frame.

    x_BTLD -> added_BTPD, L = 1 + P. The class token passes the first map too and is dropped behind it, so
    that the tokens are not copied without it.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, channels)
        self.conv = FrameFilter(channels)
        self.fc2 = nn.Linear(channels, width)
        _zero(self.fc1.bias, self.fc2.bias)

    def forward(self, x_BTLD: Tensor) -> Tensor:
        patches = x_BTLD.shape[2] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise UsageError(
                f"TED adapters need a square grid of patches, got {patches} patches a frame.",
                hint="Crop the frames to squares.",
            )
        narrow_BTPC = F.linear(x_BTLD, self.fc1.weight)[:, :, 1:]
        change_BTPC = narrow_BTPC.diff(dim=1, prepend=narrow_BTPC[:, :1]) + self.fc1.bias
        found_FHWC = self.conv(change_BTPC.flatten(0, 1).unflatten(1, (side, side)))
        return self.fc2(found_FHWC.flatten(1, 2).unflatten(0, x_BTLD.shape[:2]))


class TedAdapter(nn.Module):
    """x_FLD + TE(x) + TD(x), the latter for patches alone; `frames` says how many frames a clip has."""

    def __init__(self, width: int, channels: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.fc1 = nn.Linear(width, channels)
        self.conv = TimeFilter(channels)
        self.fc2 = nn.Linear(channels, width)
        self.offset_adapter = TemporalDifference(width, channels)
        _zero(self.fc1.bias, self.fc2.bias)

    def forward(self, x_FLD: Tensor) -> Tensor:
        if len(x_FLD) % self.frames:
            raise UsageError(
                f"The adapters are made for clips of {self.frames} frames; {len(x_FLD)} frames do not divide."
            )
        x_BTLD = x_FLD.unflatten(0, (-1, self.frames))
        y_BTLD = x_BTLD + self.fc2(self.conv(self.fc1(x_BTLD)))
        y_BTLD[:, :, 1:] += self.offset_adapter(x_BTLD)
        return y_BTLD.flatten(0, 1)


class TemporalAdapter(nn.Module):
    """frames_BTE + TE(frames): of one vector a frame."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, channels)
        self.conv = TimeFilter(channels)
        self.fc2 = nn.Linear(channels, width)
        _zero(self.fc1.bias, self.fc2.bias)

    def forward(self, frames_BTE: Tensor) -> Tensor:
        return frames_BTE + self.fc2(self.conv(self.fc1(frames_BTE)))


class TextAdapter(nn.Module):
    """x_BLD plus a narrow GELU layer of it. Its weights are drawn: it is not the identity at the start."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.textad_fc1 = nn.Linear(width, channels)
        self.textad_fc2 = nn.Linear(channels, width)
        _zero(self.textad_fc1.bias, self.textad_fc2.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.textad_fc2(F.gelu(self.textad_fc1(x_BLD)))


class AdaptedBlock(ResidualBlock):
    """CLIP's block with an adapter before its MLP and, `twice`, another before its attention.

    `adapter` makes one for a width; without one the block is CLIP's.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        act: Activation,
        *,
        causal: bool,
        adapter: Callable[[int], nn.Module] = nn.Identity,
        twice: bool = False,
    ) -> None:
        super().__init__(width, heads, mlp_ratio, act, causal=causal)
        self.adapter_pre_attn = adapter(width) if twice else nn.Identity()
        self.adapter_pre_mlp = adapter(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.adapter_pre_attn(x_BLD)
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), causal=self.causal)
        x_BLD = self.adapter_pre_mlp(x_BLD)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class FusionBlock(AdaptedBlock):
    """A block through which texts look at frames. In the stack of a text tower, texts pass it unchanged."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD

    def look(self, x_BLD: Tensor, frames_BTD: Tensor) -> Tensor:
        """Tokens, none of which sees another, attend to the frames of their clip; one norm serves both."""
        x_BLD = self.adapter_pre_attn(x_BLD)
        x_BLD = x_BLD + attend(self.attn, self.ln_1(x_BLD), self.ln_1(frames_BTD))
        x_BLD = self.adapter_pre_mlp(x_BLD)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


def attend(attn: Attention, query_BLD: Tensor, seen_BTD: Tensor) -> Tensor:
    """CLIP's self-attention as attention of L tokens to T others, by the same weights: -> found_BLD."""
    width = query_BLD.shape[-1]
    (q_weight, kv_weight), (q_bias, kv_bias) = (
        parameter.split((width, 2 * width)) for parameter in (attn.in_proj_weight, attn.in_proj_bias)
    )
    keys_values = F.linear(seen_BTD, kv_weight, kv_bias).chunk(2, dim=-1)
    q_BHLK, k_BHTK, v_BHTK = (
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for x in (F.linear(query_BLD, q_weight, q_bias), *keys_values)
    )
    found_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHTK, v_BHTK)
    return attn.out_proj(found_BHLK.transpose(1, 2).flatten(2))


def _zero(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)
