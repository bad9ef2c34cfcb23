"""Many texts that begin alike, through CLIP's text tower: what they share is computed once.

In a causal tower no token sees those after it. The prompts "[start] v1 v2 v3 v4 cat ." and "... dog ." have
the same first five positions in every layer, whatever the class; and what follows a text's end token cannot
change its vector. So each beginning runs once, and every text runs only over its own few tokens, which attend
to the beginning's keys and values. Exact, for values and gradients: with five shared tokens and a class name
of one word about a third of the arithmetic of whole texts, a twentieth of that of texts padded to 77.

Axis letters: B beginnings, C texts, P tokens of a beginning, S tokens of a text's rest, L tokens of a text,
D width, E embedding width, H heads, K width of one head.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moviola.clip.blocks import Attention, ResidualBlock
from moviola.clip.model import TextTower, length_groups
from moviola.parts.prompting import text_positions
from moviola.types import Refusal

MOST_TEXTS = 2048
"""Texts (beginnings times rests) that run through the tower at a time."""


def encode_with_beginnings(
    tower: TextTower, start_BPD: Tensor, tokens_CL: Tensor, *, most: int = MOST_TEXTS
) -> Tensor:
    """The vector of every text behind every beginning: text_BCE, not normalised.

    start_BPD   embeddings of the first P positions, the start token among them, without positions
    tokens_CL   whole texts as ids; their first P ids are not looked at
    most        more texts than that run in parts; with gradients each part keeps only its inputs, and runs
                again in the backward pass, so that memory stays bounded

    Raises `Refusal` for a tower whose blocks are not CLIP's own.
    """
    if not all(type(block) is ResidualBlock for block in tower.transformer.resblocks):
        raise Refusal("The text tower's blocks are not CLIP's own, so its prompts cannot be learned.")
    ends_C = tower.eot_positions(tokens_CL)
    room = max(1, most // len(start_BPD))
    parts = [
        torch.tensor(group[first : first + room], device=tokens_CL.device)
        for group in length_groups((ends_C + 1).tolist())
        for first in range(0, len(group), room)
    ]
    run = partial(_encode, tower)
    if torch.is_grad_enabled() and len(parts) > 1 and len(start_BPD) * len(tokens_CL) > most:
        run = partial(checkpoint, run, use_reentrant=False)
    made = [run(start_BPD, tokens_CL[rows], ends_C[rows]) for rows in parts]
    return made[0] if len(made) == 1 else torch.cat(made, 1)[:, torch.cat(parts).argsort()]


def _encode(tower: TextTower, start_BPD: Tensor, tokens_CL: Tensor, ends_C: Tensor) -> Tensor:
    first, last = start_BPD.shape[1], int(ends_C.max()) + 1
    position_LD = text_positions(tower, last)
    start_BPD = start_BPD + position_LD[:first].to(start_BPD.dtype)
    rest_CSD = tower.token_embedding(tokens_CL[:, first:last]) + position_LD[first:]
    rest_BCSD = rest_CSD[None]  # alike behind every beginning until it has attended to one
    for block in tower.transformer.resblocks:
        start_BPD, rest_BCSD = _block(block, start_BPD, rest_BCSD)
    texts_C = torch.arange(len(tokens_CL), device=tokens_CL.device)
    ends_BCD = rest_BCSD[:, texts_C, ends_C - first]
    return tower.ln_final(ends_BCD) @ tower.text_projection


def _block(block: nn.Module, start_BPD: Tensor, rest_BCSD: Tensor) -> tuple[Tensor, Tensor]:
    """One residual block over the beginnings and, behind each, over every rest."""
    assert isinstance(block, ResidualBlock)
    q_BHPK, k_BHPK, v_BHPK = _heads(block.attn, block.ln_1(start_BPD))
    q_BCHSK, k_BCHSK, v_BCHSK = _heads(block.attn, block.ln_1(rest_BCSD))
    count, (texts, heads, own, width), shared = len(start_BPD), q_BCHSK.shape[1:], k_BHPK.shape[2]

    def behind(start_BHPK: Tensor, rest_BCHSK: Tensor) -> Tensor:
        """What each token may attend to: the beginning's tokens, then the text's own: (BC, H, P + S, K)."""
        start = start_BHPK[:, None].expand(count, texts, heads, shared, width)
        return torch.cat([start, rest_BCHSK.expand(count, texts, heads, own, width)], 3).flatten(0, 1)

    seen_SL = torch.ones(own, shared + own, dtype=torch.bool, device=q_BHPK.device).tril(shared)
    heads_NHSK = F.scaled_dot_product_attention(
        q_BCHSK.expand(count, texts, heads, own, width).flatten(0, 1),
        behind(k_BHPK, k_BCHSK),
        behind(v_BHPK, v_BCHSK),
        attn_mask=seen_SL,
    )
    heads_BCSD = heads_NHSK.transpose(1, 2).flatten(2).unflatten(0, (count, texts))
    heads_BHPK = F.scaled_dot_product_attention(q_BHPK, k_BHPK, v_BHPK, is_causal=True)
    start_BPD = start_BPD + block.attn.out_proj(heads_BHPK.transpose(1, 2).flatten(2))
    rest_BCSD = rest_BCSD + block.attn.out_proj(heads_BCSD)
    return start_BPD + block.mlp(block.ln_2(start_BPD)), rest_BCSD + block.mlp(block.ln_2(rest_BCSD))


def _heads(attention: Attention, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, (..., H, L, K) each."""
    qkv = F.linear(x_BLD, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.heads, -1)).movedim(-3, 0).transpose(-2, -3)
    return q, k, v
