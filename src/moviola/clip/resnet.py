"""OpenAI's ModifiedResNet with attention pooling, parameter names as released under `visual.`.

It differs from the usual ResNet in three places: a stem of three convolutions with an average pool,
strides done by average pools before the last 1x1 (and in the shortcut), and a final attention pool
whose only query is the mean token. Axis letters: B batch, C channels, H and W grid, L cells, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import TowerOutput
from moviola.clip.config import ResNetConfig


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(channels, out, 1, bias=False)),
                        ("1", nn.BatchNorm2d(out)),
                    ]
                )
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = torch.relu(self.bn1(self.conv1(x_BCHW)))
        out_BCHW = self.avgpool(torch.relu(self.bn2(self.conv2(out_BCHW))))
        out_BCHW = self.bn3(self.conv3(out_BCHW))
        short_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return torch.relu(out_BCHW + short_BCHW)


class AttentionPool(nn.Module):
    """Cells attended by their mean: x_BCHW -> (vector_BE, tokens_BLD with the mean token first)."""

    def __init__(self, cells: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, width) / width**0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        x_BLD = x_BCHW.flatten(2).transpose(1, 2)
        x_BLD = torch.cat([x_BLD.mean(1, keepdim=True), x_BLD], dim=1)
        x_BLD = x_BLD + self.positional_embedding.to(x_BLD.dtype)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out_BH1K = F.scaled_dot_product_attention(
            split(self.q_proj(x_BLD[:, :1])), split(self.k_proj(x_BLD)), split(self.v_proj(x_BLD))
        )
        return self.c_proj(out_BH1K.transpose(1, 2).flatten(2)[:, 0]), x_BLD


class ModifiedResNet(nn.Module):
    """pixels_BCHW -> TowerOutput; `taps` 0..3 are the feature maps (B, C, H, W) of layer1..layer4."""

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for n, blocks in enumerate(config.layers):
            stage = []
            for b in range(blocks):
                stage.append(Bottleneck(channels, width << n, stride=2 if n and b == 0 else 1))
                channels = (width << n) * Bottleneck.expansion
            setattr(self, f"layer{n + 1}", nn.Sequential(*stage))
        cells = (config.image_size // 32) ** 2
        self.attnpool = AttentionPool(cells, channels, config.heads, embed_dim)
        self.init_weights()

    def init_weights(self) -> None:
        std = self.attnpool.c_proj.in_features**-0.5
        for linear in (
            self.attnpool.q_proj,
            self.attnpool.k_proj,
            self.attnpool.v_proj,
            self.attnpool.c_proj,
        ):
            nn.init.normal_(linear.weight, std=std)
        for name, parameter in self.named_parameters():
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(parameter)

    def stem(self, x_BCHW: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x_BCHW = torch.relu(norm(conv(x_BCHW)))
        return F.avg_pool2d(x_BCHW, 2)

    def forward(self, pixels_BCHW: Tensor, taps: Sequence[int] = ()) -> TowerOutput:
        x_BCHW = self.stem(pixels_BCHW)
        layers = {}
        for n in range(4):
            x_BCHW = getattr(self, f"layer{n + 1}")(x_BCHW)
            if n in taps or n - 4 in taps:
                layers[n] = x_BCHW
        vector_BD, tokens_BLD = self.attnpool(x_BCHW)
        return TowerOutput(vector_BD, tokens_BLD, layers)
