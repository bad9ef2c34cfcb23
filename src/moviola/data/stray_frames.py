"""Order clips cut together with frames of other clips, so that captions fit a part of each clip only.

Narrated videos in small: two frames show what the caption says, the others show anything. Captions all
differ, so that each has one right clip. Seeded: equal arguments, equal clips.

Axis letters: N clips and captions, T own frames, R those with the stray ones, S side in pixels, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moviola.data import order_clips as world
from moviola.types import UsageError

OWN, STRAY = 2, 4


@dataclass(frozen=True)
class StrayClips:
    """Captions of the first own frame, tokens_NL; clips without (own_) and with (mixed_) stray frames."""

    captions: tuple[str, ...]
    tokens_NL: Tensor
    own_NTCSS: Tensor
    mixed_NRCSS: Tensor


def stray_clips(seed: int, count: int, *, stray: int = STRAY) -> StrayClips:
    """`count` clips with captions that all differ; half of the stray frames come before the own ones."""
    if count < 1 or stray < 0:
        raise UsageError(
            f"There must be one clip or more and 0 stray frames or more, got {count} and {stray}."
        )
    clips = world.order_clips(seed, 4 * count, frames=OWN)
    row_of = {clips.frame_caption(row, 0): row for row in range(len(clips))}
    rows = np.array(sorted(row_of.values())[:count])
    if len(rows) < count:
        raise UsageError(f"Among {len(clips)} clips are {len(rows)} captions, fewer than {count}.")
    rng = np.random.default_rng([seed, 5])
    other = (rows[:, None] + rng.integers(1, len(clips), (count, stray))) % len(
        clips
    )  # never the clip itself
    own_NTCSS = clips.pixels(rows)
    stray_NTCSS = clips.pixels()[
        torch.from_numpy(other), torch.from_numpy(rng.integers(OWN, size=other.shape))
    ]
    before, after = stray_NTCSS[:, : stray // 2], stray_NTCSS[:, stray // 2 :]
    captions = tuple(clips.frame_caption(row, 0) for row in rows.tolist())
    return StrayClips(captions, world.tokens(captions), own_NTCSS, torch.cat([before, own_NTCSS, after], 1))
