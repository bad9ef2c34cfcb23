"""timm's vision transformer, plain or with normalised queries and keys, on the house's own image tower.

What differs from OpenAI's ViT: all norms add 1e-6, the activation is the exact GELU, the patch convolution
has a bias, no norm comes before the first block and, in `TimmBlock`, every head's queries and keys pass a
LayerNorm. Parameter names stay the house's; `timm_rules` maps timm's.

Axis letters: B batch, L tokens, D width, H heads, K width of one head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Attention, ResidualBlock
from moviola.clip.config import Activation, ClipConfig, TextConfig, VitConfig
from moviola.clip.keys import Keys, Rule
from moviola.clip.vit import VisionTransformer
from moviola.clip.weights import strip_prefix
from moviola.types import CheckpointError

EPSILON = 1e-6
_TABLES = ("pos_embed", "temporal_embed")


class HeadNormAttention(Attention):
    """Attention with one LayerNorm for the queries of all heads and one for their keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.q_norm = nn.LayerNorm(width // heads, eps=EPSILON)
        self.k_norm = nn.LayerNorm(width // heads, eps=EPSILON)

    def forward(self, x_BLD: Tensor, *, causal: bool = False, mask_LL: Tensor | None = None) -> Tensor:
        qkv_BLD = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q_BHLK, k_BHLK, v_BHLK = qkv_BLD.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BHLK = F.scaled_dot_product_attention(
            self.q_norm(q_BHLK),
            self.k_norm(k_BHLK),
            v_BHLK,
            attn_mask=mask_LL,
            is_causal=causal and mask_LL is None,
        )
        return self.out_proj(out_BHLK.transpose(1, 2).flatten(2))


class PlainBlock(ResidualBlock):
    """timm's block without norms of queries and keys. The tower's activation does not matter: always GELU."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, act: Activation, *, causal: bool) -> None:
        super().__init__(width, heads, mlp_ratio, "gelu", causal=causal)
        self.ln_1.eps = self.ln_2.eps = EPSILON


class TimmBlock(PlainBlock):
    """Give it, or `PlainBlock`, to a tower as `block=`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, act: Activation, *, causal: bool) -> None:
        super().__init__(width, heads, mlp_ratio, act, causal=causal)
        self.attn = HeadNormAttention(width, heads)


def as_timm(tower: VisionTransformer) -> None:
    """Change a new tower of these blocks, in place, where timm's differs outside the blocks."""
    plain = tower.conv1
    tower.conv1 = nn.Conv2d(plain.in_channels, plain.out_channels, patch_of(plain), stride=patch_of(plain))
    tower.ln_pre = cast(nn.LayerNorm, nn.Identity())
    tower.ln_post.eps = EPSILON
    nn.init.trunc_normal_(tower.positional_embedding, std=0.02)
    nn.init.normal_(tower.class_embedding, std=1e-6)


def patch_of(convolution: nn.Conv2d) -> int:
    return convolution.kernel_size[0]


def timm_rules(prefix: str) -> tuple[Rule, ...]:
    """timm's names of the tower's parts, for a `TimmKeys` table."""
    ours, theirs = prefix + "transformer.resblocks.{n}.", prefix + "blocks.{n}."
    names = {
        ours + "attn.in_proj_weight": theirs + "attn.qkv.weight",
        ours + "attn.in_proj_bias": theirs + "attn.qkv.bias",
        ours + "attn.out_proj.{rest}": theirs + "attn.proj.{rest}",
        ours + "attn.q_norm.{rest}": theirs + "attn.q_norm.{rest}",
        ours + "attn.k_norm.{rest}": theirs + "attn.k_norm.{rest}",
        ours + "ln_1.{rest}": theirs + "norm1.{rest}",
        ours + "ln_2.{rest}": theirs + "norm2.{rest}",
        ours + "mlp.c_fc.{rest}": theirs + "mlp.fc1.{rest}",
        ours + "mlp.c_proj.{rest}": theirs + "mlp.fc2.{rest}",
        prefix + "conv1.{rest}": prefix + "patch_embed.proj.{rest}",
        prefix + "class_embedding": prefix + "cls_token",
        prefix + "positional_embedding": prefix + "pos_embed",
        prefix + "ln_post.{rest}": prefix + "norm.{rest}",
    }
    return tuple(Rule(house, timm) for house, timm in names.items())


class TimmKeys(Keys):
    """A table that knows timm's axes of length one: `cls_token` (1, 1, D), `pos_embed` (1, L, D) and, where
    videos are read, `temporal_embed` (1, T, D)."""

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().from_official(
            {k: t.flatten(0, -2)[0] if _last(k) == "cls_token" else _first(k, t) for k, t in state.items()}
        )

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        axes = {"cls_token": (None, None)} | dict.fromkeys(_TABLES, (None,))
        return {k: t[axes.get(_last(k), ())] for k, t in super().to_official(state).items()}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _first(name: str, tensor: Tensor) -> Tensor:
    return tensor[0] if _last(name) in _TABLES else tensor


def join_parts(checkpoint: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Tensor]:
    """A checkpoint in several state dicts as one: the dict at each place with that prefix before its names.

    A checkpoint without the first place is taken to be joined already. Prefixes of DDP are dropped.
    """
    if next(iter(places.values())) not in checkpoint:
        return dict(checkpoint)
    missing = [place for place in places.values() if place not in checkpoint]
    if missing:
        raise CheckpointError(f"The checkpoint has no {missing[0]}, only {', '.join(checkpoint)}.")
    parts = {prefix: strip_prefix(dict(checkpoint[place]), "module.") for prefix, place in places.items()}
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def split_parts(state: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `join_parts`."""
    return {
        place: {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        for prefix, place in places.items()
    }


class Shapes:
    """Sizes read off a checkpoint's tensors; a name that is not there is a `CheckpointError`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.state:
            raise CheckpointError(
                f"The checkpoint has no {name} among its {len(self.state)} tensors.",
                hint="Is it a checkpoint of another model, or one part of a checkpoint in two?",
            )
        return tuple(self.state[name].shape)

    def count(self, template: str) -> int:
        """How many names fit a template with `{n}` for a number."""
        pattern = re.compile(re.escape(template).replace(r"\{n\}", r"\d+"))
        return sum(pattern.fullmatch(name) is not None for name in self.state)

    def timm_vit(self, prefix: str, head_width: int = 64) -> VitConfig:
        """timm's ViT for a square picture."""
        width, *_, patch = self(prefix + "patch_embed.proj.weight")
        patches = self(prefix + "pos_embed")[1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise CheckpointError(
                f"{patches} patches make no square picture.", hint="Give the configuration."
            )
        return VitConfig(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            layers=self.count(prefix + "blocks.{n}.norm1.weight"),
            heads=max(1, width // head_width),
            mlp_ratio=self(prefix + "blocks.0.mlp.fc1.weight")[0] / width,
        )

    def timm_clip(self, prefix: str) -> ClipConfig:
        """OpenAI's text tower (64 channels a head) and, under `visual`, timm's ViT for a square picture."""
        head_width = self(prefix + "visual.blocks.0.attn.q_norm.weight")[0]
        vision = self.timm_vit(prefix + "visual.", head_width)
        text_width, embed_dim = self(prefix + "text_projection")
        text = TextConfig(
            context_length=self(prefix + "positional_embedding")[0],
            vocab_size=self(prefix + "token_embedding.weight")[0],
            width=text_width,
            layers=self.count(prefix + "transformer.resblocks.{n}.ln_1.weight"),
            heads=max(1, text_width // 64),
        )
        return ClipConfig(embed_dim, vision, text)
