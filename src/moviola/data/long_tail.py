"""A made web: pictures whose captions speak of few things often and of many things rarely.

A picture shows one thing, a colour and a shape, on a ground. Which of the 80 classes it shows follows
a Zipf law of exponent 1, in an order that the seed deals anew. Captions are short sentences such as
"a red star on gravel, shop now"; a quarter of them name only the shape or only the colour. Half of
the pool is noise: a picture of clutter with a text such as "IMG_2041.JPG" or "click here", which holds
no entry of the metadata. The metadata is a list of the usual make: numbers, common words, names, and
pairs of names, many of which never occur.

This design was set down before any training on it, and was not changed after.

Axis letters: N pictures and texts, C classes, S side in pixels, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from moviola.data import world_shapes
from moviola.data.word_tokens import word_tokens
from moviola.data.world_shapes import LARGEST_TURN, OUTLINES
from moviola.types import UsageError

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart", "crescent", "arrow")
CLASSES: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SIDE = 24
CONTEXT_LENGTH = 16

_GROUNDS: dict[str, tuple[tuple[int, int, int], float, float, float, float]] = {
    # name -> colour, grain, and waves: their height, and their periods' inverse across and down
    "gravel": ((134, 130, 126), 26, 0, 0, 0),
    "sand": ((212, 188, 144), 9, 0, 0, 0),
    "brick": ((150, 92, 78), 8, 16, 0, 0.25),
    "moss": ((98, 118, 76), 16, 6, 0.1, 0.1),
    "water": ((96, 132, 150), 5, 14, 0.05, 0.16),
    "snow": ((228, 232, 236), 5, 0, 0, 0),
    "wood": ((142, 108, 76), 6, 15, 0.2, 0),
    "concrete": ((168, 168, 164), 7, 4, 0.04, 0.04),
}
GROUNDS = tuple(_GROUNDS)

_SENTENCES = (
    "{article} {it} on {ground}",
    "{article} {it} on {ground}, shop now",
    "photo of {article} {it}",
    "{it} on {ground}",
    "picture of {article} {it} on {ground}",
    "{it}, free shipping",
    "my {it} on {ground}!",
    "{article} {it}: best price ever",
)
_JUNK = (
    "IMG_{number:04d}.JPG",
    "DSC{number:04d}.jpeg",
    "image-{number}.png",
    "untitled-{number}",
    "shop now",
    "click here for more",
    "free shipping, best price ever!",
    "logo {number:04d}x",
)
_ONLY_SHAPE, _ONLY_COLOUR = 0.15, 0.10
_COMMON = ("a", "an", "on", "of", "photo", "picture")


@dataclass(frozen=True)
class LongTail:
    """A pool of pairs: pixels_NSS3 uint8, a text each, and class_N, -1 where the pair is noise.

    `order_C` lists the classes from the most to the least frequent.
    """

    pixels_NSS3: np.ndarray
    texts: tuple[str, ...]
    class_N: np.ndarray
    order_C: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


def long_tail(seed: int, count: int = 20_000, *, exponent: float = 1.0, noise: float = 0.5) -> LongTail:
    """`count` pairs of which the share `noise`, to the nearest pair, is noise, in mixed order."""
    if count < 1 or not 0 <= noise <= 1:
        raise UsageError(f"A pool has pairs, 0 to 1 of them noise, got {count} and {noise}.")
    rng = np.random.default_rng([seed, 0])
    order_C = rng.permutation(len(CLASSES))
    share_C = np.arange(1, len(CLASSES) + 1, dtype=np.float64) ** -exponent
    class_N = order_C[rng.choice(len(CLASSES), count, p=share_C / share_C.sum())]
    class_N[rng.permutation(count)[: round(noise * count)]] = -1
    ground_N = rng.integers(len(GROUNDS), size=count)
    texts = _texts(rng, class_N, ground_N)
    return LongTail(_pictures(rng, class_N, ground_N), texts, class_N, order_C)


def even_pictures(seed: int, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """New pictures, as many of every class: pixels_NSS3 and class_N. No pool holds any of them."""
    rng = np.random.default_rng([seed, 1])
    class_N = np.repeat(np.arange(len(CLASSES)), per_class)
    ground_N = rng.integers(len(GROUNDS), size=len(class_N))
    return _pictures(rng, class_N, ground_N), class_N


def pixels(pixels_NSS3: np.ndarray) -> torch.Tensor:
    """As an image tower takes them: (N, 3, S, S) float32 from -1 to 1."""
    return torch.from_numpy(pixels_NSS3).permute(0, 3, 1, 2) / 127.5 - 1


class PairBatches:
    """Some pairs of a pool as batches to train on. Implements `moviola.training.loop.TrainingData`."""

    def __init__(self, pool: LongTail, rows: np.ndarray) -> None:
        self.pixels_NSS3 = pool.pixels_NSS3[rows]
        self.tokens_NL = torch.from_numpy(tokens([pool.texts[row] for row in rows.tolist()]))

    def __len__(self) -> int:
        return len(self.pixels_NSS3)

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, torch.Tensor]:
        return {"image": pixels(self.pixels_NSS3[rows]), "text": self.tokens_NL[rows]}


def metadata() -> tuple[str, ...]:
    """The entries: numbers, common words, colours, shapes, grounds, and every colour with every shape."""
    colours, shapes = tuple(world_shapes.COLOURS), world_shapes.SHAPES
    pairs = tuple(f"{colour} {shape}" for colour in colours for shape in shapes)
    return (*map(str, range(100)), *_COMMON, *colours, *shapes, *GROUNDS, *pairs)


def prompts() -> list[str]:
    """One sentence per class, for classification by text alone."""
    names = (f"{colour} {shape}" for colour, shape in CLASSES)
    return [f"picture of {_article(name)} {name}" for name in names]


# --------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------


def _texts(rng: np.random.Generator, class_N: np.ndarray, ground_N: np.ndarray) -> tuple[str, ...]:
    count = len(class_N)
    sentence_N = rng.integers(len(_SENTENCES), size=count)
    junk_N, number_N = rng.integers(len(_JUNK), size=count), rng.integers(10_000, size=count)
    part_N = rng.random(count)
    texts = []
    for n, label in enumerate(class_N.tolist()):
        if label < 0:
            texts.append(_JUNK[junk_N[n]].format(number=number_N[n]))
            continue
        colour, shape = CLASSES[label]
        it = f"{colour} {shape}"
        if part_N[n] < _ONLY_SHAPE:
            it = shape
        elif part_N[n] < _ONLY_SHAPE + _ONLY_COLOUR:
            it = f"{colour} one"
        sentence = _SENTENCES[sentence_N[n]]
        texts.append(sentence.format(article=_article(it), it=it, ground=GROUNDS[ground_N[n]]))
    return tuple(texts)


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _pieces(text: str) -> list[str]:
    """Words, single digits and single marks."""
    return re.findall(r"[^\W\d_]+|[\d_]|[^\w\s]", text)


@lru_cache(maxsize=1)
def _piece_numbers() -> dict[str, int]:
    names = [name for pair in CLASSES for name in pair]
    texts = [*_SENTENCES, *(junk.partition("{")[0] + junk.rpartition("}")[2] for junk in _JUNK)]
    words = {piece for text in texts for piece in _pieces(re.sub(r"{\w+}", " ", text))}
    pieces = sorted(words | set(names) | set(GROUNDS) | {"a", "an", "one", *"0123456789"})
    return {piece: number for number, piece in enumerate(pieces, start=1)}


def vocabulary_size() -> int:
    """Tokens there are: 0 fills up, the largest ends a text."""
    return len(_piece_numbers()) + 2


def tokens(texts: Sequence[str]) -> np.ndarray:
    """tokens_NL int64, for texts of this world; raises `UsageError` for a word it does not know."""
    return word_tokens(
        texts, _piece_numbers(), CONTEXT_LENGTH, world="The long-tailed world has", words=_pieces
    )


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------

_MASK_SIDE, _MASK_REACH, _CHUNK = 96, 1.2, 2048


@lru_cache(maxsize=1)
def _masks() -> np.ndarray:
    """How much of each place a shape covers, float32 (shapes, _MASK_SIDE, _MASK_SIDE), soft at the rim.

    The last one is a bar, for clutter. Places run from -_MASK_REACH to _MASK_REACH radii.
    """
    bar = np.array([[-1.0, -0.25], [1.0, -0.25], [1.0, 0.25], [-1.0, 0.25]])
    outlines = [OUTLINES[shape][:2] for shape in SHAPES] + [(bar, None)]
    made = []
    for outline, hole in outlines:
        image = Image.new("L", (_MASK_SIDE, _MASK_SIDE))
        pen = ImageDraw.Draw(image)
        for points, fill in ((outline, 255), (hole, 0)):
            if points is not None:
                places = (points / _MASK_REACH + 1) * (_MASK_SIDE / 2)
                pen.polygon([(float(x), float(y)) for x, y in places], fill=fill)
        # a pixel of the picture is about six of the mask's
        made.append(np.asarray(image.filter(ImageFilter.GaussianBlur(2.5)), np.float32) / 255)
    return np.stack(made)


def _pictures(rng: np.random.Generator, class_N: np.ndarray, ground_N: np.ndarray) -> np.ndarray:
    parts = [slice(start, start + _CHUNK) for start in range(0, len(class_N), _CHUNK)]
    return np.concatenate([_some_pictures(rng, class_N[part], ground_N[part]) for part in parts])


def _some_pictures(rng: np.random.Generator, class_N: np.ndarray, ground_N: np.ndarray) -> np.ndarray:
    canvas = _grounds(rng, ground_N)
    things, clutter = np.flatnonzero(class_N >= 0), np.flatnonzero(class_N < 0)
    colour_M, shape_M = np.divmod(class_N[things], len(SHAPES))
    table = np.array([world_shapes.COLOURS[name] for name in COLOURS], np.float32)
    shade_M3 = table[colour_M] + rng.uniform(-20, 20, (len(things), 3)).astype(np.float32)
    turn_M = np.array([LARGEST_TURN[name] for name in SHAPES])[shape_M] * rng.uniform(-1, 1, len(things))
    _stamp(rng, canvas, things, shape_M, shade_M3, turn_M, (0.26, 0.38))
    for _ in range(3):
        bar_M = np.full(len(clutter), len(SHAPES))
        shade_M3 = rng.uniform(0, 255, (len(clutter), 3)).astype(np.float32)
        _stamp(rng, canvas, clutter, bar_M, shade_M3, rng.uniform(0, 360, len(clutter)), (0.2, 0.5))
    canvas *= rng.uniform(0.8, 1.1, (len(canvas), 1, 1, 1)).astype(np.float32)  # light
    canvas += 6 * rng.standard_normal(canvas.shape, np.float32)  # the camera's noise
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _grounds(rng: np.random.Generator, ground_N: np.ndarray) -> np.ndarray:
    rows = [_GROUNDS[name] for name in GROUNDS]
    colour_N3 = np.array([row[0] for row in rows], np.float32)[ground_N]
    grain_N, wave_N, across_N, down_N = np.array([row[1:] for row in rows], np.float32)[ground_N].T
    count, at_S = len(ground_N), np.arange(SIDE, dtype=np.float32)
    colour_N3 = colour_N3 + rng.uniform(-12, 12, (count, 3)).astype(np.float32)
    start_N = rng.random(count, np.float32)
    turns_NSS = (
        start_N[:, None, None] + across_N[:, None, None] * at_S + down_N[:, None, None] * at_S[:, None]
    )
    height_NSS = wave_N[:, None, None] * np.sin(2 * np.pi * turns_NSS)
    height_NSS += grain_N[:, None, None] * rng.standard_normal((count, SIDE, SIDE), np.float32)
    return colour_N3[:, None, None, :] + height_NSS[..., None]


def _stamp(
    rng: np.random.Generator,
    canvas_NSS3: np.ndarray,
    rows_M: np.ndarray,
    shape_M: np.ndarray,
    shade_M3: np.ndarray,
    turn_M: np.ndarray,
    radii: tuple[float, float],
) -> None:
    """Paint one thing onto each of these pictures, somewhere near its middle. `radii`: shares of the side."""
    count = len(rows_M)
    radius_M = rng.uniform(*radii, count) * SIDE
    centre_M2 = SIDE / 2 + rng.uniform(-0.12, 0.12, (count, 2)) * SIDE
    angle_M = np.deg2rad(turn_M)
    at_S = np.arange(SIDE) + 0.5
    x_MS = (at_S - centre_M2[:, :1]) / radius_M[:, None]
    y_MS = (at_S - centre_M2[:, 1:]) / radius_M[:, None]
    cos_M, sin_M = np.cos(angle_M)[:, None, None], np.sin(angle_M)[:, None, None]
    u_MSS = cos_M * x_MS[:, None, :] + sin_M * y_MS[:, :, None]
    v_MSS = cos_M * y_MS[:, :, None] - sin_M * x_MS[:, None, :]
    u_MSS, v_MSS = (
        np.clip((p / _MASK_REACH + 1) * (_MASK_SIDE / 2), 0, _MASK_SIDE - 1).astype(np.intp)
        for p in (u_MSS, v_MSS)
    )
    cover_MSS1 = _masks()[shape_M[:, None, None], v_MSS, u_MSS][..., None]
    canvas_NSS3[rows_M] += cover_MSS1 * (shade_M3[:, None, None, :] - canvas_NSS3[rows_M])
