"""FastViT image towers, whose training-time branches fold into single convolutions (`reparam`).

Parameters carry Apple's names (`network.0.0.token_mixer.mixer.rbr_conv.0.conv.weight`; folded:
`...token_mixer.reparam_conv.weight`).

Vasu, Gabriel, Zhu, Tuzel, Ranjan: "FastViT", ICCV 2023, arXiv 2303.14189; "MobileOne", CVPR 2023, arXiv
2206.04040; the variants MCi0 to MCi2: "MobileCLIP", CVPR 2024, arXiv 2311.17049.

Axis letters: B batch, C channels, H height, W width, N places (H * W), D output width, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.parts.backbones.reparam import LargeKernel, MobileOne, RepMixer, RepPosition, conv_bn
from moviola.types import UsageError

Mixer = Literal["repmixer", "attention"]


@dataclass(frozen=True)
class FastVitConfig:
    """A tower of stages; each field with one value a stage has the length of `layers`.

    `squeeze`: squeeze-and-excitation in the step down into this stage. `positions`: a depthwise
    convolution before the stage tells places apart. `layer_scale` is the start of every layer scale.
    """

    layers: tuple[int, ...] = (2, 6, 10, 2)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    mlp_ratios: tuple[float, ...] = (3.0, 3.0, 3.0, 3.0)
    mixers: tuple[Mixer, ...] = ("repmixer", "repmixer", "repmixer", "attention")
    squeeze: tuple[bool, ...] = (False, False, True, True)
    positions: tuple[bool, ...] = (False, False, False, True)
    kernel_size: int = 3
    patch_size: int = 7
    position_size: int = 7
    head_dim: int = 32
    expansion: float = 2.0
    layer_scale: float = 1e-5
    image_size: int | tuple[int, int] = 256
    kind: Literal["fastvit"] = "fastvit"

    def __post_init__(self) -> None:
        stages = (self.layers, self.dims, self.mlp_ratios, self.mixers, self.squeeze, self.positions)
        if len({len(values) for values in stages}) != 1 or not self.layers:
            raise UsageError(
                "A FastViT needs one value a stage in layers, dims, mlp_ratios, mixers, squeeze and "
                f"positions, got {', '.join(str(len(values)) for values in stages)} of them."
            )
        wrong = [
            d for d, m in zip(self.dims, self.mixers, strict=True) if m == "attention" and d % self.head_dim
        ]
        if wrong:
            raise UsageError(
                f"A stage with attention has width {wrong[0]}, not a multiple of {self.head_dim}."
            )


def mci0() -> FastVitConfig:
    return FastVitConfig()


def mci1() -> FastVitConfig:
    return FastVitConfig(layers=(4, 12, 20, 4))


def mci2() -> FastVitConfig:
    return FastVitConfig(layers=(4, 12, 24, 4), dims=(80, 160, 320, 640))


class ConvFfn(nn.Module):
    """A depthwise convolution under BatchNorm, then two 1x1 convolutions with GELU between."""

    def __init__(self, width: int, hidden: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.conv = conv_bn(width, width, kernel, groups=width)
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)
        for conv in (self.conv.conv, self.fc1, self.fc2):
            nn.init.trunc_normal_(cast(nn.Conv2d, conv).weight, std=0.02)
        for conv in (self.fc1, self.fc2):
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x_BCHW))))


class RepMixerBlock(nn.Module):
    """RepMixer, then a ConvFFN of its own layer scale."""

    def __init__(
        self,
        width: int,
        mlp_ratio: float,
        mixer_kernel: tuple[int, int],
        ffn_kernel: tuple[int, int],
        layer_scale: float = 1e-5,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.token_mixer = RepMixer(width, mixer_kernel, layer_scale, folded)
        self.convffn = ConvFfn(width, int(width * mlp_ratio), ffn_kernel)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), layer_scale))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.token_mixer(x_BCHW)
        return x_BCHW + self.layer_scale * self.convffn(x_BCHW)


class PlaceAttention(nn.Module):
    """Multi-head self-attention over the places of a feature map."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BNC = x_BCHW.flatten(2).transpose(1, 2)
        qkv_BNC = self.qkv(x_BNC)
        q_BHNK, k_BHNK, v_BHNK = qkv_BNC.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BNC = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK).transpose(1, 2).flatten(2)
        return self.proj(out_BNC).transpose(1, 2).unflatten(2, x_BCHW.shape[2:])


class AttentionBlock(nn.Module):
    """Attention under BatchNorm, then a ConvFFN, each with its layer scale."""

    def __init__(self, width: int, mlp_ratio: float, head_dim: int, layer_scale: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.token_mixer = PlaceAttention(width, head_dim)
        self.convffn = ConvFfn(width, int(width * mlp_ratio), (7, 7))
        self.layer_scale_1 = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.layer_scale_2 = nn.Parameter(torch.full((width, 1, 1), layer_scale))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW + self.layer_scale_1 * self.token_mixer(self.norm(x_BCHW))
        return x_BCHW + self.layer_scale_2 * self.convffn(x_BCHW)


class StepDown(nn.Module):
    """Halves height and width and changes the channels: a large depthwise kernel, then 1x1."""

    def __init__(self, channels: int, width: int, kernel: int, squeeze: bool, folded: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LargeKernel(channels, width, kernel, squeeze=squeeze, folded=folded),
            MobileOne(width, width, 1, folded=folded),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW)


class MeanHead(nn.Module):
    """The mean over all places times a matrix: x_BCHW -> (B, D)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(channels**-0.5 * torch.randn(channels, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean((2, 3)) @ self.proj


class FastVit(nn.Module):
    """pixels_BCHW in [0, 1] -> image_BD, not normalised. Any size from 32 pixels a side.

    `network` holds the stages with, before a stage, its `RepPosition`, and after it the step down.
    """

    def __init__(self, config: FastVitConfig, embed_dim: int, *, folded: bool = False) -> None:
        super().__init__()
        self.config = config
        first, last = config.dims[0], config.dims[-1]
        self.patch_embed = nn.Sequential(
            MobileOne(3, first, 3, stride=2, folded=folded),
            MobileOne(first, first, 3, stride=2, groups=first, folded=folded),
            MobileOne(first, first, 1, folded=folded),
        )
        network: list[nn.Module] = []
        for stage, width in enumerate(config.dims):
            if config.positions[stage]:
                network.append(RepPosition(width, config.position_size, folded))
            network.append(nn.Sequential(*(self._block(stage, folded) for _ in range(config.layers[stage]))))
            if stage + 1 < len(config.dims):
                network.append(
                    StepDown(
                        width, config.dims[stage + 1], config.patch_size, config.squeeze[stage + 1], folded
                    )
                )
        self.network = nn.ModuleList(network)
        wide = int(last * config.expansion)
        self.conv_exp = MobileOne(last, wide, 3, groups=last, squeeze=True, folded=folded)
        self.head = MeanHead(wide, embed_dim)

    def _block(self, stage: int, folded: bool) -> nn.Module:
        c, width = self.config, self.config.dims[stage]
        if c.mixers[stage] == "attention":
            return AttentionBlock(width, c.mlp_ratios[stage], c.head_dim, c.layer_scale)
        kernel = (c.kernel_size, c.kernel_size)
        return RepMixerBlock(width, c.mlp_ratios[stage], kernel, (7, 7), c.layer_scale, folded)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BCHW = self.patch_embed(pixels_BCHW)
        for part in self.network:
            x_BCHW = part(x_BCHW)
        return self.head(self.conv_exp(x_BCHW))
