"""The made world's dice, colours and shapes.

`Dice` numbers are a hash of (seed, index, stream), so any item can be made alone, in any order, on
any machine, and comes out the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

__all__ = [
    "COLOURS",
    "FACINGS",
    "LARGEST_TURN",
    "OUTLINES",
    "SHAPES",
    "SIZES",
    "Dice",
    "Rgb",
    "jitter",
    "mix",
]

Item = TypeVar("Item")
Rgb = tuple[int, int, int]

_WORD = (1 << 64) - 1


class Dice:
    """Random numbers that depend only on (seed, index, stream); cheap for many single draws."""

    __slots__ = ("_at", "_pool", "rng")

    def __init__(self, seed: int, index: int, stream: int = 0) -> None:
        key = np.array([int(seed) & _WORD, int(index) & _WORD], dtype=np.uint64)
        counter = np.array([0, 0, 0, stream & _WORD], dtype=np.uint64)
        self.rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        self._pool: list[float] = []
        self._at = 0

    def draw(self) -> float:
        """One number in [0, 1)."""
        if self._at == len(self._pool):
            self._pool, self._at = self.rng.random(96).tolist(), 0
        self._at += 1
        return self._pool[self._at - 1]

    def below(self, count: int) -> int:
        return int(self.draw() * count)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.draw()

    def chance(self, probability: float) -> bool:
        return self.draw() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.draw() * len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different items, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


# --------------------------------------------------------------------------------------------------
# Colours and shapes
# --------------------------------------------------------------------------------------------------

COLOURS: dict[str, Rgb] = {
    "red": (214, 32, 36),
    "green": (36, 156, 58),
    "blue": (34, 76, 214),
    "yellow": (246, 218, 44),
    "orange": (246, 136, 22),
    "purple": (126, 42, 166),
    "pink": (248, 142, 186),
    "brown": (122, 76, 38),
    "black": (18, 18, 20),
    "white": (244, 244, 244),
    "gray": (132, 132, 134),
}
_NEUTRAL = ("black", "white", "gray", "brown")
_JITTER = 20  # each channel moves by up to this much: enough to vary, too little to change the name

SIZES: dict[str, tuple[float, float]] = {
    "small": (0.09, 0.125),
    "medium": (0.15, 0.20),
    "large": (0.26, 0.35),
}
"""Radius as a share of the picture's side; gaps between the ranges keep the words true."""


def _regular(corners: int, turn: float = 0.0) -> np.ndarray:
    angles = 2 * np.pi * (np.arange(corners) / corners) + turn - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    corners = _regular(2 * points)
    corners[1::2] *= inner
    return corners


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - y.mean() + 1.5], axis=1) / 18.5


def _crescent() -> np.ndarray:
    outer = np.linspace(0.30 * np.pi, 1.70 * np.pi, 36)
    inner = outer[::-1]
    edge = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    tip_x, tip_y = np.cos(0.30 * np.pi), np.sin(0.30 * np.pi)
    bite = np.stack(
        [tip_x - tip_x * 0.15 + 0.62 * np.cos(inner), tip_y * np.sin(inner) / np.sin(0.3 * np.pi)], 1
    )
    bite[:, 0] += tip_x - bite[0, 0]
    return np.concatenate([edge, bite]) + np.array([0.25, 0.0])


def _box(half_width: float, half_height: float) -> np.ndarray:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array([half_width, half_height])


_PLUS = np.array(
    [
        [-1, -3],
        [1, -3],
        [1, -1],
        [3, -1],
        [3, 1],
        [1, 1],
        [1, 3],
        [-1, 3],
        [-1, 1],
        [-3, 1],
        [-3, -1],
        [-1, -1],
    ]
) / math.hypot(1, 3)
_ARROW = np.array(  # points right
    [[1.0, 0.0], [0.1, -0.78], [0.1, -0.3], [-0.95, -0.3], [-0.95, 0.3], [0.1, 0.3], [0.1, 0.78]]
)

# name -> (outline, hole or None, largest random turn in degrees that keeps the name true)
OUTLINES: dict[str, tuple[np.ndarray, np.ndarray | None, float]] = {
    "circle": (_regular(40) * 0.9, None, 0),
    "square": (_box(0.7, 0.7), None, 14),
    "triangle": (_regular(3), None, 20),
    "star": (_star(5, 0.42), None, 180),
    "cross": (_PLUS, None, 14),
    "ring": (_regular(40) * 0.95, _regular(32) * 0.55, 0),
    "diamond": (np.array([[0, -1], [0.62, 0], [0, 1], [-0.62, 0]]), None, 12),
    "heart": (_heart(), None, 20),
    "hexagon": (_regular(6) * 0.95, None, 180),
    "arrow": (_ARROW, None, 12),
    "oval": (_regular(40) * np.array([1.0, 0.56]), None, 25),
    "crescent": (_crescent(), None, 35),
    "rectangle": (_box(0.88, 0.45), None, 14),
}
SHAPES: tuple[str, ...] = tuple(OUTLINES)
LARGEST_TURN: dict[str, float] = {name: turn for name, (_, _, turn) in OUTLINES.items()}
FACINGS: dict[str, float] = {"right": 0.0, "down": 90.0, "left": 180.0, "up": 270.0}
"""Turn of an arrow in degrees, clockwise on screen."""


def jitter(name: str, dice: Dice, spread: int = _JITTER) -> Rgb:
    """A shade of the named colour."""
    red, green, blue = COLOURS[name]
    lift = 0.0
    if name in _NEUTRAL:  # a tint would give them another name, so the channels move together
        lift, spread = dice.uniform(-spread, spread), spread // 4
    return (
        _byte(red + lift + dice.uniform(-spread, spread)),
        _byte(green + lift + dice.uniform(-spread, spread)),
        _byte(blue + lift + dice.uniform(-spread, spread)),
    )


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """`share` of the second colour, the rest of the first."""
    a, b, c = (_byte(x + (y - x) * share) for x, y in zip(first, second, strict=True))
    return a, b, c


def _byte(value: float) -> int:
    return min(255, max(0, round(value)))
