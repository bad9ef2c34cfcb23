"""Blocks whose training-time branches fold into one convolution (MobileOne, RepLKNet, FastViT).

While it trains, a block is the sum of several linear branches, each with its own BatchNorm; in eval mode
their sum is one convolution, and `fold` puts that convolution in their place. Parameters carry Apple's
names (`rbr_conv.0.conv.weight`, `lkb_origin.bn.bias`; folded: `reparam_conv.weight`, `lkb_reparam.bias`).

Axis letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.types import UsageError


def conv_bn(
    channels: int, width: int, kernel: tuple[int, int], *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size (at stride 1), and its BatchNorm, as `conv` and `bn`."""
    made = nn.Sequential()
    made.add_module("conv", _conv(channels, width, kernel, stride, groups, bias=False))
    made.add_module("bn", nn.BatchNorm2d(width))
    return made


def _conv(
    channels: int, width: int, kernel: tuple[int, int], stride: int, groups: int, *, bias: bool = True
) -> nn.Conv2d:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(channels, width, kernel, stride, padding, groups=groups, bias=bias)


def identity_kernel(channels: int, kernel: tuple[int, int], groups: int) -> Tensor:
    """The convolution that changes nothing, float64 (C, C / groups, kh, kw)."""
    within = channels // groups
    made = torch.zeros(channels, within, *kernel, dtype=torch.float64)
    rows = torch.arange(channels)
    made[rows, rows % within, kernel[0] // 2, kernel[1] // 2] = 1
    return made


def with_norm(kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias, float64, of a convolution without bias and its BatchNorm in eval mode."""
    mean, var = cast(Tensor, bn.running_mean).double(), cast(Tensor, bn.running_var).double()
    factor = bn.weight.double() / (var + bn.eps).sqrt()
    return kernel.double() * factor.view(-1, 1, 1, 1), bn.bias.double() - mean * factor


def _fold_branch(branch: nn.Module, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A `conv_bn` as kernel and bias, its kernel zero-padded to `kernel`."""
    conv, bn = cast(nn.Conv2d, branch.conv), cast(nn.BatchNorm2d, branch.bn)
    weight, bias = with_norm(conv.weight, bn)
    across, down = kernel[1] - weight.shape[3], kernel[0] - weight.shape[2]
    return F.pad(weight, (across // 2, across // 2, down // 2, down // 2)), bias


def _filled(conv: nn.Conv2d, weight: Tensor, bias: Tensor, like: Tensor) -> nn.Conv2d:
    conv = conv.to(like.device, like.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight)
        cast(Tensor, conv.bias).copy_(bias)
    return conv


def _drop(module: nn.Module, *names: str) -> None:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


class Folding(nn.Module):
    """A module with branches; `fold()` replaces them by one convolution, in place."""

    folded: bool

    @abstractmethod
    def fold(self) -> None:
        """Put one convolution in the place of all branches."""


def fold_branches(module: nn.Module) -> nn.Module:
    """A copy in which every `Folding` part is folded; the same outputs in eval mode, fewer steps.

    Raises `UsageError` in train mode: BatchNorm then goes by the batch, which no convolution can do.
    """
    if any(part.training for part in module.modules()):
        raise UsageError(
            "Only a model in eval mode can be folded: in training BatchNorm depends on the batch.",
            hint="Call reparameterize(model.eval()).",
        )
    made = copy.deepcopy(module)
    for part in list(made.modules()):
        if isinstance(part, Folding) and not part.folded:
            part.fold()
    return made.eval()


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture holds. `names`: of the two 1x1 convolutions."""

    def __init__(self, channels: int, reduced: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(channels, reduced, 1))
        self.add_module(names[1], nn.Conv2d(reduced, channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        reduce, expand = (getattr(self, name) for name in self.names)
        return x_BCHW * torch.sigmoid(expand(F.relu(reduce(x_BCHW.mean((2, 3), keepdim=True)))))


class MobileOne(Folding):
    """Sum of a convolution, a 1x1 convolution and the input, each under BatchNorm; then SE and GELU.

    The 1x1 branch is there where the kernel is taller than one, the input branch where input and output
    agree in size. `branches=0` without `scale` leaves the input branch alone: a BatchNorm.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        groups: int = 1,
        branches: int = 1,
        scale: bool = True,
        squeeze: bool = False,
        act: bool = True,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.channels, self.width, self.stride, self.groups = channels, width, stride, groups
        self.act, self.folded = act, folded
        self.se = SqueezeExcite(width, width // 16, ("reduce", "expand")) if squeeze else nn.Identity()
        if folded:
            self.reparam_conv = self._one()
            return
        alike = channels == width and stride == 1
        self.rbr_skip = nn.BatchNorm2d(channels) if alike else None
        self.rbr_conv = nn.ModuleList(
            conv_bn(channels, width, self.kernel, stride=stride, groups=groups) for _ in range(branches)
        )
        scaled = scale and self.kernel[0] > 1
        self.rbr_scale = conv_bn(channels, width, (1, 1), stride=stride, groups=groups) if scaled else None

    def _one(self) -> nn.Conv2d:
        return _conv(self.channels, self.width, self.kernel, self.stride, self.groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.folded:
            out_BCHW = self.reparam_conv(x_BCHW)
        else:
            branches = [b for b in (self.rbr_scale, self.rbr_skip, *self.rbr_conv) if b is not None]
            out_BCHW = branches[0](x_BCHW)
            for branch in branches[1:]:
                out_BCHW = out_BCHW + branch(x_BCHW)
        out_BCHW = self.se(out_BCHW)
        return F.gelu(out_BCHW) if self.act else out_BCHW

    def kernel_and_bias(self) -> tuple[Tensor, Tensor]:
        """All branches as one convolution, float64."""
        parts = [_fold_branch(b, self.kernel) for b in (*self.rbr_conv, self.rbr_scale) if b is not None]
        if self.rbr_skip is not None:
            weight = identity_kernel(self.channels, self.kernel, self.groups)
            parts.append(with_norm(weight.to(self.rbr_skip.weight.device), self.rbr_skip))
        kernels, biases = zip(*parts, strict=True)
        return torch.stack(kernels).sum(0), torch.stack(biases).sum(0)

    def fold(self) -> None:
        with torch.no_grad():
            like = next(self.parameters())
            self.reparam_conv = _filled(self._one(), *self.kernel_and_bias(), like)
        _drop(self, "rbr_skip", "rbr_conv", "rbr_scale")
        self.folded = True


class LargeKernel(Folding):
    """A strided large depthwise convolution and a small one beside it; SE and GELU on their sum."""

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int,
        *,
        small: int = 3,
        stride: int = 2,
        squeeze: bool = False,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.sizes, self.stride = (kernel, kernel), (channels, width), stride
        self.folded = folded
        # the reduced width is a quarter, rounded to a multiple of 8 as timm does
        reduced = max(8, (int(width * 0.25 + 4) // 8) * 8)
        self.se = SqueezeExcite(width, reduced, ("fc1", "fc2")) if squeeze else nn.Identity()
        if folded:
            self.lkb_reparam = self._one()
            return
        self.lkb_origin = conv_bn(channels, width, self.kernel, stride=stride, groups=channels)
        self.small_conv = conv_bn(channels, width, (small, small), stride=stride, groups=channels)

    def _one(self) -> nn.Conv2d:
        return _conv(*self.sizes, self.kernel, self.stride, self.sizes[0])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.folded:
            out_BCHW = self.lkb_reparam(x_BCHW)
        else:
            out_BCHW = self.lkb_origin(x_BCHW) + self.small_conv(x_BCHW)
        return F.gelu(self.se(out_BCHW))

    def fold(self) -> None:
        with torch.no_grad():
            (large, bias), (small, more) = (
                _fold_branch(b, self.kernel) for b in (self.lkb_origin, self.small_conv)
            )
            like = next(self.lkb_origin.parameters())
            self.lkb_reparam = _filled(self._one(), large + small, bias + more, like)
        _drop(self, "lkb_origin", "small_conv")
        self.folded = True


class RepMixer(Folding):
    """Mixes neighbouring places: x + scale * (mixer(x) - norm(x)), both depthwise and linear."""

    def __init__(
        self, width: int, kernel: tuple[int, int], layer_scale: float = 1e-5, folded: bool = False
    ) -> None:
        super().__init__()
        self.width, self.kernel, self.folded = width, kernel, folded
        if folded:
            self.reparam_conv = self._one()
            return
        self.norm = MobileOne(width, width, kernel, groups=width, branches=0, scale=False, act=False)
        self.mixer = MobileOne(width, width, kernel, groups=width, act=False)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), layer_scale))

    def _one(self) -> nn.Conv2d:
        return _conv(self.width, self.width, self.kernel, 1, self.width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.folded:
            return self.reparam_conv(x_BCHW)
        return x_BCHW + self.layer_scale * (self.mixer(x_BCHW) - self.norm(x_BCHW))

    def fold(self) -> None:
        with torch.no_grad():
            (mixer, bias), (norm, less) = self.mixer.kernel_and_bias(), self.norm.kernel_and_bias()
            scale_C = self.layer_scale.double().flatten()
            one = identity_kernel(self.width, self.kernel, self.width).to(mixer.device)
            weight = one + scale_C.view(-1, 1, 1, 1) * (mixer - norm)
            self.reparam_conv = _filled(self._one(), weight, scale_C * (bias - less), self.layer_scale)
        _drop(self, "norm", "mixer", "layer_scale")
        self.folded = True


class RepPosition(Folding):
    """x plus a large depthwise convolution of it, which tells places apart by their surroundings."""

    def __init__(self, width: int, kernel: int = 7, folded: bool = False) -> None:
        super().__init__()
        self.width, self.kernel, self.folded = width, (kernel, kernel), folded
        if folded:
            self.reparam_conv = self._one()
        else:
            self.pe = self._one()

    def _one(self) -> nn.Conv2d:
        return _conv(self.width, self.width, self.kernel, 1, self.width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.reparam_conv(x_BCHW) if self.folded else self.pe(x_BCHW) + x_BCHW

    def fold(self) -> None:
        with torch.no_grad():
            one = identity_kernel(self.width, self.kernel, self.width).to(self.pe.weight.device)
            weight, bias = one + self.pe.weight.double(), cast(Tensor, self.pe.bias)
            self.reparam_conv = _filled(self._one(), weight, bias, self.pe.weight)
        _drop(self, "pe")
        self.folded = True
