"""CLIP's vision transformer, with OpenAI's parameter names under `visual.`.

Axis letters: B batch, C channels, H height, W width, L tokens (class token first), D width,
E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Block, ResidualBlock, TowerOutput, Transformer
from moviola.clip.config import Activation, VitConfig
from moviola.types import UsageError


class ConvStage(nn.Module):
    """Stride-2 convolution, then residual 3x3 blocks: one stage of the convolutional stem."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = torch.relu(self.bn(self.conv(x_BCHW)))
        for block in self.blocks:
            x_BCHW = torch.relu(x_BCHW + block(x_BCHW))
        return x_BCHW


PositionResizing = Literal["antialias", "dino"]


def resized_positions(
    table_LD: Tensor, old: tuple[int, int], new: tuple[int, int], method: PositionResizing = "antialias"
) -> Tensor:
    """A position table (class token first) for another grid of patches, by bicubic interpolation.

    `antialias` smooths before it shrinks. `dino` does not, and scales by (new + 0.1) / old, as DINO's
    release does so that rounding never loses a row: its crops see slightly shifted places.
    """
    table_1DHW = table_LD[1:].T.unflatten(1, old)[None]
    if method == "antialias":
        made_1DHW = F.interpolate(table_1DHW, new, mode="bicubic", antialias=True)
    else:
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        made_1DHW = F.interpolate(table_1DHW, scale_factor=scale, mode="bicubic")
    return torch.cat([table_LD[:1], made_1DHW[0].flatten(1).T])


class VisionTransformer(nn.Module):
    """pixels_BCHW -> TowerOutput with vector_BE and tokens_BLD (every token after `ln_post`).

    `resize_positions` lets it take pictures of other sizes, its positions interpolated as
    `position_resizing` says.
    """

    def __init__(
        self, config: VitConfig, embed_dim: int, act: Activation, *, block: Block = ResidualBlock
    ) -> None:
        super().__init__()
        self.config = config
        self.resize_positions = False
        self.position_resizing: PositionResizing = "antialias"
        width, (rows, columns) = config.width, config.grid
        widths = (3, *(width for width, _ in config.stem))
        self.stem = nn.Sequential(
            *(
                ConvStage(a, b, blocks)
                for (a, b), (_, blocks) in zip(pairwise(widths), config.stem, strict=True)
            )
        )
        patch = config.patch_size >> len(config.stem)
        self.conv1 = nn.Conv2d(widths[-1], width, kernel_size=patch, stride=patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(rows * columns + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, act, causal=False, block=block
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches; another grid than the config's must be asked for."""
        if grid == self.config.grid:
            return self.positional_embedding
        if not self.resize_positions:
            raise UsageError(
                f"The image tower takes pictures of {self.config.image_size} pixels "
                f"(a grid of {self.config.grid} patches), got a grid of {grid}.",
                hint="Set resize_positions=True on the tower to interpolate its position table.",
            )
        return resized_positions(self.positional_embedding, self.config.grid, grid, self.position_resizing)

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels to the tokens the first block sees (patches, class token, positions, `ln_pre`)."""
        x_BDHW = self.conv1(self.stem(pixels_BCHW))
        x_BLD = x_BDHW.flatten(2).transpose(1, 2)
        cls_B1D = self.class_embedding.to(x_BLD.dtype).expand(len(x_BLD), 1, -1)
        x_BLD = torch.cat([cls_B1D, x_BLD], dim=1)
        rows, columns = x_BDHW.shape[-2:]
        return self.ln_pre(x_BLD + self.positions((rows, columns)).to(x_BLD.dtype))

    def forward(self, pixels_BCHW: Tensor, taps: Sequence[int] = ()) -> TowerOutput:
        x_BLD, layers = self.transformer(self.embed(pixels_BCHW), taps)
        tokens_BLD = self.ln_post(x_BLD)
        return TowerOutput(tokens_BLD[:, 0] @ self.proj, tokens_BLD, layers)
