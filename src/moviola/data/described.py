"""Described scenes: a large thing with a small badge on it and a small thing beside it, and their boxes.

Captions speak of the large thing and the ground; one in four names the badge too. Each of the three
things has a box (the square around its circle) and a short description ("a yellow ring"). The badge is
the fine attribute: things of one look differ in it alone. Some combinations of a large thing's colour
with a badge are kept out of training pictures (`unseen`), although their words and looks all occur there.

Made in bulk and seeded: equal arguments give equal pictures.

Axis letters: N pictures, S side in pixels, M = 3 things (large, badge, beside), L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

from moviola.data import world_shapes
from moviola.data.word_tokens import word_tokens
from moviola.data.world_shapes import LARGEST_TURN, OUTLINES
from moviola.types import UsageError

COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle")
BADGES = ("ring", "cross", "square")
GROUNDS: dict[str, tuple[int, int, int]] = {
    "sand": (212, 188, 144),
    "moss": (98, 118, 76),
    "slate": (92, 100, 112),
    "clay": (150, 92, 78),
}
SIDE, CONTEXT_LENGTH = 24, 12
_ALL_SHAPES = tuple(dict.fromkeys(SHAPES + BADGES))
_RADII = ((0.36, 0.42), (0.17, 0.20), (0.13, 0.16))  # shares of the side
_CAPTIONS = (
    "a {large} on {ground}",
    "picture of a {large} on {ground}",
    "a {large} seen on {ground}",
    "{ground} under a {large}",
)
_WITH_BADGE = "a {large} with a {badge} on {ground}"
_NAMED = 0.25


@dataclass(frozen=True)
class Described:
    """pixels_NSS3 uint8; colour_NM and shape_NM numbers; boxes_NM4 xyxy pixels; captions and descriptions."""

    pixels_NSS3: np.ndarray
    colour_NM: np.ndarray
    shape_NM: np.ndarray
    boxes_NM4: np.ndarray
    captions: tuple[str, ...]
    regions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def unseen_N(self) -> np.ndarray:
        return unseen(self.colour_NM[:, 0], self.colour_NM[:, 1], self.shape_NM[:, 1])


def badges() -> tuple[str, ...]:
    """Every badge by name: the fine classes."""
    return tuple(f"{colour} {shape}" for colour in COLOURS for shape in BADGES)


def badge_class(made: Described) -> np.ndarray:
    """Which of `badges()` each picture shows."""
    shape_N = np.array([BADGES.index(_ALL_SHAPES[s]) for s in made.shape_NM[:, 1]])
    return made.colour_NM[:, 1] * len(BADGES) + shape_N


def unseen(large_N: np.ndarray, badge_N: np.ndarray, shape_N: np.ndarray) -> np.ndarray:
    """The combinations of the large thing's colour and the badge that no training picture shows."""
    return (large_N + 2 * badge_N + shape_N) % 5 == 0


def described(seed: int, count: int, *, split: int = 0) -> Described:
    """`count` scenes. Split 0 is for training and shows no unseen combination, split 1 shows all."""
    if count < 1:
        raise UsageError(f"Described scenes need a count of at least 1, got {count}.")
    rng = np.random.default_rng([seed, split])
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < count:
        colour_NM = rng.integers(len(COLOURS), size=(2 * count, 3))
        shape_NM = np.stack(
            [rng.integers(len(kinds), size=2 * count) for kinds in (SHAPES, BADGES, BADGES)], 1
        )
        for column, kinds in enumerate((SHAPES, BADGES, BADGES)):
            shape_NM[:, column] = np.array([_ALL_SHAPES.index(kind) for kind in kinds])[shape_NM[:, column]]
        fits_N = colour_NM[:, 0] != colour_NM[:, 1]  # a badge must show
        if split == 0:
            fits_N &= ~unseen(colour_NM[:, 0], colour_NM[:, 1], shape_NM[:, 1])
        kept.append(np.concatenate([colour_NM, shape_NM], 1)[fits_N])
    looks = np.concatenate(kept)[:count]
    colour_NM, shape_NM = looks[:, :3], looks[:, 3:]
    ground_N = rng.integers(len(GROUNDS), size=count)
    sentence_N, named_N = rng.integers(len(_CAPTIONS), size=count), rng.random(count) < _NAMED
    names = [
        tuple(f"{COLOURS[c]} {_ALL_SHAPES[s]}" for c, s in zip(cs, ss, strict=True))
        for cs, ss in zip(colour_NM.tolist(), shape_NM.tolist(), strict=True)
    ]
    captions = tuple(
        (_WITH_BADGE if named else _CAPTIONS[sentence]).format(
            large=things[0], badge=things[1], ground=tuple(GROUNDS)[ground]
        )
        for things, sentence, named, ground in zip(names, sentence_N, named_N, ground_N, strict=True)
    )
    regions = tuple(tuple(f"a {name}" for name in things) for things in names)
    pixels_NSS3, boxes_NM4 = _draw(rng, colour_NM, shape_NM, ground_N)
    return Described(pixels_NSS3, colour_NM, shape_NM, boxes_NM4, captions, regions)


def pixels(made: Described) -> torch.Tensor:
    """As an image tower takes them: (N, 3, S, S) float32 from -1 to 1."""
    return torch.from_numpy(made.pixels_NSS3).permute(0, 3, 1, 2) / 127.5 - 1


def batch(made: Described) -> dict[str, torch.Tensor]:
    """All scenes as the batch of an objective that needs pictures, captions and regions."""
    texts = tokens([text for texts in made.regions for text in texts])
    return {
        "image": pixels(made),
        "text": tokens(made.captions),
        "boxes": torch.from_numpy(made.boxes_NM4),
        "region_text": texts.unflatten(0, (len(made), -1)),
        "region_mask": torch.ones(len(made), made.boxes_NM4.shape[1], dtype=torch.bool),
    }


def questions(made: Described) -> dict[str, torch.Tensor]:
    """Which badge does each picture show? The large thing is given: "a red circle with a blue ring".

    `text` (U, L) holds the different sentences, `choices` (N, C) each picture's, one per badge that shows
    on its large thing, `badge` (N,) the right one, and `unseen` (N,) bool.
    """
    every = badges()
    shows_N = badge_class(made)
    numbers: dict[str, int] = {}
    choices, right = [], []
    for things, shown, large in zip(
        made.regions, shows_N.tolist(), made.colour_NM[:, 0].tolist(), strict=True
    ):
        fits = [n for n in range(len(every)) if n // len(BADGES) != large]
        told = [f"{things[0]} with a {every[n]}" for n in fits]
        choices.append([numbers.setdefault(text, len(numbers)) for text in told])
        right.append(fits.index(shown))
    return {
        "image": pixels(made),
        "text": tokens(list(numbers)),
        "choices": torch.tensor(choices),
        "badge": torch.tensor(right),
        "unseen": torch.from_numpy(made.unseen_N),
    }


def answers(image_NE: torch.Tensor, text_UE: torch.Tensor, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which `questions` are answered right by the choice with the largest cosine: (N,) bool."""
    image_NE, text_UE = F.normalize(image_NE, dim=-1), F.normalize(text_UE, dim=-1)
    cosines_NC = torch.einsum("ne,nce->nc", image_NE, text_UE[asked["choices"]])
    return cosines_NC.argmax(1) == asked["badge"]


@lru_cache(maxsize=1)
def _numbers() -> dict[str, int]:
    text = " ".join((*_CAPTIONS, _WITH_BADGE, "a")).replace("{large}", "")
    text = text.replace("{badge}", "").replace("{ground}", "")
    words = sorted({*text.replace(".", "").split(), *COLOURS, *_ALL_SHAPES, *GROUNDS})
    return {word: number for number, word in enumerate(words, start=1)}


def vocabulary_size() -> int:
    """Tokens there are: 0 fills up, the largest ends a text."""
    return len(_numbers()) + 2


def tokens(texts: Sequence[str]) -> torch.Tensor:
    """tokens_NL int64 for texts of this world; raises `UsageError` for a word it does not know."""
    made_NL = word_tokens(
        [text.replace(".", " ") for text in texts],
        _numbers(),
        CONTEXT_LENGTH,
        world="The described scenes have",
    )
    return torch.from_numpy(made_NL)


_MASK_SIDE, _REACH = 96, 1.2


@lru_cache(maxsize=1)
def _masks() -> np.ndarray:
    """How much of each place a shape covers, (shapes, side, side), from -_REACH to _REACH radii."""
    made = []
    for name in _ALL_SHAPES:
        outline, hole, _ = OUTLINES[name]
        image = Image.new("L", (_MASK_SIDE, _MASK_SIDE))
        pen = ImageDraw.Draw(image)
        for points, fill in ((outline, 255), (hole, 0)):
            if points is not None:
                places = (points / _REACH + 1) * (_MASK_SIDE / 2)
                pen.polygon([(float(x), float(y)) for x, y in places], fill=fill)
        made.append(np.asarray(image.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255)
    return np.stack(made)


def _draw(
    rng: np.random.Generator, colour_NM: np.ndarray, shape_NM: np.ndarray, ground_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    count = len(colour_NM)
    table = np.array(list(GROUNDS.values()), np.float32)
    canvas = np.repeat(np.repeat(table[ground_N][:, None, None], SIDE, 1), SIDE, 2)
    canvas += rng.uniform(-12, 12, (count, 1, 1, 3)).astype(np.float32)
    canvas += 8 * rng.standard_normal(canvas.shape, np.float32)
    shades = np.array([world_shapes.COLOURS[name] for name in COLOURS], np.float32)
    # the large thing stands left or right, up or down of the middle; the third in the far corner
    side_N2 = rng.choice((-1.0, 1.0), (count, 2))
    large_N2 = 0.5 + side_N2 * 0.08 + rng.uniform(-0.04, 0.04, (count, 2))
    places_NM2 = np.stack(
        [
            large_N2,
            large_N2 + rng.uniform(-0.04, 0.04, (count, 2)),
            0.5 - side_N2 * rng.uniform(0.34, 0.37, (count, 2)),
        ],
        1,
    )
    boxes_NM4 = np.empty((count, 3, 4), np.float32)
    at_S = np.arange(SIDE) + 0.5
    for m, radii in enumerate(_RADII):
        radius_N = rng.uniform(*radii, count) * SIDE
        centre_N2 = places_NM2[:, m] * SIDE
        turn_N = np.array([LARGEST_TURN[name] for name in _ALL_SHAPES])[shape_NM[:, m]]
        angle_N = np.deg2rad(turn_N * rng.uniform(-1, 1, count))[:, None, None]
        x_NSS = np.broadcast_to(
            ((at_S - centre_N2[:, :1]) / radius_N[:, None])[:, None, :], (count, SIDE, SIDE)
        )
        y_NSS = np.broadcast_to(
            ((at_S - centre_N2[:, 1:]) / radius_N[:, None])[:, :, None], (count, SIDE, SIDE)
        )
        u_NSS = np.cos(angle_N) * x_NSS + np.sin(angle_N) * y_NSS
        v_NSS = np.cos(angle_N) * y_NSS - np.sin(angle_N) * x_NSS
        u_NSS, v_NSS = (
            np.clip((p / _REACH + 1) * (_MASK_SIDE / 2), 0, _MASK_SIDE - 1).astype(np.intp)
            for p in (u_NSS, v_NSS)
        )
        cover_NSS1 = _masks()[shape_NM[:, m, None, None], v_NSS, u_NSS][..., None]
        shade_N3 = shades[colour_NM[:, m]] + rng.uniform(-20, 20, (count, 3)).astype(np.float32)
        canvas += cover_NSS1 * (shade_N3[:, None, None] - canvas)
        boxes_NM4[:, m] = np.concatenate([centre_N2 - radius_N[:, None], centre_N2 + radius_N[:, None]], 1)
    canvas += 5 * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), np.clip(boxes_NM4, 0, SIDE)
