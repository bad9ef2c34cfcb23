"""A DETR-like decoder: learned queries read a picture's (or video's) tokens and look at each other.

`Decoder` is the stack of layers, `RegionDecoder` puts boxes and vectors on it, `tokens_only` makes an
image tower ready to feed it.

Parameter names are DETR's (`self_attn`, `multihead_attn`, `linear1`, `norm1` ...). Norms come before
each part (pre-norm); the queries' positions are added anew in every layer, the memory has none.

Axis letters: B batch, N layers, Q queries, R = Q - 1 region queries, L memory tokens, D width, E
embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moviola.clip.resnet import ModifiedResNet
from moviola.clip.vit import VisionTransformer
from moviola.types import UsageError


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, and a ReLU MLP, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BQD: Tensor, memory_BLD: Tensor, places_QD: Tensor) -> Tensor:
        normed_BQD = self.norm1(x_BQD)
        placed_BQD = normed_BQD + places_QD
        seen_BQD, _ = self.self_attn(placed_BQD, placed_BQD, normed_BQD, need_weights=False)
        x_BQD = x_BQD + self.dropout(seen_BQD)
        placed_BQD = self.norm2(x_BQD) + places_QD
        seen_BQD, _ = self.multihead_attn(placed_BQD, memory_BLD, memory_BLD, need_weights=False)
        x_BQD = x_BQD + self.dropout(seen_BQD)
        hidden_BQH = self.dropout(torch.relu(self.linear1(self.norm3(x_BQD))))
        return x_BQD + self.dropout(self.linear2(hidden_BQH))


class Decoder(nn.Module):
    """Layers and one norm: memory_BLD, places_QD -> states_NBQD, every layer's output after the norm.

    Queries start as zeros; `places_QD` tells them apart.
    """

    def __init__(self, width: int, layers: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        if layers < 1 or heads < 1 or width % heads:
            raise UsageError(
                f"A decoder needs a layer or more and a width that divides by its heads, got {layers} "
                f"layers, width {width} and {heads} heads."
            )
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, memory_BLD: Tensor, places_QD: Tensor) -> Tensor:
        x_BQD = memory_BLD.new_zeros(len(memory_BLD), *places_QD.shape)
        states = []
        for layer in self.layers:
            x_BQD = layer(x_BQD, memory_BLD, places_QD)
            states.append(self.norm(x_BQD))
        return torch.stack(states)


class Perceptron(nn.Module):
    """Linear layers of these widths (first: input, last: output) with ReLU between, under `layers`."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if n else x)
        return x


class Decoded(NamedTuple):
    """Boxes as cxcywh shares of the picture, and vectors that are not normalised."""

    boxes_BR4: Tensor
    regions_BRE: Tensor
    image_BE: Tensor


class RegionDecoder(nn.Module):
    """tokens_BLD -> boxes and vectors of R regions, and the picture's vector from one more, last query.

    The memory has no positions of its own: the tokens must carry where they come from.
    """

    def __init__(
        self,
        token_width: int,
        embed_dim: int,
        *,
        regions: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if regions < 1:
            raise UsageError(f"A region decoder needs at least one region query, got {regions}.")
        self.project = nn.Linear(token_width, width, bias=False)
        self.memory_norm = nn.LayerNorm(width)
        self.queries = nn.Embedding(regions + 1, width)
        self.stack = Decoder(width, layers, heads, hidden, dropout)
        self.box_head = Perceptron((width, width, width, 4))
        self.region_proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.image_proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def states(self, tokens_BLD: Tensor) -> Tensor:
        """Every layer's queries after the norm, first layer first: (N, B, Q, D)."""
        return self.stack(self.memory_norm(self.project(tokens_BLD)), self.queries.weight)

    def boxes(self, states_BQD: Tensor) -> Tensor:
        """cxcywh shares (..., R, 4) from queries of any layer."""
        return self.box_head(states_BQD[..., :-1, :]).sigmoid()

    def forward(self, tokens_BLD: Tensor) -> Decoded:
        last_BQD = self.states(tokens_BLD)[-1]
        regions_BRE, image_BE = last_BQD[:, :-1] @ self.region_proj, last_BQD[:, -1] @ self.image_proj
        return Decoded(self.boxes(last_BQD), regions_BRE, image_BE)


def tokens_only(tower: VisionTransformer | ModifiedResNet) -> int:
    """The width of a tower's tokens; what only makes the tower's own vector is kept from training."""
    if isinstance(tower, VisionTransformer):
        tower.proj.requires_grad_(False)
        return tower.config.width
    pool = tower.attnpool
    for part in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        part.requires_grad_(False)
    return pool.positional_embedding.shape[1]
