"""Still lifes: pictures of one striking thing among faint features that occur together.

The thing is a colour and a shape, 80 in all. Around it are four faint features: the ground, a trim
along one side, a small mark in a corner and a tint. A hidden setting (one of six) gives each faint
feature its own value with the chance `together`, and any value otherwise, so that they co-occur; the
thing is independent of them. Captions are lists of words such as "a red star on gravel with ivory trim".

Made in bulk (about 10,000 pictures a second) and seeded: equal arguments give equal pictures.

Axis letters: N pictures, F faint features, S side in pixels, L tokens, M variants of a drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data import world_shapes
from moviola.data.word_tokens import word_tokens
from moviola.data.world_shapes import LARGEST_TURN, OUTLINES
from moviola.types import UsageError

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart", "crescent", "arrow")
FAINT: dict[str, tuple[str, ...]] = {
    "ground": ("gravel", "sand", "brick", "moss", "water", "snow"),
    "trim": ("crimson", "emerald", "navy", "golden", "ivory", "violet"),
    "mark": ("dot", "block", "roof", "plus", "loop", "hook"),
    "tint": ("dawn", "noon", "dusk", "fog", "shade", "glow"),
}
SIDE = 24
CONTEXT_LENGTH = 16
END_OF_TEXT = 1  # words are numbered from 2; pools at its first place, so it need not be the largest

_GROUND = ((134, 130, 126), (212, 188, 144), (150, 92, 78), (98, 118, 76), (96, 132, 150), (228, 232, 236))
_GRAIN = (26, 9, 10, 18, 8, 4)
_TRIM = ((190, 30, 60), (20, 150, 90), (30, 40, 110), (220, 170, 40), (240, 236, 215), (130, 60, 170))
_TINT = (
    (1.10, 0.96, 0.92),
    (1.08, 1.08, 1.08),
    (0.92, 0.88, 1.02),
    (1.0, 1.0, 1.0),
    (0.82, 0.84, 0.86),
    (1.08, 1.04, 0.86),
)
_MARKS = ("circle", "square", "triangle", "cross", "ring", "crescent")
_DRAWN_AT, _VARIANTS = 4, 48  # each drawing is made this many times larger, in so many variants


@dataclass(frozen=True)
class StillLifes:
    """pixels_NSS3 uint8; thing_N, the number of the colour times 10 plus the shape's; faint_NF values."""

    pixels_NSS3: np.ndarray
    thing_N: np.ndarray
    faint_NF: np.ndarray

    def __len__(self) -> int:
        return len(self.thing_N)

    @property
    def images_NCSS(self) -> torch.Tensor:
        """As an image tower takes them: float32 from -1 to 1."""
        return torch.from_numpy(self.pixels_NSS3).permute(0, 3, 1, 2) / 127.5 - 1

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The class numbers of each faint feature, and of the `thing`; they count along `prompts()`."""
        return dict(zip(FAINT, self.faint_NF.T, strict=True)) | {"thing": self.thing_N}


def still_lifes(seed: int, count: int, *, together: float = 0.8, split: int = 0) -> StillLifes:
    """`count` pictures. Another `split` of a seed gives other pictures by the same law.

    `together`: the chance that a faint feature has its setting's value; 0 makes all independent.
    """
    if count < 1 or not 0 <= together <= 1:
        raise UsageError(f"There must be pictures, and a chance from 0 to 1, got {count} and {together}.")
    rng = np.random.default_rng([seed, split])
    thing_N = rng.integers(len(COLOURS) * len(SHAPES), size=count)
    setting_N = rng.integers(6, size=count)
    free_NF = rng.integers(6, size=(count, len(FAINT)))
    faint_NF = np.where(rng.random(free_NF.shape) < together, setting_N[:, None], free_NF)
    return StillLifes(_draw(rng, thing_N, faint_NF), thing_N, faint_NF)


def one_of_each(seed: int) -> StillLifes:
    """New pictures for retrieval: every thing on every ground once (480), so that their captions differ."""
    rng = np.random.default_rng([seed, 1 << 20])
    thing_N = np.repeat(np.arange(len(COLOURS) * len(SHAPES)), 6)
    faint_NF = rng.integers(6, size=(len(thing_N), len(FAINT)))
    faint_NF[:, 0] = np.tile(np.arange(6), len(thing_N) // 6)
    return StillLifes(_draw(rng, thing_N, faint_NF), thing_N, faint_NF)


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def thing_name(thing: int) -> str:
    return f"{COLOURS[thing // len(SHAPES)]} {SHAPES[thing % len(SHAPES)]}"


def faint_phrases() -> dict[str, list[str]]:
    """How captions name each value of each faint feature."""
    forms = {"ground": "on {}", "trim": "with {} trim", "mark": "with a {}", "tint": "at {}"}
    return {name: [forms[name].format(word) for word in words] for name, words in FAINT.items()}


def prompts() -> dict[str, list[str]]:
    """A text per class, for each faint feature by itself and for the `thing`."""
    faint = {name: [f"a picture {phrase}" for phrase in made] for name, made in faint_phrases().items()}
    return faint | {"thing": [f"a {thing_name(thing)}" for thing in range(len(COLOURS) * len(SHAPES))]}


def caption(thing: int, faint_F: Sequence[int], named: Sequence[bool]) -> str:
    """The thing, and the faint features that are to be named."""
    phrases = faint_phrases()
    parts = [phrases[name][v] for name, v, n in zip(FAINT, faint_F, named, strict=True) if n]
    return " ".join([f"a {thing_name(thing)}", *parts])


def small_clip(seed: int) -> CLIP:
    """An untrained CLIP for these pictures and words: a convolutional stem, one layer a tower."""
    vision = VitConfig(SIDE, 8, width=64, layers=1, heads=2, stem=((16, 0), (32, 0), (64, 0)))
    text = TextConfig(CONTEXT_LENGTH, vocabulary_size(), width=48, layers=1, heads=2, eot_id=END_OF_TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(ClipConfig(48, vision, text))


def captions(scenes: StillLifes, seed: int, *, named: float) -> torch.Tensor:
    """tokens_NL: the thing of each picture, and each of its faint features with the chance `named`."""
    rng = np.random.default_rng([seed, 3])
    named_NF = rng.random(scenes.faint_NF.shape) < named
    rows = zip(scenes.thing_N.tolist(), scenes.faint_NF.tolist(), named_NF.tolist(), strict=True)
    return tokens([caption(*row) for row in rows])


@dataclass(frozen=True)
class Triples:
    """Two texts a picture as tokens_NL: raw, which names much, and a captioner's, which names little.

    `shuffled_N`: whether the raw text was dealt to another picture.
    """

    raw_NL: torch.Tensor
    caption_NL: torch.Tensor
    shuffled_N: np.ndarray


def triples(scenes: StillLifes, seed: int, *, shuffled: float = 0.5, wrong: float = 0.1) -> Triples:
    """Raw texts name the thing and each faint feature with a chance of 0.7; captions name the thing alone.

    The share `shuffled` of the raw texts goes to other pictures, and captions name another thing with
    the chance `wrong`.
    """
    rng, count = np.random.default_rng([seed, 2]), len(scenes)
    named_NF = rng.random(scenes.faint_NF.shape) < 0.7
    rows = zip(scenes.thing_N.tolist(), scenes.faint_NF.tolist(), named_NF.tolist(), strict=True)
    raw = np.array([caption(*row) for row in rows])
    dealt = rng.permutation(count)[: round(shuffled * count)]
    raw[dealt] = raw[np.roll(dealt, 1)]
    thing_N = scenes.thing_N + (rng.random(count) < wrong) * rng.integers(1, 80, count)
    none = [False] * len(FAINT)
    captions = [caption(thing, [0] * len(FAINT), none) for thing in (thing_N % 80).tolist()]
    return Triples(tokens(raw.tolist()), tokens(captions), np.isin(np.arange(count), dealt))


@lru_cache(maxsize=1)
def _word_numbers() -> dict[str, int]:
    words = {*COLOURS, *SHAPES, "a", "picture"}
    words |= {word for phrases in faint_phrases().values() for text in phrases for word in text.split()}
    return {word: number for number, word in enumerate(sorted(words), start=2)}


def vocabulary_size() -> int:
    return len(_word_numbers()) + 2


def tokens(texts: Sequence[str]) -> torch.Tensor:
    """tokens_NL int64; raises `UsageError` for a word of another world."""
    numbers = _word_numbers()
    made_NL = word_tokens(texts, numbers, CONTEXT_LENGTH, world="Still lifes have", end=END_OF_TEXT)
    return torch.from_numpy(made_NL)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _drawings(names: tuple[str, ...], radius: tuple[float, float], reach: float, turns: bool) -> np.ndarray:
    """How much of each pixel a shape covers: float32 (shapes, M, S, S). Lengths are shares of the side."""
    rng, large = np.random.default_rng(0), SIDE * _DRAWN_AT
    made = np.zeros((len(names), _VARIANTS, SIDE, SIDE), np.float32)
    for kind, name in enumerate(names):
        for variant in range(_VARIANTS):
            image = Image.new("L", (large, large))
            pen = ImageDraw.Draw(image)
            centre_2 = 0.5 + rng.uniform(-reach, reach, 2)
            angle = np.deg2rad(LARGEST_TURN[name] * rng.uniform(-1, 1)) if turns else 0.0
            turn_22 = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            size = rng.uniform(*radius)
            outline, hole = OUTLINES[name][:2]
            for points, fill in ((outline, 255), (hole, 0)):
                if points is not None:
                    places = (points @ turn_22.T * size + centre_2) * large
                    pen.polygon([(float(x), float(y)) for x, y in places], fill=fill)
            small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
            made[kind, variant] = np.asarray(small, np.float32) / 255
    return made


def _draw(rng: np.random.Generator, thing_N: np.ndarray, faint_NF: np.ndarray) -> np.ndarray:
    parts = [slice(start, start + 2048) for start in range(0, len(thing_N), 2048)]
    return np.concatenate([_some(rng, thing_N[part], faint_NF[part]) for part in parts])


def _some(rng: np.random.Generator, thing_N: np.ndarray, faint_NF: np.ndarray) -> np.ndarray:
    count, (ground_N, trim_N, mark_N, tint_N) = len(thing_N), faint_NF.T
    canvas = np.empty((count, SIDE, SIDE, 3), np.float32)
    canvas[:] = np.array(_GROUND, np.float32)[ground_N][:, None, None]
    canvas += rng.uniform(-14, 14, (count, 1, 1, 3)).astype(np.float32)
    grain_N = np.array(_GRAIN, np.float32)[ground_N]
    canvas += grain_N[:, None, None, None] * rng.standard_normal((count, SIDE, SIDE, 1), np.float32)

    shade_N3 = np.array(_TRIM, np.float32)[trim_N] + rng.uniform(-14, 14, (count, 3)).astype(np.float32)
    side_N = rng.integers(4, size=count)
    strips = (np.s_[:2, :], np.s_[-2:, :], np.s_[:, :2], np.s_[:, -2:])
    for side, (rows, columns) in enumerate(strips):
        chosen = np.flatnonzero(side_N == side)
        region = canvas[chosen]
        region[:, rows, columns] = shade_N3[chosen][:, None, None]
        canvas[chosen] = region

    colour_N, shape_N = np.divmod(thing_N, len(SHAPES))
    table = np.array([world_shapes.COLOURS[name] for name in COLOURS], np.float32)
    thing_shade_N3 = table[colour_N] + rng.uniform(-20, 20, (count, 3)).astype(np.float32)
    variant_N = rng.integers(_VARIANTS, size=count)
    _cover(canvas, _drawings(SHAPES, (0.26, 0.36), 0.08, True)[shape_N, variant_N], thing_shade_N3)

    marks = _drawings(_MARKS, (0.10, 0.13), 0.01, False)[mark_N, rng.integers(_VARIANTS, size=count)]
    shift = round(0.32 * SIDE)
    # a mark is drawn in the middle, then moved into a corner
    corner_N2 = rng.integers(2, size=(count, 2)) * 2 - 1
    at_S = np.arange(SIDE)
    rows_NS = (at_S - shift * corner_N2[:, :1]) % SIDE
    columns_NS = (at_S - shift * corner_N2[:, 1:]) % SIDE
    moved = marks[np.arange(count)[:, None, None], rows_NS[:, :, None], columns_NS[:, None, :]]
    _cover(canvas, moved, np.full((count, 3), 245, np.float32) - 220 * (ground_N == 5)[:, None])

    canvas *= np.array(_TINT, np.float32)[tint_N][:, None, None]
    foggy = tint_N == FAINT["tint"].index("fog")
    canvas[foggy] = 0.7 * canvas[foggy] + 0.3 * 190
    canvas += 6 * rng.standard_normal(canvas.shape, np.float32)  # the camera's noise
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _cover(canvas_NSS3: np.ndarray, cover_NSS: np.ndarray, shade_N3: np.ndarray) -> None:
    canvas_NSS3 += cover_NSS[..., None] * (shade_N3[:, None, None, :].astype(np.float32) - canvas_NSS3)
