"""Made pictures with captions in several made languages, consistent word for word.

A picture shows two small things, each a colour and a shape, in two of its corners, on a ground. A
caption names both and the ground. The first language is English; each other one has a word of its own
for every English word (a seeded map that never changes), its own order of words, and a fifth of its
words borrowed from English unchanged.

Axis letters: N pictures, B rows of a batch, C channels, S, H, W sides in pixels, T the two things, K
languages, L tokens, M sides of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from moviola.data import world_shapes
from moviola.data.hashing import hash_uint64
from moviola.data.long_tail import pixels
from moviola.data.word_tokens import word_tokens
from moviola.data.world_shapes import OUTLINES
from moviola.training.augment import random_resized_crop
from moviola.types import Needs, PictureField, UsageError

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
THINGS: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
GROUNDS: dict[str, tuple[int, int, int]] = {
    "gravel": (134, 130, 126),
    "sand": (212, 188, 144),
    "brick": (150, 92, 78),
    "moss": (98, 118, 76),
    "water": (96, 132, 150),
    "snow": (228, 232, 236),
}
SIDE, CONTEXT_LENGTH = 32, 16

_ORDERS = (  # colour, shape and ground; one order a language, English first
    "a {c0} {s0} and a {c1} {s1} on {g}",
    "a {s0} {c0} and a {s1} {c1} on {g}",
    "on {g} a {c0} {s0} and a {c1} {s1}",
    "{s0} {c0} and {s1} {c1} {g} on",
)
LANGUAGES = ("en", "la", "lb", "lc")
_WORDS = ("a", "and", "on", *COLOURS, *SHAPES, *GROUNDS)
_BORROWED = 0.2
_PLACES = ((0.27, 0.27), (0.27, 0.73), (0.73, 0.27), (0.73, 0.73))
_MASK_SIDE, _MASK_REACH, _RADII, _CHUNK = 96, 1.2, (0.15, 0.2), 2048


@dataclass(frozen=True)
class TwoThings:
    """pixels_NSS3 uint8, the things as numbers of `THINGS`, and the ground as a number of `GROUNDS`."""

    pixels_NSS3: np.ndarray
    thing_NT: np.ndarray
    ground_N: np.ndarray

    def __len__(self) -> int:
        return len(self.ground_N)


def two_things(seed: int, count: int, *, split: int = 0, distinct: bool = False) -> TwoThings:
    """`count` pictures; with `distinct` no two of them show the same things on the same ground."""
    rng = np.random.default_rng([seed, split])
    pairs = len(THINGS) * (len(THINGS) - 1) // 2
    if count < 1 or (distinct and count > pairs * len(GROUNDS)):
        raise UsageError(f"There are 1 to {pairs * len(GROUNDS)} distinct pictures, got {count}.")
    number_N = rng.choice(pairs * len(GROUNDS), count, replace=not distinct)
    first, second = np.triu_indices(len(THINGS), 1)
    pair_N, ground_N = np.divmod(number_N, len(GROUNDS))
    thing_NT = np.stack([first[pair_N], second[pair_N]], 1)
    swapped_N = rng.random(count) < 0.5
    thing_NT[swapped_N] = thing_NT[swapped_N, ::-1]
    parts = [slice(start, start + _CHUNK) for start in range(0, count, _CHUNK)]
    made = [_pictures(rng, thing_NT[part], ground_N[part]) for part in parts]
    return TwoThings(np.concatenate(made), thing_NT, ground_N)


def captions(scenes: TwoThings, language: str) -> list[str]:
    """What each picture shows, in one of `LANGUAGES`."""
    words, order = _dictionary(language), _ORDERS[LANGUAGES.index(language)]
    pattern = " ".join(word if "{" in word else words[word] for word in order.split())
    grounds, texts = tuple(GROUNDS), []
    for (a, b), ground in zip(scenes.thing_NT.tolist(), scenes.ground_N.tolist(), strict=True):
        (c0, s0), (c1, s1) = THINGS[a], THINGS[b]
        names = {"c0": c0, "s0": s0, "c1": c1, "s1": s1, "g": grounds[ground]}
        texts.append(pattern.format(**{k: words[name] for k, name in names.items()}))
    return texts


@lru_cache(maxsize=len(LANGUAGES))
def _dictionary(language: str) -> dict[str, str]:
    """English words to the language's own: two or three syllables each, no two alike."""
    if language not in LANGUAGES:
        raise UsageError(f"There is no made language {language!r}.", hint=f"Use {', '.join(LANGUAGES)}.")
    if language == LANGUAGES[0]:
        return {word: word for word in _WORDS}
    rng = np.random.default_rng([7, LANGUAGES.index(language)])
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words: dict[str, str] = {}
    for word in _WORDS:
        own = "".join(rng.choice(syllables, rng.integers(2, 4)))
        while own in words.values():
            own += str(rng.choice(syllables))
        words[word] = word if rng.random() < _BORROWED else own + language[-1]
    return words


@lru_cache(maxsize=1)
def _word_numbers() -> dict[str, int]:
    words = sorted({word for language in LANGUAGES for word in _dictionary(language).values()})
    return {word: number for number, word in enumerate(words, start=1)}


def vocabulary_size() -> int:
    """Tokens there are: 0 fills up, the largest ends a text."""
    return len(_word_numbers()) + 2


def tokens(texts: Sequence[str]) -> np.ndarray:
    """tokens_NL int64 for texts of any of the languages; a word of none of them raises `UsageError`."""
    return word_tokens(texts, _word_numbers(), CONTEXT_LENGTH, world="The made languages have")


class CaptionedViews:
    """Pictures with captions in some languages as batches of random crops, a language drawn for each row."""

    def __init__(self, scenes: TwoThings, languages: Sequence[str]) -> None:
        spoken = [tokens(captions(scenes, language)) for language in languages]
        self.tokens_KNL = torch.from_numpy(np.stack(spoken))
        self.pixels_NCHW = pixels(scenes.pixels_NSS3)

    def __len__(self) -> int:
        return len(self.pixels_NCHW)

    def batch(self, rows_B: Tensor, needs: Needs, *, seed: int) -> dict[str, Tensor]:
        """The picture fields that `needs` names, and `text`. Crops hash (seed, row)."""
        language_B = hash_uint64(seed, rows_B.numpy(), 99) % np.uint64(len(self.tokens_KNL))
        made = {"text": self.tokens_KNL[torch.from_numpy(language_B.astype(np.int64)), rows_B]}
        for n, f in enumerate(f for f in needs.fields if isinstance(f, PictureField)):
            size = f.size[0] if f.size else SIDE
            views = [
                random_resized_crop(
                    self.pixels_NCHW[rows_B],
                    rows_B.numpy(),
                    seed=(seed * 8 + n) * 64 + view,
                    size=size,
                    area=f.area or (1, 1),
                )
                for view in range(f.count)
            ]
            made[f.name] = torch.stack(views, 1)
        return made


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _masks() -> np.ndarray:
    """How much of each place a shape covers, float32 (shapes, M, M), from -_MASK_REACH to it in radii."""
    made = []
    for shape in SHAPES:
        image = Image.new("L", (_MASK_SIDE, _MASK_SIDE))
        pen = ImageDraw.Draw(image)
        for points, fill in zip(OUTLINES[shape][:2], (255, 0), strict=True):
            if points is not None:
                places = (points / _MASK_REACH + 1) * (_MASK_SIDE / 2)
                pen.polygon([(float(x), float(y)) for x, y in places], fill=fill)
        # a pixel of the picture is about seven of the mask's
        made.append(np.asarray(image.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255)
    return np.stack(made)


def _pictures(rng: np.random.Generator, thing_NT: np.ndarray, ground_N: np.ndarray) -> np.ndarray:
    count = len(ground_N)
    colour_N3 = np.array(list(GROUNDS.values()), np.float32)[ground_N]
    canvas_NSS3 = np.repeat(colour_N3[:, None, None], SIDE * SIDE, 1).reshape(count, SIDE, SIDE, 3)
    places_NT = np.argsort(rng.random((count, len(_PLACES))), 1)[:, :2]
    table = np.array([world_shapes.COLOURS[name] for name in COLOURS], np.float32)
    at_S = np.arange(SIDE) + 0.5
    for t in range(2):
        colour_N, shape_N = np.divmod(thing_NT[:, t], len(SHAPES))
        shade_N3 = table[colour_N] + rng.uniform(-20, 20, (count, 3)).astype(np.float32)
        radius_N = rng.uniform(*_RADII, count) * SIDE
        centre_N2 = (np.array(_PLACES)[places_NT[:, t]] + rng.uniform(-0.05, 0.05, (count, 2))) * SIDE
        at_NS2 = (at_S[None, :, None] - centre_N2[:, None]) / radius_N[:, None, None]
        cell_NS2 = np.clip((at_NS2 / _MASK_REACH + 1) * (_MASK_SIDE / 2), 0, _MASK_SIDE - 1).astype(np.intp)
        cover_NSS = _masks()[shape_N[:, None, None], cell_NS2[:, :, None, 0], cell_NS2[:, None, :, 1]]
        canvas_NSS3 += cover_NSS[..., None] * (shade_N3[:, None, None] - canvas_NSS3)
    canvas_NSS3 *= rng.uniform(0.85, 1.1, (count, 1, 1, 1)).astype(np.float32)  # light
    canvas_NSS3 += 8 * rng.standard_normal(canvas_NSS3.shape, np.float32)  # grain
    return np.clip(np.rint(canvas_NSS3), 0, 255).astype(np.uint8)
