"""Clips of four things, about one in each quarter of the frame, of which one moves: which and where to.

Things that rest do so anywhere along such a path, so a single frame tells no action; frames whose order is
lost tell the place and the axis, but not which way along it. Test clips have colours, shapes and speeds that
no training clip has. Made in bulk and seeded: equal arguments, equal clips.

Axis letters: N clips, T frames, S side in pixels, C colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from moviola.data.order_clips import SEEN, Split
from moviola.data.world_shapes import COLOURS, OUTLINES

PLACES = ("top left", "top right", "bottom left", "bottom right")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ACTIONS = tuple(f"{place} moves {way}" for place in PLACES for way in WAYS)
"""Number 4 * place + way."""
SIDE, FRAMES = 40, 8
_PATH: dict[Split, tuple[tuple[float, float], ...]] = {
    "train": ((0.28, 0.31), (0.41, 0.44)),  # slow and fast: how far in the clip, as shares of the side
    "test": ((0.35, 0.37),),
}
_DRAWN_AT = 3


@dataclass(frozen=True)
class PlacedClips:
    """frames_NTSSC uint8 RGB; label_N into `ACTIONS`."""

    frames_NTSSC: np.ndarray
    label_N: np.ndarray

    def __len__(self) -> int:
        return len(self.label_N)

    def pixels(self) -> Tensor:
        """frames_NTCSS, float32 from 0 to 255."""
        return torch.from_numpy(self.frames_NTSSC).permute(0, 1, 4, 2, 3).float()

    def shuffled(self, seed: int) -> PlacedClips:
        """The same clips, the frames of each in a drawn order."""
        rng = np.random.default_rng([seed, 7])
        count, frames = self.frames_NTSSC.shape[:2]
        order_NT = rng.permuted(np.tile(np.arange(frames), (count, 1)), axis=1)
        return PlacedClips(self.frames_NTSSC[np.arange(count)[:, None], order_NT], self.label_N)


@lru_cache(maxsize=4)
def placed_clips(seed: int, count: int, *, split: Split = "train", frames: int = FRAMES) -> PlacedClips:
    """`count` clips, every action as often. Several calls share them: take a copy before you change one."""
    rng = np.random.default_rng([seed, int(split == "test"), 43])
    label_N = rng.permutation(np.resize(np.arange(len(ACTIONS)), count))
    made = [_clip(rng, label, split, frames) for label in label_N.tolist()]
    return PlacedClips(np.stack(made), label_N)


def _clip(rng: np.random.Generator, label: int, split: Split, frames: int) -> np.ndarray:
    place, way = divmod(label, len(WAYS))
    ground = rng.uniform(105, 150) + rng.uniform(-12, 12, 3)
    things = [_Thing(rng, quarter, split) for quarter in range(len(PLACES))]
    made = np.empty((frames, SIDE, SIDE, 3))
    for frame, gone in enumerate(np.linspace(-0.5, 0.5, frames)):
        large = Image.new("RGB", (SIDE * _DRAWN_AT,) * 2, _tuple(ground))
        for quarter, thing in enumerate(things):
            moves = quarter == place
            thing.draw(large, way if moves else thing.way, gone if moves else thing.rests, ground)
        made[frame] = np.asarray(large.resize((SIDE, SIDE), Image.Resampling.BOX))
    made += rng.normal(0, 2, made.shape)
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


class _Thing:
    """What one quarter shows; `way` and `rests` say where on a path it stays if it does not move."""

    def __init__(self, rng: np.random.Generator, quarter: int, split: Split) -> None:
        shape, colour = (str(rng.choice(SEEN[kind][split])) for kind in ("shapes", "colours"))
        self.outlines = OUTLINES[shape][:2]
        self.colour = np.clip(np.array(COLOURS[colour]) + rng.uniform(-20, 20, 3), 0, 255)
        self.centre = np.array([quarter % 2, quarter // 2]) / 2 + rng.uniform(0.22, 0.28, 2)
        self.length = rng.uniform(*_PATH[split][rng.integers(len(_PATH[split]))])
        self.radius, turn = rng.uniform(0.09, 0.13), rng.uniform(-0.4, 0.4)
        self.turn_22 = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        self.way, self.rests = int(rng.integers(len(WAYS))), rng.uniform(-0.5, 0.5)

    def draw(self, onto: Image.Image, way: int, gone: float, ground: np.ndarray) -> None:
        centre = self.centre + gone * self.length * np.array(tuple(WAYS.values())[way])
        for points, fill in zip(self.outlines, (self.colour, ground)):
            if points is not None:
                at = (points @ self.turn_22.T * self.radius + centre) * onto.width
                ImageDraw.Draw(onto).polygon([(float(x), float(y)) for x, y in at], fill=_tuple(fill))


def _tuple(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(c) for c in np.rint(colour))
