"""Vision transformers over tubelets: patches of several frames each, and a tower whose tokens attend jointly.

`TubeletViT` is timm's image ViT with a Conv3d for its patches and a second table of positions, for times.
Every token attends to all others. A share of the patches may be dropped before the first block, another
one in every tube (a layer of `tubelet` frames), so training costs a fraction of the tokens.

Parameters have the house's names (`parts.timm_vit`), with `temporal_embedding`.

Axis letters: B clips, T frames, U tubes (T / tubelet), N patches of a tube, K of them kept, L tokens
(1 + U * K), X values of a block, D width, C channels, H height, W width of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moviola.clip.blocks import TowerOutput
from moviola.clip.config import VitConfig
from moviola.clip.vit import VisionTransformer
from moviola.parts.backbones.space_time_vit import divided_attention
from moviola.parts.timm_vit import PlainBlock, as_timm, patch_of
from moviola.types import UsageError


class TubeletPatches(nn.Conv3d):
    """pixels_BTCHW -> tokens_BUND: a linear map of every tubelet x patch x patch block, places row by row.

    Blocks do not overlap, so they are cut out and multiplied: exact, on CPUs as fast as a convolution or,
    where narrow, up to three times as fast, and those that are dropped cost nothing. Frames, rows and
    columns must divide; `UsageError` says which does not.
    """

    def __init__(self, channels: int, width: int, patch: int, tubelet: int = 2) -> None:
        size = (tubelet, patch, patch)
        super().__init__(channels, width, kernel_size=size, stride=size)

    def blocks(self, pixels_BTCHW: Tensor) -> Tensor:
        """blocks_BUNX: the X = C * tubelet * patch * patch values of each, as the weight has them."""
        shape, (tubelet, patch, _) = tuple(pixels_BTCHW.shape), self.kernel_size
        if len(shape) != 5 or shape[2] != self.in_channels or not shape[1]:
            raise UsageError(f"Tubelets are cut from clips (B, T, {self.in_channels}, H, W), got {shape}.")
        if shape[1] % tubelet:
            raise UsageError(
                f"A tubelet is {tubelet} frames, so clips have a multiple of {tubelet}, not {shape[1]}."
            )
        if shape[3] % patch or shape[4] % patch:
            raise UsageError(f"Frames are cut in patches of {patch} x {patch}; {shape[3:]} does not divide.")
        cut = pixels_BTCHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, tubelet))
        return cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(2, 3)

    def embed_blocks(self, blocks_BUNX: Tensor) -> Tensor:
        return F.linear(blocks_BUNX, self.weight.flatten(1), self.bias)

    def forward(self, pixels_BTCHW: Tensor) -> Tensor:
        return self.embed_blocks(self.blocks(pixels_BTCHW))


class TubeletViT(VisionTransformer):
    """frames_BTCHW -> TowerOutput, for up to `frames` frames in whole tubelets.

    The vector is the class token after the last norm; there is no projection. Shorter clips take the first
    rows of `temporal_embedding`, which starts as zero and is not added to the class token.
    """

    def __init__(self, config: VitConfig, frames: int, tubelet: int = 2) -> None:
        if tubelet < 1 or frames < tubelet or frames % tubelet:
            raise UsageError(f"Frames come in whole tubelets, got {frames} frames in tubelets of {tubelet}.")
        super().__init__(config, config.width, "gelu", block=PlainBlock)
        as_timm(self)
        patches = TubeletPatches(self.conv1.in_channels, config.width, patch_of(self.conv1), tubelet)
        self.conv1 = cast(nn.Conv2d, patches)
        del self.proj  # vectors are projected by the system, with a bias
        self.frames, self.tubelet = frames, tubelet
        self.temporal_embedding = nn.Parameter(torch.zeros(frames // tubelet, config.width))

    def embed(self, frames_BTCHW: Tensor, keep_BUK: Tensor | None = None) -> Tensor:
        """Pixels to the tokens the first block sees: class token first, then tube after tube.

        `keep_BUK` are the places of the patches that each tube keeps, in the order they are to stand in;
        rows for tubes that the clip does not have are not looked at. None keeps all.
        """
        self._check(frames_BTCHW)
        count, frames = frames_BTCHW.shape[:2]
        x_BTCHW = self.stem(frames_BTCHW.flatten(0, 1)).unflatten(0, (count, frames))
        patches = cast(TubeletPatches, self.conv1)
        blocks_BUNX = patches.blocks(x_BTCHW)
        tubes = blocks_BUNX.shape[1]
        place_LD, time_UD = self.positional_embedding, self.temporal_embedding[:tubes]
        where_BUND = (place_LD[1:] + time_UD[:, None]).expand(count, -1, -1, -1)
        if keep_BUK is not None:
            index_BUK = self._kept(keep_BUK, count, tubes)
            blocks_BUNX, where_BUND = (_take(x, index_BUK) for x in (blocks_BUNX, where_BUND))
        x_BUND = patches.embed_blocks(blocks_BUNX) + where_BUND
        cls_B1D = (self.class_embedding + place_LD[0]).to(x_BUND.dtype).expand(count, 1, -1)
        return torch.cat([cls_B1D, x_BUND.flatten(1, 2)], dim=1)

    def forward(
        self, frames_BTCHW: Tensor, taps: Sequence[int] = (), *, keep_BUK: Tensor | None = None
    ) -> TowerOutput:
        x_BLD, layers = self.transformer(self.embed(frames_BTCHW, keep_BUK), taps)
        tokens_BLD = self.ln_post(x_BLD)
        return TowerOutput(tokens_BLD[:, 0], tokens_BLD, layers)

    def vector(self, frames_BTCHW: Tensor, keep_BUK: Tensor | None = None) -> Tensor:
        """vector_BD alone: the last block works for the class token only. Exact."""
        x_BLD = self.embed(frames_BTCHW, keep_BUK)
        *blocks, last = cast(list[PlainBlock], list(self.transformer.resblocks))
        for block in blocks:
            again = self.transformer.checkpointing and torch.is_grad_enabled()
            x_BLD = checkpoint(block, x_BLD, use_reentrant=False) if again else block(x_BLD)
        seen_BLD = last.ln_1(x_BLD)
        x_B1D = x_BLD[:, :1] + divided_attention(last.attn, seen_BLD, 0, "space", class_only=True)
        x_B1D = x_B1D + last.mlp(last.ln_2(x_B1D))
        vector_BD: Tensor = self.ln_post(x_B1D[:, 0])
        return vector_BD

    def draw_keep(self, count: int, frames: int, share: float) -> Tensor:
        """keep_BUK for `count` clips: an own random `share` of every tube's patches, at least one of them.

        Draws come from torch's global generator.
        """
        patches = len(self.positional_embedding) - 1
        shape = (count, frames // self.tubelet, patches)
        order_BUN = torch.rand(shape, device=self.positional_embedding.device).argsort(-1)
        return order_BUN[..., : max(1, int(patches * share))]

    def _check(self, frames_BTCHW: Tensor) -> None:
        height, width = (n * self.config.patch_size for n in self.config.grid)
        shape = tuple(frames_BTCHW.shape)
        if len(shape) != 5 or shape[2:] != (3, height, width):
            raise UsageError(f"Clips for this model are (B, T, 3, {height}, {width}), got {shape}.")
        if not self.tubelet <= shape[1] <= self.frames or shape[1] % self.tubelet:
            raise UsageError(
                f"This model takes clips of {self.tubelet} to {self.frames} frames in whole tubelets of "
                f"{self.tubelet}, got {shape[1]} frames.",
                hint="Sample by its frame_spec.",
            )

    def _kept(self, keep_BUK: Tensor, count: int, tubes: int) -> Tensor:
        shape, patches = tuple(keep_BUK.shape), len(self.positional_embedding) - 1
        if len(shape) != 3 or shape[0] != count or shape[1] < tubes or not shape[2]:
            raise UsageError(
                f"Kept patches are (B, tubes, K): for {count} clips of {tubes} tubes, got {shape}."
            )
        keep_BUK = keep_BUK[:, :tubes]
        least, most = int(keep_BUK.min()), int(keep_BUK.max())
        if least < 0 or most >= patches:
            raise UsageError(f"A tube's patches are 0 to {patches - 1}, asked to keep {least} to {most}.")
        return keep_BUK


def _take(x_BUND: Tensor, index_BUK: Tensor) -> Tensor:
    return x_BUND.gather(2, index_BUK[..., None].expand(-1, -1, -1, x_BUND.shape[-1]))
