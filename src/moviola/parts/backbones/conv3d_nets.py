"""Three-dimensional convolutional networks of clips: C3D with BatchNorm, R3D and R(2+1)D, one vector a clip.

C3D: Tran, Bourdev, Fergus, Torresani, Paluri, ICCV 2015, arXiv 1412.0767. R3D and R(2+1)D: Tran, Wang,
Torresani, Ray, LeCun, Paluri, CVPR 2018, arXiv 1711.11248; here with few blocks a stage, as self-supervised
work uses them. Parameters are named as by Wang et al. (laura-wang/video_repres_sts), whose residual networks
have the names of the R2Plus1D-PyTorch repository that most such work shares.

Axis letters: B clips, C channels, T frames, H, W height and width, D width of the vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from moviola.parts.side_network import over_time
from moviola.types import CheckpointError, UsageError

Kind = Literal["c3d", "r3d", "r21d"]
Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class ConvNetConfig:
    """Which network, the channels of its stages, and for the residual ones the blocks of each stage."""

    kind: Kind = "c3d"
    widths: Four = (64, 128, 256, 512)
    layers: Four = (1, 1, 1, 1)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"The network is one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        if len(self.widths) != 4 or len(self.layers) != 4 or min(*self.widths, *self.layers) < 1:
            raise UsageError(
                f"The network has four widths and four numbers of blocks, each 1 or more, got {self.widths} "
                f"and {self.layers}."
            )


class C3D(nn.Module):
    """Eight 3 x 3 x 3 convolutions in five stages with max pooling between; the first keeps all frames."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        first, second, third, fourth = config.widths
        sizes = {"1": (3, first), "2": (first, second), "3a": (second, third), "3b": (third, third)}
        sizes |= {"4a": (third, fourth)} | dict.fromkeys(("4b", "5a", "5b"), (fourth, fourth))
        for name, (given, made) in sizes.items():
            self.add_module(f"conv{name}", nn.Conv3d(given, made, 3, padding=1))
            self.add_module(f"bn{name}", nn.BatchNorm3d(made))

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Clips of 8 frames or more and at least 16 pixels a side -> vector_BD."""
        x = frames_BCTHW
        for stage in (("1",), ("2",), ("3a", "3b"), ("4a", "4b"), ("5a", "5b")):
            for name in stage:
                x = F.relu(getattr(self, f"bn{name}")(getattr(self, f"conv{name}")(x)))
            if stage != ("5a", "5b"):
                x = F.max_pool3d(x, (1 if stage == ("1",) else 2, 2, 2))
        return x.mean(dim=(2, 3, 4))


class FullConv(nn.Module):
    """A convolution over time and space at once."""

    def __init__(
        self, given: int, made: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
    ) -> None:
        super().__init__()
        time, rows, columns = kernel
        around = (time // 2, rows // 2, columns // 2)
        self.temporal_spatial_conv = nn.Conv3d(given, made, kernel, stride, around, bias=False)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return cast(Tensor, self.temporal_spatial_conv(x_BCTHW))


class FactoredConv(nn.Module):
    """A convolution over space, a norm, and one over time, with about as many weights as the full one."""

    def __init__(
        self, given: int, made: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
    ) -> None:
        super().__init__()
        time, rows, columns = kernel
        space = rows * columns
        between = time * space * given * made // (space * given + time * made)
        self.spatial_conv = nn.Conv3d(
            given, between, (1, rows, columns), (1, *stride[1:]), (0, rows // 2, columns // 2), bias=False
        )
        self.bn = nn.BatchNorm3d(between)
        self.temporal_conv = nn.Conv3d(
            between, made, (time, 1, 1), (stride[0], 1, 1), (time // 2, 0, 0), bias=False
        )

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = F.relu(self.bn(self.spatial_conv(x_BCTHW)))
        if self.temporal_conv.stride[0] > 1:
            return cast(Tensor, self.temporal_conv(x_BCTHW))
        return over_time(x_BCTHW.movedim(1, -1), self.temporal_conv).movedim(-1, 1)  # the same, faster


class Block(nn.Module):
    """Two convolutions and the way past them; where it halves, the way past is a 1 x 1 x 1 convolution."""

    def __init__(self, conv: type[FullConv | FactoredConv], given: int, made: int, halves: bool) -> None:
        super().__init__()
        stride = (2, 2, 2) if halves else (1, 1, 1)
        if halves:
            self.downsampleconv = conv(given, made, (1, 1, 1), stride)
            self.downsamplebn = nn.BatchNorm3d(made)
        self.halves = halves
        self.conv1, self.bn1 = conv(given, made, (3, 3, 3), stride), nn.BatchNorm3d(made)
        self.conv2, self.bn2 = conv(made, made, (3, 3, 3), (1, 1, 1)), nn.BatchNorm3d(made)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        inner_BCTHW = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_BCTHW)))))
        past_BCTHW = self.downsamplebn(self.downsampleconv(x_BCTHW)) if self.halves else x_BCTHW
        return F.relu(past_BCTHW + inner_BCTHW)


class Stage(nn.Module):
    """`block1`, which may halve, and the others."""

    def __init__(
        self, conv: type[FullConv | FactoredConv], given: int, made: int, count: int, halves: bool
    ) -> None:
        super().__init__()
        self.block1 = Block(conv, given, made, halves)
        self.blocks = nn.ModuleList(Block(conv, made, made, False) for _ in range(count - 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = self.block1(x_BCTHW)
        for block in self.blocks:
            x_BCTHW = block(x_BCTHW)
        return x_BCTHW


class ResNet3d(nn.Module):
    """R3D, or with factored convolutions R(2+1)D: a 3 x 7 x 7 stem and four residual stages."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        conv = FactoredConv if config.kind == "r21d" else FullConv
        width = config.widths[0]
        self.conv1, self.bn1 = conv(3, width, (3, 7, 7), (1, 2, 2)), nn.BatchNorm3d(width)
        given = (width, *config.widths)
        for n, count in enumerate(config.layers):
            self.add_module(f"conv{n + 2}", Stage(conv, given[n], given[n + 1], count, n > 0))

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Clips of any length and size -> vector_BD."""
        x = F.relu(self.bn1(self.conv1(frames_BCTHW)))
        for n in range(2, 6):
            x = getattr(self, f"conv{n}")(x)
        return x.mean(dim=(2, 3, 4))


def conv_net(config: ConvNetConfig) -> C3D | ResNet3d:
    return C3D(config) if config.kind == "c3d" else ResNet3d(config)


def conv_net_config(state: Mapping[str, Tensor]) -> ConvNetConfig:
    """The configuration of a network with these weights, from its names and shapes."""
    names = [f"conv{n}.weight" for n in ("1", "2", "3a", "4a")]
    if "conv5b.weight" not in state:
        names = [f"conv{n}.block1.bn2.weight" for n in range(2, 6)]
    if missing := [name for name in names if name not in state]:
        raise CheckpointError(
            f"These are no weights of C3D, R3D or R(2+1)D: {', '.join(missing)} are missing."
        )
    widths = cast(Four, tuple(len(state[name]) for name in names))
    if "conv5b.weight" in state:
        return ConvNetConfig("c3d", widths)
    others = (
        {name.split(".")[2] for name in state if name.startswith(f"conv{n}.blocks.")} for n in range(2, 6)
    )
    layers = cast(Four, tuple(1 + len(numbers) for numbers in others))
    return ConvNetConfig("r21d" if "conv1.temporal_conv.weight" in state else "r3d", widths, layers)
