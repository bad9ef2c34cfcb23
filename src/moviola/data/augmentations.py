"""Strong augmentations with every parameter written out: drawn once, applied as often as one likes.

An augmentation is a box, given as shares of the picture, that is cut out and scaled to the size of the
one who looks, and then at most a few named operations with explicit values (as RandAugment's), all of
them independent of the size. Applying it is deterministic and draws nothing, so whatever version drew the
parameters, the pixels of a picture at a size are the same.

Axis letters: A augmentations, U uniform numbers of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from moviola.data.hashing import hash_strings, hash_uniform, mix
from moviola.media import on_white
from moviola.types import UsageError

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "colour",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""What is drawn from, in the order of the draw: a new one goes to the end."""

_GROUND = (122, 116, 104)  # what lies beyond a picture that was moved: the mean colour of CLIP's data
_ATTEMPTS = 10
_DRAWS = 64  # uniforms of one augmentation: boxes (attempts x 2), place (2), mirror, operations (2 each)
_PLACE, _MIRROR, _OPERATION = 2 * _ATTEMPTS, 2 * _ATTEMPTS + 2, 2 * _ATTEMPTS + 3
_MOST_OPERATIONS = (_DRAWS - _OPERATION) // 2


@dataclass(frozen=True)
class Augment:
    """From what augmentations are drawn.

    area        least and largest share of the picture in the box
    ratio       least and largest ratio of the box's width to its height, in pixels
    operations  how many operations follow, each any of `OPERATIONS`
    strength    their size, 0 to 1; 0.3 is RandAugment's magnitude 9 of 30
    mirror      the chance of mirroring: 0, since captions speak of left and right
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    operations: int = 2
    strength: float = 0.3
    mirror: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UsageError(f"The area of a crop needs 0 < least <= most <= 1, got {self.area}.")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UsageError(f"The ratio of a crop needs 0 < least <= most, got {self.ratio}.")
        if not 0 <= self.operations <= _MOST_OPERATIONS:
            raise UsageError(f"Operations can be 0 to {_MOST_OPERATIONS}, got {self.operations}.")
        for name in ("strength", "mirror"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} lies between 0 and 1, got {getattr(self, name)}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Augment:
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**made)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One augmentation: `left, top, right, bottom` are shares of the picture's width and height.

    `operations` are (name, value). Values: shear as tangent, translation as share of the side, rotation
    in degrees counter-clockwise, brightness to sharpness as a factor (1 changes nothing), bits that
    posterize keeps, threshold from which solarize inverts; 0 for those without a value.
    """

    left: float
    top: float
    right: float
    bottom: float
    mirror: bool = False
    operations: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a row of the `augmentations` column."""
        names, values = [n for n, _ in self.operations], [v for _, v in self.operations]
        box = {name: getattr(self, name) for name in ("left", "top", "right", "bottom")}
        return {**box, "mirror": self.mirror, "operations": names, "values": values}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Augmentation:
        box = (data["left"], data["top"], data["right"], data["bottom"])
        return cls(*box, data["mirror"], tuple(zip(data["operations"], data["values"], strict=True)))


def draw(
    seed: int, id: str, size: tuple[int, int], count: int, augment: Augment | None = None
) -> list[Augmentation]:
    """The `count` augmentations of the row `id`, whose picture is `size` (height, width) pixels.

    Every number is a hash of (seed, id, index): more augmentations leave the first ones as they are.
    Where ten boxes in a row do not fit into the picture, the last is cut to it.
    """
    import pyarrow as pa

    augment = augment or Augment()
    height, width = size
    key_A = mix(hash_strings(pa.array([id], pa.string())) ^ mix(np.arange(1, count + 1, dtype=np.uint64)))
    u_AU = hash_uniform(seed, mix(key_A[:, None] ^ mix(np.arange(_DRAWS, dtype=np.uint64))))
    area = augment.area[0] + (augment.area[1] - augment.area[0]) * u_AU[:, 0:_PLACE:2]
    low, high = np.log(augment.ratio)
    ratio = np.exp(low + (high - low) * u_AU[:, 1:_PLACE:2])
    wide, tall = np.sqrt(area * ratio * height / width), np.sqrt(area / ratio * width / height)
    fits = (wide <= 1) & (tall <= 1)
    chosen = np.where(fits.any(1), fits.argmax(1), _ATTEMPTS - 1)[:, None]
    wide_A = np.minimum(np.take_along_axis(wide, chosen, 1)[:, 0], 1.0)
    tall_A = np.minimum(np.take_along_axis(tall, chosen, 1)[:, 0], 1.0)
    left_A, top_A = (1 - wide_A) * u_AU[:, _PLACE], (1 - tall_A) * u_AU[:, _PLACE + 1]
    # rounded to what is stored, so that the first application is of the stored numbers
    boxes_A4 = np.stack([left_A, top_A, left_A + wide_A, top_A + tall_A], 1).astype(np.float32).tolist()
    made = []
    for box, u_U in zip(boxes_A4, u_AU.tolist(), strict=True):
        operations = []
        for first in range(_OPERATION, _OPERATION + 2 * augment.operations, 2):
            name = OPERATIONS[int(u_U[first] * len(OPERATIONS))]
            value = _value(name, augment.strength, -1 if u_U[first + 1] < 0.5 else 1)
            operations.append((name, float(np.float32(value))))
        left, top, right, bottom = box
        mirror = u_U[_MIRROR] < augment.mirror
        made.append(Augmentation(left, top, right, bottom, mirror, tuple(operations)))
    return made


def _value(name: str, strength: float, sign: int) -> float:
    """RandAugment's ranges at a strength of 1."""
    if name in ("shear_x", "shear_y"):
        return sign * 0.3 * strength
    if name in ("translate_x", "translate_y"):
        return sign * 0.45 * strength
    if name == "rotate":
        return sign * 30 * strength
    if name in ("brightness", "colour", "contrast", "sharpness"):
        return 1 + sign * 0.9 * strength
    if name == "posterize":
        return 8 - round(4 * strength)
    if name == "solarize":
        return 256 - round(256 * strength)
    return 0.0


def apply(
    augmentation: Augmentation, picture: Image.Image, size: tuple[int, int] | None = None
) -> Image.Image:
    """The augmented picture (RGB) at `size` (height, width); None leaves the box at its own size.

    Transparent parts are laid on white. Draws nothing: the same in gives the same out.
    """
    picture = on_white(picture)
    width, height = picture.size
    left = min(max(round(augmentation.left * width), 0), width - 1)
    top = min(max(round(augmentation.top * height), 0), height - 1)
    right = min(max(round(augmentation.right * width), left + 1), width)
    bottom = min(max(round(augmentation.bottom * height), top + 1), height)
    picture = picture.crop((left, top, right, bottom))
    if size is not None and size != (picture.height, picture.width):
        picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    if augmentation.mirror:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, value in augmentation.operations:
        picture = _operate(name, value, picture)
    return picture


def _operate(name: str, value: float, picture: Image.Image) -> Image.Image:
    if name == "identity":
        return picture
    if name in _ENHANCERS:
        return _ENHANCERS[name](picture).enhance(value)
    if name == "posterize":
        return ImageOps.posterize(picture, int(value))
    if name == "solarize":
        return ImageOps.solarize(picture, int(value))
    if name == "autocontrast":
        return ImageOps.autocontrast(picture)
    if name == "equalize":
        return ImageOps.equalize(picture)
    width, height = picture.size
    x, y = width / 2, height / 2
    # (a, b, c, d, e, f): the pixel shown at (x, y) is taken from (ax + by + c, dx + ey + f)
    if name == "shear_x":
        matrix = (1.0, value, -value * y, 0.0, 1.0, 0.0)
    elif name == "shear_y":
        matrix = (1.0, 0.0, 0.0, value, 1.0, -value * x)
    elif name == "translate_x":
        matrix = (1.0, 0.0, -value * width, 0.0, 1.0, 0.0)
    elif name == "translate_y":
        matrix = (1.0, 0.0, 0.0, 0.0, 1.0, -value * height)
    elif name == "rotate":
        cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
        matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    else:
        raise UsageError(
            f"This version does not know the augmentation {name!r}.",
            hint="Upgrade with: pip install -U moviola",
        )
    transform, filter = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return picture.transform(picture.size, transform, matrix, filter, fillcolor=_GROUND)


_ENHANCERS: dict[str, Callable[[Image.Image], Any]] = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
