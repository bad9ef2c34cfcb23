"""MobileCLIP's transformers: its text towers, and the ViT-B/16 with a stem of convolutions.

Parameters carry Apple's names (`transformer.1.pre_norm_mha.1.qkv_proj.weight`). Attention sees padding,
as it did in training: a text tower that is not causal must be given whole contexts, zero-padded.

Axis letters: B batch, C channels, H height, W width, L tokens, D width, E embedding width, K width of a
head, N texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import TowerOutput
from moviola.parts.backbones.fastvit import RepMixerBlock
from moviola.types import UsageError


@dataclass(frozen=True)
class MobileTextConfig:
    """A text tower. `base`: transformer layers. `mct`: these between two one-dimensional RepMixer blocks.

    `heads` and `ffn_multipliers` are one number, or one a layer. A `causal` `mct` tower masks its
    transformer layers only: a RepMixer looks to both sides.
    """

    variant: Literal["base", "mct"] = "base"
    causal: bool = False
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int | tuple[int, ...] = 8
    ffn_multipliers: float | tuple[float, ...] = 4.0
    mixer_kernel: int = 11
    mixer_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.variant not in ("base", "mct"):
            raise UsageError(f"There is no text tower {self.variant!r}.", hint="Use base or mct.")
        for name in ("heads", "ffn_multipliers"):
            values = self.per_layer(name)
            if len(values) != self.layers:
                raise UsageError(f"The text tower has {self.layers} layers, but {len(values)} {name}.")
        wrong = [heads for heads in self.per_layer("heads") if heads < 1 or self.width % heads]
        if wrong:
            raise UsageError(f"The text tower's width {self.width} does not divide by {wrong[0]:g} heads.")

    def per_layer(self, name: str) -> tuple[float, ...]:
        """The values of `heads` or `ffn_multipliers`, one a layer."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.layers

    @property
    def eot_id(self) -> None:
        """A text ends at its largest id."""
        return None


@dataclass(frozen=True)
class MobileVitConfig:
    """The ViT of MobileCLIP-B: three convolutions make patches of 16 pixels, then transformer layers."""

    image_size: int | tuple[int, int] = 224
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    kind: Literal["mobile-vit"] = "mobile-vit"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise UsageError(f"The ViT's width {self.width} does not divide by {self.heads} heads.")

    @property
    def patches(self) -> int:
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return (height // 16) * (width // 16)


class WideNorm(nn.LayerNorm):
    """LayerNorm that computes in float32 where its input is of half precision."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Positions(nn.Module):
    """A learned vector a place, resized (bilinear) where another number of places is asked for."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Module()
        self.pos_embed.pos_embed = nn.Parameter(torch.empty(1, 1, count, width))
        nn.init.trunc_normal_(self.pos_embed.pos_embed, std=width**-0.5)

    def forward(self, count: int) -> Tensor:
        table_11LD = cast(Tensor, self.pos_embed.pos_embed)
        if count != table_11LD.shape[2]:
            table_11LD = F.interpolate(table_11LD, (count, table_11LD.shape[3]), mode="bilinear")
        return table_11LD[0]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, *, causal: bool = False) -> Tensor:
        qkv_BLD = self.qkv_proj(x_BLD)
        q_BHLK, k_BHLK, v_BHLK = qkv_BLD.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=causal)
        return self.out_proj(out_BHLK.transpose(1, 2).flatten(2))


class PreNormBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.pre_norm_mha = nn.Sequential(WideNorm(width), SelfAttention(width, heads))
        # the fourth place is the authors' dropout of 0: it keeps their names
        self.pre_norm_ffn = nn.Sequential(
            WideNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width)
        )

    def forward(self, x_BLD: Tensor, *, causal: bool = False) -> Tensor:
        norm, attention = self.pre_norm_mha
        x_BLD = x_BLD + attention(norm(x_BLD), causal=causal)
        return x_BLD + self.pre_norm_ffn(x_BLD)


class TextMixerBlock(RepMixerBlock):
    """A RepMixer block over the tokens of a text: x_BLD -> x_BLD, kernels of one row."""

    def __init__(self, width: int, mlp_ratio: float, kernel: int, folded: bool) -> None:
        super().__init__(width, mlp_ratio, (1, kernel), (1, kernel), folded=folded)

    def forward(self, x_BLD: Tensor, *, causal: bool = False) -> Tensor:
        return super().forward(x_BLD.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)


class MobileText(nn.Module):
    """tokens_NL -> the projected vector at each text's largest id, not normalised."""

    def __init__(self, config: MobileTextConfig, embed_dim: int, *, folded: bool = False) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embedding_layer = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = Positions(config.context_length, width)

        def mixers() -> list[nn.Module]:
            if config.variant == "base":
                return []
            return [TextMixerBlock(width, config.mixer_ratio, config.mixer_kernel, folded)]

        shape = zip(config.per_layer("heads"), config.per_layer("ffn_multipliers"), strict=True)
        layers = [PreNormBlock(width, int(heads), math.ceil(width * m / 16) * 16) for heads, m in shape]
        self.transformer = nn.ModuleList([*mixers(), *layers, *mixers()])
        self.final_layer_norm = WideNorm(width)
        self.projection_layer = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.embedding_layer.weight, std=0.02)
        nn.init.normal_(self.projection_layer, std=width**-0.5)

    def forward(self, tokens_NL: Tensor) -> TowerOutput:
        """The vectors, and every token after the last norm."""
        x_NLD = self.embedding_layer(tokens_NL) + self.positional_embedding(tokens_NL.shape[1])
        return self._run(x_NLD, tokens_NL.argmax(-1))

    def encode(self, tokens_NL: Tensor) -> Tensor:
        """The vectors alone. What follows the last end of text is left out where nothing looks ahead."""
        x_NLD = self.embedding_layer(tokens_NL) + self.positional_embedding(tokens_NL.shape[1])
        ends_N = tokens_NL.argmax(-1)
        if self.config.variant == "base" and self.config.causal and len(ends_N):
            x_NLD = x_NLD[:, : int(ends_N.max()) + 1]
        return self._run(x_NLD, ends_N).vector_BD

    def _run(self, x_NLD: Tensor, ends_N: Tensor) -> TowerOutput:
        for layer in self.transformer:
            x_NLD = layer(x_NLD, causal=self.config.causal)
        x_NLD = self.final_layer_norm(x_NLD)
        rows_N = torch.arange(len(x_NLD), device=x_NLD.device)
        return TowerOutput(x_NLD[rows_N, ends_N] @ self.projection_layer, x_NLD)


class _StemConv(nn.Module):
    """Convolution, and unless it is the `last`, BatchNorm and GELU."""

    def __init__(self, channels: int, width: int, side: int, padding: int, last: bool = False) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, width, side, side, padding, bias=last)
        self.block = nn.Sequential()
        self.block.add_module("conv", conv)
        if not last:
            self.block.add_module("norm", nn.BatchNorm2d(width))
            self.block.add_module("act", nn.GELU())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block(x_BCHW)


class _Classifier(nn.Module):
    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))


class MobileVit(nn.Module):
    """pixels_BCHW -> image_BE at the class token, not normalised.

    Positions are one row of places, resized along that row for other sizes, and the class token has none.
    """

    def __init__(self, config: MobileVitConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, stem = config.width, max(32, config.width // 4)
        self.patch_emb = nn.Sequential(
            _StemConv(3, stem, 4, 1), _StemConv(stem, stem, 2, 0), _StemConv(stem, width, 2, 0, last=True)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed = Positions(config.patches, width)
        self.transformer = nn.Sequential(
            *(PreNormBlock(width, config.heads, int(width * config.mlp_ratio)) for _ in range(config.layers))
        )
        self.post_transformer_norm = WideNorm(width)
        self.classifier = _Classifier(width, embed_dim)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BLD = self.patch_emb(pixels_BCHW).flatten(2).transpose(1, 2)
        x_BLD = x_BLD + self.pos_embed(x_BLD.shape[1])
        x_BLD = torch.cat([self.cls_token.expand(len(x_BLD), -1, -1), x_BLD], dim=1)
        x_BLD = self.post_transformer_norm(self.transformer(x_BLD))
        return x_BLD[:, 0] @ self.classifier.proj
