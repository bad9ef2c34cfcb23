"""The blocks both CLIP towers are made of, with OpenAI's parameter names.

Axis letters: B batch, L tokens, D width, H heads, K width of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moviola.clip.config import Activation


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the activation OpenAI's checkpoints were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: Activation) -> nn.Module:
    made: dict[str, Callable[[], nn.Module]] = {
        "quick_gelu": QuickGELU,
        "gelu": nn.GELU,
        "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    }
    return made[name]()


class Attention(nn.Module):
    """Multi-head self-attention whose parameters are named as in `nn.MultiheadAttention`.

    x_BLD -> x_BLD. `mask_LL` (or broadcastable to (B, H, L, L)) is True where attending is allowed.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"The width must divide by the heads, got width {width} and {heads} heads.")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BLD: Tensor, *, causal: bool = False, mask_LL: Tensor | None = None) -> Tensor:
        qkv_BLD = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q_BHLK, k_BHLK, v_BHLK = qkv_BLD.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BHLK = F.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_LL, is_causal=causal and mask_LL is None
        )
        return self.out_proj(out_BHLK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.act = activation(act)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x_BLD)))


class ResidualBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input: `transformer.resblocks.N` of CLIP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, act: Activation, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), act)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), causal=self.causal)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


Block = Callable[..., nn.Module]
"""Makes one block from (width, heads, mlp_ratio, activation, causal=...): pass another to a tower to
change every block without forking it."""


@dataclass(slots=True)
class TowerOutput:
    """What a tower computes: the projected vector, every token after the last norm, tapped layers."""

    vector_BD: Tensor
    tokens_BLD: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)


class Transformer(nn.Module):
    """A stack of blocks under `resblocks`. `taps` asks for the outputs of those layers (0-based)."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        act: Activation,
        *,
        causal: bool,
        block: Block = ResidualBlock,
    ) -> None:
        super().__init__()
        self.width = width
        self.checkpointing = False
        self.resblocks = nn.ModuleList(
            block(width, heads, mlp_ratio, act, causal=causal) for _ in range(layers)
        )

    def forward(self, x_BLD: Tensor, taps: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        layers: dict[int, Tensor] = {}
        wanted = {t % len(self.resblocks) for t in taps}
        for n, block in enumerate(self.resblocks):
            if self.checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, use_reentrant=False)
            else:
                x_BLD = block(x_BLD)
            if n in wanted:
                layers[n] = x_BLD
        return x_BLD, layers

    def init_weights(self) -> None:
        """The initial scales of the CLIP paper's release: residual branches shrink with depth."""
        proj_std = self.width**-0.5 * (2 * len(self.resblocks)) ** -0.5
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.in_proj_weight, std=self.width**-0.5)
                nn.init.normal_(module.out_proj.weight, std=proj_std)
            elif isinstance(module, Mlp):
                nn.init.normal_(module.c_fc.weight, std=(2 * self.width) ** -0.5)
                nn.init.normal_(module.c_proj.weight, std=proj_std)


def set_checkpointing(module: nn.Module, on: bool) -> None:
    """Keep only each block's input for the backward pass, in every stack of blocks below `module`.

    A third more arithmetic for a fraction of the memory; values and gradients stay the same.
    """
    part: Any
    for part in module.modules():
        if isinstance(getattr(part, "checkpointing", None), bool):
            part.checkpointing = on
