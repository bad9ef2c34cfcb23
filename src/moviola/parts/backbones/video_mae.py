"""The vision transformer of VideoMAE over tubelets, as encoder of what a mask leaves and as decoder.

A block is pre-norm attention and MLP. Queries and values have a bias, keys have none. With `cosine` the
logits are cosines times a learned factor a head (Liu et al. 2022, Swin V2). Positions are a fixed table of
sines and cosines over the tokens in order, and not among the weights. Parameter names are the authors'.

Axis letters: B clips, T frames, C channels, P pixels of a side, N tokens of a clip, V of them seen, K kept
or reconstructed, L tokens of the decoder (V + K), D width, E the decoder's, H heads, Q pixels of a tubelet
in one channel, X numbers of a tubelet (C * Q, channel by channel).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moviola.parts.backbones.tubelet_vit import TubeletPatches
from moviola.parts.stan import drop_path
from moviola.parts.timm_vit import EPSILON, Shapes
from moviola.parts.video_masks import Grid, take
from moviola.types import Refusal, UsageError

MOST_LOG_SCALE = math.log(100.0)
"""The largest logarithm of a head's factor in cosine attention; it starts at log 10."""


@dataclass(frozen=True)
class StackConfig:
    """A stack of blocks: ViT-B's by default.

    qkv_bias     queries and values have a bias
    cosine       cosine attention
    init_values  where not 0, each branch is scaled channel by channel, from this value on
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    cosine: bool = False
    init_values: float = 0.0

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise UsageError(
                f"A stack has layers, and a width that divides by its heads; got {self.layers} layers, width "
                f"{self.width} and {self.heads} heads."
            )
        if self.init_values < 0:
            raise UsageError(f"init_values must not be negative, got {self.init_values}.")


_HEADS = {1280: 16, 1408: 16}  # widths whose heads are not 64 wide: those of ViT-H and ViT-g


def stack_of(shapes: Shapes, root: str) -> StackConfig:
    """The stack whose tensors begin with `root`; heads are 64 wide, but for two widths of the authors'."""
    hidden, width = shapes(root + "blocks.0.mlp.fc1.weight")
    return StackConfig(
        width,
        shapes.count(root + "blocks.{n}.norm1.weight"),
        _HEADS.get(width, max(1, width // 64)),
        hidden / width,
        qkv_bias=root + "blocks.0.attn.q_bias" in shapes.state,
        cosine=root + "blocks.0.attn.scale" in shapes.state,
        init_values=0.1 if root + "blocks.0.gamma_1" in shapes.state else 0.0,
    )


class BiasedAttention(nn.Module):
    """x_BND -> x_BND; biases of queries and values are parameters of their own, the keys' is zero."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias else None
        scale_H11 = torch.full((config.heads, 1, 1), math.log(10.0))
        self.scale = nn.Parameter(scale_H11) if config.cosine else None
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv_BND = F.linear(x_BND, self.qkv.weight, bias)
        q, k, v = qkv_BND.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.scale is not None:
            factor_H11 = self.scale.clamp(max=MOST_LOG_SCALE).exp()
            q, k = F.normalize(q, dim=-1) * factor_H11, F.normalize(k, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, scale=None if self.scale is None else 1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """`rate` is the chance of each branch to be left out for a clip while training."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        width, self.rate = config.width, 0.0
        hidden = round(width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = BiasedAttention(config)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        layers = [("fc1", nn.Linear(width, hidden)), ("act", nn.GELU()), ("fc2", nn.Linear(hidden, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        scale_D = torch.full((width,), config.init_values)
        self.gamma_1 = nn.Parameter(scale_D.clone()) if config.init_values else None
        self.gamma_2 = nn.Parameter(scale_D) if config.init_values else None

    def forward(self, x_BND: Tensor) -> Tensor:
        attended_BND, scale = self.attn(self.norm1(x_BND)), self.gamma_1
        x_BND = x_BND + drop_path(
            attended_BND if scale is None else scale * attended_BND, self.rate, self.training
        )
        changed_BND, scale = self.mlp(self.norm2(x_BND)), self.gamma_2
        return x_BND + drop_path(
            changed_BND if scale is None else scale * changed_BND, self.rate, self.training
        )


class Stack(nn.Module):
    """Blocks and a norm: x_BND -> x_BND. `checkpointing` keeps each block's input alone for the way back."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm: nn.Module = nn.LayerNorm(config.width, eps=EPSILON)

    def run(self, x_BND: Tensor) -> Tensor:
        """Through all blocks, without the norm."""
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, use_reentrant=False)
            else:
                x_BND = block(x_BND)
        return x_BND

    def set_drop_path(self, rate: float) -> None:
        """The last block's chance to be left out is `rate`, the first one's 0; those between rise evenly."""
        if not 0 <= rate < 1:
            raise UsageError(f"drop_path lies in [0, 1), got {rate}.")
        for n, block in enumerate(self.blocks):
            block.rate = rate * n / max(1, len(self.blocks) - 1)  # type: ignore[assignment]

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class Encoder(Stack):
    """frames_BTCPP -> tokens_BKD after the norm, of the tokens at `index_BK` alone (None: of all).

    Tokens that are not asked for are never computed, from the first linear map on.
    """

    def __init__(self, config: StackConfig, frames: int, side: int, patch: int, tubelet: int) -> None:
        super().__init__(config)
        if frames < 1 or frames % tubelet or side < 1 or side % patch:
            raise UsageError(
                f"Clips are cut in tubelets of {tubelet} frames and {patch} x {patch} pixels; {frames} of "
                f"{side} x {side} do not divide."
            )
        self.shape = (frames, 3, side, side)
        self.grid: Grid = (frames // tubelet, side // patch, side // patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=TubeletPatches(3, config.width, patch, tubelet)))
        self.init_weights()

    def embed(self, frames_BTCPP: Tensor, index_BK: Tensor | None = None) -> Tensor:
        """What the first block sees."""
        self.check(frames_BTCPP)
        table_ND = positions(math.prod(self.grid), self.config.width, frames_BTCPP.device)
        if index_BK is None:
            tokens_BND: Tensor = self.patch_embed(frames_BTCPP).flatten(1, 2)
            return tokens_BND + table_ND.to(tokens_BND.dtype)
        return self.embed_patches(take(self.patches(frames_BTCPP), index_BK), index_BK)

    def embed_patches(self, patches_BKX: Tensor, index_BK: Tensor) -> Tensor:
        """The same from tubelets, as `patches` gives them, and where they are: a linear map."""
        projection = self.patch_embed.proj
        assert isinstance(projection, TubeletPatches)
        tokens_BKD = F.linear(patches_BKX, projection.weight.flatten(1), projection.bias)
        table_ND = positions(math.prod(self.grid), self.config.width, patches_BKX.device)
        return tokens_BKD + table_ND[index_BK].to(tokens_BKD.dtype)

    def forward(self, frames_BTCPP: Tensor, index_BK: Tensor | None = None) -> Tensor:
        x_BKD: Tensor = self.norm(self.run(self.embed(frames_BTCPP, index_BK)))
        return x_BKD

    def patches(self, frames_BTCPP: Tensor) -> Tensor:
        """patches_BNX: the pixels of every tubelet, channel by channel, each by (frame, row, column)."""
        self.check(frames_BTCPP)
        layers, rows, columns = self.grid
        tubelet, patch = self.shape[0] // layers, self.shape[-1] // rows
        x = frames_BTCPP.reshape(-1, layers, tubelet, 3, rows, patch, columns, patch)
        return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)

    def check(self, frames_BTCPP: Tensor) -> None:
        if frames_BTCPP.ndim != 5 or tuple(frames_BTCPP.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise UsageError(
                f"This model takes clips (B, {wanted}) of frames, channels, height and width; got "
                f"{tuple(frames_BTCPP.shape)}.",
                hint="Its tubelets and positions are made for that: scale the frames, or sample as many.",
            )


class Decoder(Stack):
    """Tokens in, the numbers of the last `count` tokens' tubelets out."""

    def __init__(self, config: StackConfig, outputs: int) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.width, outputs)
        self.init_weights()

    def forward(self, x_BND: Tensor, count: int) -> Tensor:
        numbers_BKX: Tensor = self.head(self.norm(self.run(x_BND)[:, -count:]))
        return numbers_BKX


class MaskedAutoencoder(nn.Module):
    """An encoder of the tubelets that are seen, and a decoder that says others' pixels; it may be dropped.

    `size` is frames, side, patch and tubelet.
    """

    def __init__(
        self, encoder: StackConfig, decoder: StackConfig | None, size: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        _, _, patch, tubelet = size
        self.encoder = Encoder(encoder, *size)
        self.decoder: Decoder | None = None
        if decoder is not None:
            self.encoder_to_decoder = nn.Linear(encoder.width, decoder.width, bias=False)
            nn.init.xavier_uniform_(self.encoder_to_decoder.weight)
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder.width))
            self.decoder = Decoder(decoder, 3 * tubelet * patch**2)

    def check_decoder(self) -> Decoder:
        if self.decoder is None:
            raise Refusal(
                "This model has no decoder, so it cannot be pre-trained.",
                hint="Begin with a pre-trained one, or with a new one: --model PRESET.",
            )
        return self.decoder

    def drop_decoder(self) -> None:
        if self.decoder is not None:
            self.decoder = None
            del self.encoder_to_decoder, self.mask_token

    def decoder_input(self, tokens_BVD: Tensor, seen_BV: Tensor, said_BK: Tensor) -> Tensor:
        """x_BLE: what was seen at its places, then a mask token at each place of which something is said."""
        seen_BVE = self.encoder_to_decoder(tokens_BVD)
        table_NE = positions(math.prod(self.encoder.grid), seen_BVE.shape[-1], seen_BVE.device)
        table_NE = table_NE.to(seen_BVE.dtype)
        asked_BKE = self.mask_token.to(seen_BVE.dtype) + table_NE[said_BK]
        return torch.cat([seen_BVE + table_NE[seen_BV], asked_BKE], dim=1)

    def reconstruct(self, patches_BNX: Tensor, seen_BV: Tensor, said_BK: Tensor) -> Tensor:
        """numbers_BKX: tubelets at `said_BK`, as `pixel_targets` has them, from those at `seen_BV` alone."""
        decoder, encoder = self.check_decoder(), self.encoder
        x_BVD = encoder.norm(encoder.run(encoder.embed_patches(take(patches_BNX, seen_BV), seen_BV)))
        numbers_BKX: Tensor = decoder(self.decoder_input(x_BVD, seen_BV, said_BK), said_BK.shape[1])
        return numbers_BKX


@lru_cache(maxsize=8)
def positions(count: int, width: int, device: torch.device) -> Tensor:
    """table_ND: sines in even and cosines in odd channels of n / 10000^(2 floor(d / 2) / D)."""
    with torch.inference_mode(False):
        rate_D = 10000.0 ** -(2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
        angle_ND = torch.arange(count, dtype=torch.float64)[:, None] * rate_D
        even_D = torch.arange(width) % 2 == 0
        return torch.where(even_D, angle_ND.sin(), angle_ND.cos()).float().to(device)


def pixel_targets(
    patches_BKX: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    normalise: bool = True,
) -> Tensor:
    """What a decoder is to say of tubelets: target_BKX, pixel by pixel, the channels of each together.

    `patches_BKX` are pixels less `mean` by `std`, channel by channel. The target is of pixels from 0 to 1;
    with `normalise` each channel of a tubelet has its own mean taken off and is divided by its standard
    deviation (of a sample) plus 1e-6.
    """
    x_BKCQ = patches_BKX.unflatten(-1, (3, -1))
    x_BKCQ = x_BKCQ * x_BKCQ.new_tensor(std)[:, None] + x_BKCQ.new_tensor(mean)[:, None]
    if normalise:
        spread_BKC1, mean_BKC1 = torch.std_mean(x_BKCQ, dim=-1, keepdim=True)
        x_BKCQ = (x_BKCQ - mean_BKC1) / (spread_BKC1 + 1e-6)
    return x_BKCQ.transpose(-1, -2).flatten(-2)
