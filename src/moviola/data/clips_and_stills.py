"""Order clips and single pictures with captions, as rows of one training: a picture is a clip of one frame.

Most clips are captioned by their action alone ("moves left"), some by thing and action ("a red ring moves
left"), pictures by what is where ("a small red ring at the top left"). Four of the sixteen things are never
in a clip, only in pictures, though every colour and shape is in clips: naming them in a clip is what
pictures can teach.

Axis letters: N rows, T frames, C channels, S side in pixels, L tokens, D width, M clips, K things.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moviola.data import order_clips as world

HELD = ("red square", "green triangle", "blue cross", "yellow ring")
THINGS = tuple(f"{c} {s}" for c in world.SEEN["colours"]["train"] for s in world.SEEN["shapes"]["train"])


def clip_rows(
    seed: int, count: int, *, frames: int, named: int = 4, shuffled: bool = False
) -> dict[str, Tensor]:
    """About three quarters of `count` clips, those without a held thing; every `named`-th names its thing.

    `frames` (N, T, C, S, S), `mask` (N, T) all True, `text` (N, L).
    """
    made = world.order_clips(seed, count, frames=frames)
    kept = [row for row, thing in enumerate(made.things) if thing not in HELD]
    captions = [made.captions[row] if n % named == 0 else _action(made, row) for n, row in enumerate(kept)]
    frames_NTCSS = (made.shuffled(seed) if shuffled else made).pixels(kept)
    mask_NT = torch.ones(frames_NTCSS.shape[:2], dtype=torch.bool)
    return {"frames": frames_NTCSS, "mask": mask_NT, "text": world.tokens(captions)}


def picture_rows(seed: int, count: int, *, frames: int) -> dict[str, Tensor]:
    """`count` pictures of all things, as clips of which the first frame alone is real."""
    made = world.order_clips(seed + 1000, count, frames=frames)
    frame_N = np.random.default_rng([seed, 9]).integers(frames, size=count)
    frames_NTCSS = torch.zeros(count, frames, 3, world.SIDE, world.SIDE)
    frames_NTCSS[:, 0] = made.pixels()[torch.arange(count), torch.from_numpy(frame_N)]
    mask_NT = (torch.arange(frames) == 0).expand(count, -1)
    captions = [made.frame_caption(row, frame) for row, frame in enumerate(frame_N.tolist())]
    return {"frames": frames_NTCSS, "mask": mask_NT, "text": world.tokens(captions)}


@lru_cache(maxsize=2)
def rows(
    seed: int, clips: int, pictures: int, *, frames: int, shuffled: bool = False
) -> Mapping[str, Tensor]:
    """`clip_rows` and, where `pictures` are wanted, `picture_rows` behind them. Do not change them."""
    made = clip_rows(seed, clips, frames=frames, shuffled=shuffled)
    if not pictures:
        return made
    still = picture_rows(seed, pictures, frames=frames)
    return {name: torch.cat([made[name], still[name]]) for name in made}


def held_clips(seed: int, count: int, *, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """New clips of held things: frames_MTCSS, label_M of their actions, thing_M into `THINGS`."""
    made = world.order_clips(seed + 5000, count, frames=frames)
    rows = [row for row, thing in enumerate(made.things) if thing in HELD]
    thing_M = torch.tensor([THINGS.index(made.things[row]) for row in rows])
    return made.pixels(rows), torch.from_numpy(made.label_N[rows]), thing_M


def appearance_accuracy(
    video_MD: Tensor, label_M: Tensor, thing_M: Tensor, encode_text: Callable[[Tensor], Tensor]
) -> float:
    """In percent: how often a clip's own caption scores best among all things doing its action (chance 6.25).

    `video_MD` are unit vectors.
    """
    captions = [f"a {thing} {action}" for action in world.ACTIONS for thing in THINGS]
    text_AKD = torch.nn.functional.normalize(encode_text(world.tokens(captions)), dim=-1).unflatten(
        0, (len(world.ACTIONS), -1)
    )
    scores_MK = torch.einsum("mkd,md->mk", text_AKD[label_M], video_MD)
    return float((scores_MK.argmax(1) == thing_M).float().mean() * 100)


def _action(made: world.OrderClips, row: int) -> str:
    return made.classes[int(made.label_N[row])]
