"""Frame features with a planted answer, as plain tensors: the cheapest world for claims about pooling.

Every video has one caption. One or two of its frames show what the caption says; each other frame shows
something else that no caption says. Captions and frames of the same meaning look different: each kind
of feature mixes the meaning with a map of its own and adds noise and an offset, as text and image
towers do.

Distractors are not drawn from other captions on purpose: each caption would then be shown by about
eleven videos of the gallery, and only counting the frames could tell which one is meant.

Axis letters: N videos and captions, T frames, D width, C meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Planted:
    """text_ND, frames_NTD raw features; planted_NT is True on the frames that match the caption."""

    text_ND: Tensor
    frames_NTD: Tensor
    planted_NT: Tensor


def planted_frames(
    seed: int,
    count: int,
    *,
    split: int = 0,
    frames: int = 12,
    dim: int = 32,
    meanings: int = 16,
    noise: float = 0.35,
) -> Planted:
    """`count` videos. Equal seeds share the two maps; different splits share no meaning, caption or frame."""
    maps = torch.Generator().manual_seed(seed)
    text_map_CD = torch.randn(meanings, dim, generator=maps) / meanings**0.5
    frame_map_CD = torch.randn(meanings, dim, generator=maps) / meanings**0.5
    offset_2D = torch.randn(2, dim, generator=maps) / 2

    dice = torch.Generator().manual_seed(seed * 1_000_003 + split + 1)

    def draw_meanings(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, meanings, generator=dice), dim=-1) * meanings**0.5

    meaning_NC = draw_meanings(count)
    first_N = torch.randint(frames, (count,), generator=dice)
    second_N = (first_N + torch.randint(1, frames, (count,), generator=dice)) % frames
    second_N = torch.where(torch.rand(count, generator=dice) < 0.5, second_N, first_N)
    planted_NT = torch.zeros(count, frames, dtype=torch.bool)
    for place_N in (first_N, second_N):
        planted_NT[torch.arange(count), place_N] = True
    shown_NTC = torch.where(planted_NT.unsqueeze(-1), meaning_NC.unsqueeze(1), draw_meanings(count, frames))

    text_ND = meaning_NC @ text_map_CD + offset_2D[0]
    frames_NTD = shown_NTC @ frame_map_CD + offset_2D[1]
    return Planted(
        text_ND + noise * torch.randn(text_ND.shape, generator=dice),
        frames_NTD + noise * torch.randn(frames_NTD.shape, generator=dice),
        planted_NT,
    )
