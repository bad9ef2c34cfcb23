"""Texts that occur twice in a batch are false negatives of a contrastive loss: how to tell them."""

from __future__ import annotations

import torch
from torch import Tensor


def text_numbers(tokens_NL: Tensor) -> Tensor:
    """A number per text, equal for equal texts however far they are padded with 0: (N,) int64."""
    place_L = torch.arange(1, tokens_NL.shape[1] + 1, device=tokens_NL.device)
    factor_L = place_L * 0x5851F42D4C957F2D | 1
    mixed_NL = (tokens_NL.long() + 1) * tokens_NL.long() * factor_L
    return (mixed_NL ^ (mixed_NL >> 29)).sum(-1)
