"""A vision transformer for clips whose blocks attend over time, then over space, with timm's constants.

The tokens of a clip are one class token and then every frame's patches, frame after frame. A patch
attends to the class token and to its group: in time attention the patches at its place in all frames, in
space attention those of its frame. The class token attends to all. Time attention does not join the
residual stream, as TimeSformer's does (Bertasius et al. 2021): it changes what space attention reads. It
starts as zero, so a new tower is an image ViT for a clip of one frame and blind to the order of more.

Parameters have the house's names (`parts.timm_vit`), with `time_attn`, `ln_time` and `temporal_embedding`.

Axis letters: B clips, T frames, N patches of a frame, L tokens (1 + T * N), D width, H heads, K width of a
head, G groups, S patches of a group, C channels, P pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moviola.clip.blocks import Attention, TowerOutput
from moviola.clip.config import Activation, VitConfig
from moviola.clip.vit import VisionTransformer
from moviola.parts.timm_vit import EPSILON, PlainBlock, as_timm
from moviola.types import UsageError

Axis = Literal["space", "time"]
Growth = Literal["zeros", "interp", "bilinear"]


def divided_attention(
    attention: Attention, x_BLD: Tensor, patches: int, along: Axis, *, class_only: bool = False
) -> Tensor:
    """`attention` within groups along space or time: x_BLD -> out_BLD, or out_B1D of the class token alone.

    `patches` is N; the frames follow from the number of tokens.
    """
    width, heads = x_BLD.shape[-1], attention.heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    asking_BLD = x_BLD[:, :1] if class_only else x_BLD
    q_BHLK = F.linear(asking_BLD, weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(1, 2)
    kv_BLD = F.linear(x_BLD, weight[width:], bias[width:])
    k_BHLK, v_BHLK = kv_BLD.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    if class_only or (along == "space" and x_BLD.shape[1] == 1 + patches):
        out_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)  # one group of all tokens
    else:
        cls_BH1K = F.scaled_dot_product_attention(q_BHLK[:, :, :1], k_BHLK, v_BHLK)
        q_BHGSK = _groups(q_BHLK, patches, along)
        k_BHGSK, v_BHGSK = (_with_class(x, _groups(x, patches, along)) for x in (k_BHLK, v_BHLK))
        q, k, v = (x.flatten(1, 2) for x in (q_BHGSK, k_BHGSK, v_BHGSK))  # kernels take four axes
        out_BHGSK = F.scaled_dot_product_attention(q, k, v).unflatten(1, (heads, -1))
        if along == "time":
            out_BHGSK = out_BHGSK.transpose(2, 3)
        out_BHLK = torch.cat([cls_BH1K, out_BHGSK.flatten(2, 3)], dim=2)
    out_BLD: Tensor = attention.out_proj(out_BHLK.transpose(1, 2).flatten(2))
    return out_BLD


def _groups(x_BHLK: Tensor, patches: int, along: Axis) -> Tensor:
    """x_BHGSK of the patches: frames by places, or places by frames."""
    x_BHTNK = x_BHLK[:, :, 1:].unflatten(2, (-1, patches))
    return x_BHTNK if along == "space" else x_BHTNK.transpose(2, 3)


def _with_class(x_BHLK: Tensor, x_BHGSK: Tensor) -> Tensor:
    """Each group with the class token before it."""
    cls_BHG1K = x_BHLK[:, :, None, :1].expand(-1, -1, x_BHGSK.shape[2], -1, -1)
    return torch.cat([cls_BHG1K, x_BHGSK], dim=3)


class SpaceTimeBlock(PlainBlock):
    """x_BLD -> x_BLD: x + space(norm(x + time(norm(x)))), then the MLP.

    Time attention starts as zero by its queries, keys and values; its output map is random, so that the
    values have a gradient. (Frozen in Time starts that map as ones. What it adds is then equal in every
    channel, the norm before space attention takes it away again, and no gradient comes back.)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        act: Activation,
        *,
        patches: int,
        causal: bool = False,
    ) -> None:
        super().__init__(width, heads, mlp_ratio, act, causal=causal)
        self.patches = patches
        self.ln_time = nn.LayerNorm(width, eps=EPSILON)
        self.time_attn = Attention(width, heads)
        nn.init.zeros_(self.time_attn.in_proj_weight)

    def forward(self, x_BLD: Tensor, *, class_only: bool = False) -> Tensor:
        """With `class_only` the class token alone, (B, 1, D): what a last block is asked for."""
        time_BLD = divided_attention(self.time_attn, self.ln_time(x_BLD), self.patches, "time")
        seen_BLD = self.ln_1(x_BLD + time_BLD)
        kept_BLD = x_BLD[:, :1] if class_only else x_BLD
        space_BLD = divided_attention(self.attn, seen_BLD, self.patches, "space", class_only=class_only)
        y_BLD = kept_BLD + space_BLD
        return y_BLD + self.mlp(self.ln_2(y_BLD))


class SpaceTimeVit(VisionTransformer):
    """frames_BTCPP -> TowerOutput, with 1 to `frames` frames: a picture is a clip of one.

    The vector is the class token after the last norm; there is no projection. Shorter clips take the
    first rows of `temporal_embedding`, which starts as zero and is not added to the class token.
    """

    def __init__(self, config: VitConfig, frames: int) -> None:
        if frames < 1:
            raise UsageError(f"A clip has at least one frame, got {frames}.")
        rows, columns = config.grid
        block: Any = partial(SpaceTimeBlock, patches=rows * columns)
        super().__init__(config, config.width, "gelu", block=block)
        as_timm(self)
        del self.proj  # vectors are projected by the system, with a bias
        self.frames = frames
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, config.width))

    def embed(self, frames_BTCPP: Tensor) -> Tensor:
        """Pixels to the tokens the first block sees: patches by place and time, class token first."""
        self._check(frames_BTCPP)
        count, frames = frames_BTCPP.shape[:2]
        x_FDPP = self.conv1(self.stem(frames_BTCPP.flatten(0, 1)))
        x_BTND = x_FDPP.flatten(2).transpose(1, 2).unflatten(0, (count, frames))
        place_LD, time_TD = self.positional_embedding, self.temporal_embedding[:frames]
        x_BTND = x_BTND + (place_LD[1:] + time_TD[:, None])
        cls_B1D = (self.class_embedding + place_LD[0]).to(x_BTND.dtype).expand(count, 1, -1)
        return torch.cat([cls_B1D, x_BTND.flatten(1, 2)], dim=1)

    def forward(self, frames_BTCPP: Tensor, taps: Sequence[int] = ()) -> TowerOutput:
        x_BLD, layers = self.transformer(self.embed(frames_BTCPP), taps)
        tokens_BLD = self.ln_post(x_BLD)
        return TowerOutput(tokens_BLD[:, 0], tokens_BLD, layers)

    def vector(self, frames_BTCPP: Tensor) -> Tensor:
        """vector_BD alone: the last block works for the class token only. Exact."""
        x_BLD = self.embed(frames_BTCPP)
        last = len(self.transformer.resblocks) - 1
        for n, block in enumerate(self.transformer.resblocks):
            step = partial(block, class_only=n == last)
            if self.transformer.checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(step, x_BLD, use_reentrant=False)
            else:
                x_BLD = step(x_BLD)
        vector_BD: Tensor = self.ln_post(x_BLD[:, 0])
        return vector_BD

    def _check(self, frames_BTCPP: Tensor) -> None:
        size = self.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = tuple(frames_BTCPP.shape)
        if len(shape) != 5 or shape[2:] != (3, height, width):
            raise UsageError(
                f"Clips are (B, T, 3, {height}, {width}), a picture a clip of one frame; got {shape}."
            )
        if not 1 <= shape[1] <= self.frames:
            raise UsageError(
                f"This model takes clips of 1 to {self.frames} frames, got {shape[1]}.",
                hint="Sample fewer, or let it grow: grow_frames(model, frames).",
            )


def grown_table(table_TD: Tensor, frames: int, mode: Growth = "zeros") -> Tensor:
    """A table of positions in time for another number of frames.

    Fewer frames keep the first rows, whatever the mode. More: `zeros` behind the old rows; `interp`
    repeats the nearest row; `bilinear` interpolates between rows (half-pixel centres).
    """
    if mode not in get_args(Growth) or frames < 1:
        raise UsageError(
            f"A table of positions grows by {', '.join(get_args(Growth))} to 1 frame or more, got {mode!r} "
            f"and {frames}."
        )
    count, width = table_TD.shape
    if frames <= count:
        return table_TD[:frames].clone()
    if mode == "zeros":
        return F.pad(table_TD, (0, 0, 0, frames - count))
    method = "nearest" if mode == "interp" else mode
    return F.interpolate(table_TD[None, None], (frames, width), mode=method)[0, 0]
