"""Pictures in which shape and texture are of different classes: which of the two does a model name?

Three sources of them:

- `read_cue_conflict` reads the set of Geirhos et al. (ICLR 2019, arXiv 1811.12231) as it is published: a
  folder per shape, files named `cat3-elephant1.png` (shape, then texture).
- `cue_conflict` makes one from two pictures of the user's own: the phase of one's Fourier transform, where
  the outlines are, and the amplitude of the other's, where the texture is. It is a proxy for that set, which
  was made by style transfer: cheap, free of any network, and weaker in what it transfers (patterns that
  repeat, their scale and direction, and colour; no parts). Figures on both are not to be compared.
- `made_cues` draws outlines filled with patterns, for claims in miniature.

Axis letters: N pictures, C classes, H height, W width, S side in pixels, P points of an outline, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageOps

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data import world_shapes
from moviola.data.hashing import hash_uniform
from moviola.data.media_set import MediaSet, Stream, file_stream, row_numbers
from moviola.data.word_tokens import word_tokens
from moviola.media import media_kind, on_white
from moviola.types import Clip, UsageError, printable

CLASSES = (
    "airplane",
    "bear",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "car",
    "cat",
    "chair",
    "clock",
    "dog",
    "elephant",
    "keyboard",
    "knife",
    "oven",
    "truck",
)
"""The 16 classes of the published set."""
_NAME = re.compile(r"([a-z]+)\d*-([a-z]+)\d*")

# --------------------------------------------------------------------------------------------------
# The published set
# --------------------------------------------------------------------------------------------------


class CueConflictSet(MediaSet):
    """Pictures with the class number of their shape and of their texture, along `classes`."""

    def __init__(
        self,
        source: Path,
        ids: Sequence[str],
        stream: Stream,
        files: Sequence[Path],
        *,
        classes: Sequence[str],
        shapes: Sequence[int],
        textures: Sequence[int],
    ) -> None:
        super().__init__(source, ids, stream, files)
        self.classes = tuple(classes)
        self.shape_N, self.texture_N = row_numbers(shapes), row_numbers(textures)


def read_cue_conflict(source: str | Path, classes: Sequence[str] = CLASSES) -> CueConflictSet:
    """A folder per shape with files named by shape and texture, such as `cat/cat3-elephant1.png`.

    Pictures of one class in both are kept: the measure leaves them out. A file that is named otherwise, a
    class that is not among `classes`, or a folder of another shape than its files raises `UsageError`.
    """
    root = Path(source)
    if not root.is_dir():
        raise UsageError(f"{printable(root)} is no folder.", hint="Expected SHAPE/SHAPE1-TEXTURE1.png.")
    number = {name: at for at, name in enumerate(classes)}
    files, shapes, textures = [], [], []
    for path in sorted(root.glob("*/*")):
        if path.name.startswith(".") or media_kind(path) != "picture":
            continue
        named = _NAME.fullmatch(path.stem)
        if named is None:
            raise UsageError(
                f"{printable(path)} does not tell shape and texture by its name.",
                hint="Expected names such as cat3-elephant1.png: the shape, then the texture.",
            )
        shape, texture = named.groups()
        unknown = [word for word in (shape, texture) if word not in number]
        if unknown:
            raise UsageError(
                f"{printable(path)}: {unknown[0]!r} is none of the {len(number)} classes.",
                hint=f"They are {', '.join(number)}.",
            )
        if path.parent.name != shape:
            raise UsageError(
                f"{printable(path)} lies in the folder of {path.parent.name!r}, its name says {shape!r}."
            )
        files.append(path)
        shapes.append(number[shape])
        textures.append(number[texture])
    if not files:
        raise UsageError(
            f"{printable(root)} holds no folder with pictures in it.",
            hint="Expected SHAPE/SHAPE1-TEXTURE1.png.",
        )
    ids = [str(path) for path in files]
    stream = file_stream([Clip(path) for path in files], ids)
    return CueConflictSet(root, ids, stream, files, classes=classes, shapes=shapes, textures=textures)


# --------------------------------------------------------------------------------------------------
# From the user's own pictures
# --------------------------------------------------------------------------------------------------


def cue_pairs(labels_N: npt.ArrayLike, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for `count` pictures: (rows_shape, rows_texture), always of different classes.

    Every picture gives its shape about equally often; its texture is any picture of another class, each as
    likely. Drawn by hash: more pairs leave the first ones as they are.
    """
    labels = np.asarray(labels_N)
    classes, label_N = np.unique(labels, return_inverse=True)
    if labels.ndim != 1 or len(classes) < 2:
        raise UsageError(
            f"Cues conflict between pictures of two classes or more, got {len(classes)}.",
            hint="Give labelled pictures of several classes.",
        )
    if count < 1:
        raise UsageError(f"There must be one pair or more, got {count}.")
    total, pair = len(labels), np.arange(count, dtype=np.uint64)
    shape_order = np.argsort(hash_uniform(seed, np.arange(total, dtype=np.uint64), 1), kind="stable")
    rows_shape = shape_order[np.arange(count) % total]
    by_class = np.argsort(label_N, kind="stable")
    size_C = np.bincount(label_N)
    size, first = size_C[label_N[rows_shape]], (np.cumsum(size_C) - size_C)[label_N[rows_shape]]
    place = (hash_uniform(seed, pair, 2) * (total - size)).astype(np.int64)
    # the others in the order of classes: those before the shape's own class, then those after it
    return rows_shape, by_class[np.where(place < first, place, place + size)]


def cue_conflict(shape: Image.Image, texture: Image.Image, size: int = 224) -> Image.Image:
    """A picture (RGB, size x size) with the outlines of `shape` and the texture of `texture`.

    The middle squares of both, scaled; values that leave the range are cut off.
    """
    if size < 2:
        raise UsageError(f"The side of a picture is 2 pixels or more, got {size}.")
    square_SS3 = [
        np.asarray(ImageOps.fit(on_white(picture), (size, size), Image.Resampling.BICUBIC), np.float64)
        for picture in (shape, texture)
    ]
    return Image.fromarray(np.clip(np.rint(mix_spectra(*square_SS3)), 0, 255).astype(np.uint8))


def mix_spectra(shape_HW3: np.ndarray, texture_HW3: np.ndarray) -> np.ndarray:
    """The phase of one and the amplitude of the other, channel by channel; real, of any range."""
    phase, amplitude = (np.fft.rfft2(picture, axes=(0, 1)) for picture in (shape_HW3, texture_HW3))
    strength = np.abs(phase)
    unit = np.divide(phase, strength, out=np.ones_like(phase), where=strength > 0)
    mixed: np.ndarray = np.fft.irfft2(np.abs(amplitude) * unit, s=shape_HW3.shape[:2], axes=(0, 1))
    return mixed


# --------------------------------------------------------------------------------------------------
# Made cues
# --------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "arrow", "crescent")
TEXTURES = ("rows", "columns", "slopes", "checks", "dots", "grain", "clouds", "rings")
"""Class c of the made cues has shape c, and texture c where both agree."""
SIDE = 24
CONTEXT_LENGTH = 8
_DRAWN_AT = 4


@dataclass(frozen=True)
class MadeCues:
    """pixels_NSS3 uint8, and the class numbers of shapes and textures."""

    pixels_NSS3: np.ndarray
    shape_N: np.ndarray
    texture_N: np.ndarray

    def __len__(self) -> int:
        return len(self.shape_N)

    @property
    def images_NCSS(self) -> torch.Tensor:
        """As an image tower takes them: float32 from -1 to 1."""
        return torch.from_numpy(self.pixels_NSS3).permute(0, 3, 1, 2) / 127.5 - 1


def made_cues(seed: int, count: int, *, agree: float, split: int = 0) -> MadeCues:
    """Outlines filled with a pattern of two random colours, on plain ground.

    agree  the chance that the texture is that of the shape's class; any other has the same chance, so that
           1 makes texture as good a cue as shape, 1 / C none at all, and 0 conflicts in every picture
    """
    if count < 1 or not 0 <= agree <= 1:
        raise UsageError(f"There must be pictures, and a chance from 0 to 1, got {count} and {agree}.")
    rng = np.random.default_rng([seed, split])
    shape_N = rng.integers(len(SHAPES), size=count)
    other_N = (shape_N + rng.integers(1, len(SHAPES), size=count)) % len(SHAPES)
    texture_N = np.where(rng.random(count) < agree, shape_N, other_N)
    cover_N1 = np.stack([_cover(rng, SHAPES[shape]) for shape in shape_N.tolist()])[..., None]
    pattern_N1 = np.stack([_pattern(rng, TEXTURES[texture]) for texture in texture_N.tolist()])[..., None]
    ground, low, high = rng.uniform(0, 255, (3, count, 1, 1, 3))
    # a pattern needs two colours that differ: the second lies on the other side of the middle
    high = np.where(np.abs(high - low) < 90, (low + 128) % 256, high)
    inside = low + (high - low) * pattern_N1
    canvas = ground + cover_N1 * (inside - ground) + 6 * rng.standard_normal((count, SIDE, SIDE, 3))
    return MadeCues(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), shape_N, texture_N)


def _cover(rng: np.random.Generator, name: str) -> np.ndarray:
    """How much of each pixel the outline covers, 0 to 1: (S, S)."""
    angle = rng.uniform(0, 2 * np.pi)
    turn_22 = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points_P2 = world_shapes.OUTLINES[name][0] @ turn_22.T * rng.uniform(0.30, 0.42)
    places = (points_P2 + 0.5 + rng.uniform(-0.1, 0.1, 2)) * SIDE * _DRAWN_AT
    image = Image.new("L", (SIDE * _DRAWN_AT, SIDE * _DRAWN_AT))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in places], fill=255)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64) / 255


def _pattern(rng: np.random.Generator, name: str) -> np.ndarray:
    """A pattern from 0 to 1 over the whole square at a random place: (S, S)."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.uniform(0, SIDE, 2)[:, None, None]
    wave = 2 * np.pi / rng.uniform(3.6, 4.4)
    if name == "grain":
        return rng.random((SIDE, SIDE))
    if name == "clouds":
        coarse = Image.fromarray(rng.random((5, 5)).astype(np.float32))
        return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64).clip(0, 1)
    waves = {
        "rows": np.sin(wave * y),
        "columns": np.sin(wave * x),
        "slopes": np.sin(wave * (x + y) / np.sqrt(2)),
        "checks": np.sin(wave * x) * np.sin(wave * y) * 1.5,
        "dots": np.minimum(np.sin(wave * x), np.sin(wave * y)) * 2 + 0.4,
        "rings": np.sin(wave * np.hypot(x - SIDE, y - SIDE)),
    }
    return np.clip(0.5 + 0.9 * waves[name], 0, 1)


def small_clip(seed: int) -> CLIP:
    """An untrained CLIP for made cues and their words: a convolutional stem, one layer a tower."""
    vision = VitConfig(SIDE, 8, width=64, layers=1, heads=2, stem=((16, 0), (32, 0), (64, 0)))
    text = TextConfig(CONTEXT_LENGTH, len(_word_numbers()) + 2, width=48, layers=1, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(ClipConfig(48, vision, text))


def made_captions(cues: MadeCues, seed: int, *, textured: float) -> torch.Tensor:
    """tokens_NL: "a star", and with the chance `textured` its texture too: "a star of dots"."""
    told_N = np.random.default_rng([seed, 3]).random(len(cues)) < textured
    rows = zip(cues.shape_N.tolist(), cues.texture_N.tolist(), told_N.tolist(), strict=True)
    return _tokens([f"a {SHAPES[s]}" + f" of {TEXTURES[t]}" * told for s, t, told in rows])


def made_prompts() -> torch.Tensor:
    """tokens_CL: a text per class, which names its shape."""
    return _tokens([f"a {shape}" for shape in SHAPES])


def _tokens(texts: Sequence[str]) -> torch.Tensor:
    made_NL = word_tokens(texts, _word_numbers(), CONTEXT_LENGTH, world="Made cues have")
    return torch.from_numpy(made_NL)


@lru_cache(maxsize=1)
def _word_numbers() -> dict[str, int]:
    return {word: number for number, word in enumerate(sorted({"a", "of", *SHAPES, *TEXTURES}), start=1)}
