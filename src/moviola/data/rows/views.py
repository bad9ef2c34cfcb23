"""Pictures as the tower sees them: a random crop scaled once, or exactly what `Preprocess` gives.

A crop is drawn from the picture's size before it is decoded, so a JPEG is decoded at a half, a quarter or an
eighth where the crop is still at least as large as the tower's picture. The box is then scaled in one step
(Pillow's `resize(box=)`): pixels are interpolated once.

Axis letters: V views of a picture, H height, W width, C channels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from moviola.clip.preprocess import FILTERS, Preprocess, scalable
from moviola.media.pictures import MOST_PIXELS, read_picture
from moviola.types import Recipe, UsageError

ASPECT = 4 / 3
"""A crop is between this and its inverse as wide as the tower's picture, height for height."""
DRAWS = 5
"""Uniform numbers that a view takes: area, aspect, left, top, mirroring."""
_ORIENTATION = 0x0112
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a view lies in its upright picture: x of the view is `(x - left) * scale_x`, then mirrored."""

    left: float
    top: float
    scale_x: float
    scale_y: float
    size: tuple[int, int]
    mirrored: bool = False

    def boxes(self, boxes_N4: np.ndarray) -> np.ndarray:
        """xyxy boxes of the picture as boxes of the view, cut at its edges; what lies outside is empty."""
        height, width = self.size
        x_N2 = np.clip((boxes_N4[:, 0::2] - self.left) * self.scale_x, 0, width)
        y_N2 = np.clip((boxes_N4[:, 1::2] - self.top) * self.scale_y, 0, height)
        if self.mirrored:
            x_N2 = width - x_N2[:, ::-1]
        return np.stack([x_N2[:, 0], y_N2[:, 0], x_N2[:, 1], y_N2[:, 1]], axis=1)


class View(Preprocess):
    """One way to look at pictures: a size, the share of the picture to keep and the chance of mirroring."""

    def __init__(
        self, recipe: Recipe, *, size: tuple[int, int] | None, area: tuple[float, float], flip: float
    ) -> None:
        if size is not None and size != recipe.size:
            scaled = recipe.resize_size
            if scaled is not None:
                shares = zip(scaled, recipe.size, size)
                scaled = tuple(max(s, round(s * t / r)) for t, r, s in shares)  # type: ignore[assignment]
            recipe = replace(recipe, size=size, resize_size=scaled)
        super().__init__(recipe)
        if not 0 < area[0] <= area[1] <= 1:
            raise UsageError(
                f"The area of a crop must be 0 < least <= most <= 1, got {area[0]:g} and {area[1]:g}.",
                hint="Use for example --crop-area 0.5 1.",
            )
        if not 0 <= flip <= 1:
            raise UsageError(f"The chance of mirroring must be between 0 and 1, got {flip:g}.")
        self.area, self.flip = area, flip

    @property
    def whole(self) -> bool:
        """Whether pictures are shown as `Preprocess` shows them."""
        return self.area == (1, 1)

    def box(self, height: int, width: int, draws: Sequence[float]) -> tuple[float, float, float, float]:
        """(left, top, width, height) of a random crop: of that area where the picture's shape allows it."""
        rows, columns = self.recipe.size
        share = self.area[0] + (self.area[1] - self.area[0]) * draws[0]
        aspect = math.exp((2 * draws[1] - 1) * math.log(ASPECT)) * columns / rows
        wide = min(math.sqrt(share * height * width * aspect), width, height * aspect)
        tall = min(wide / aspect, height)
        return draws[2] * (width - wide), draws[3] * (height - tall), wide, tall

    def look(
        self, image: Image.Image, draws: Sequence[float], shrunk: float, upright: tuple[int, int]
    ) -> tuple[np.ndarray, Placed]:
        """uint8 pixels_HWC of the view and where it lies. `upright`: the picture's (height, width) in full;
        `image` may be `shrunk` times smaller.
        """
        height, width = upright
        rows, columns = self.recipe.size
        mirrored = draws[4] < self.flip
        if self.whole:
            scaled = self._scaled(height, width)
            if scaled != (image.height, image.width):
                image = image.resize(scaled[::-1], FILTERS[self.recipe.interpolation])
            top, left = self._offsets(*scaled)
            if scaled != (rows, columns):
                image = image.crop((left, top, left + columns, top + rows))
            scale_x, scale_y = scaled[1] / width, scaled[0] / height
            placed = Placed(left / scale_x, top / scale_y, scale_x, scale_y, (rows, columns), mirrored)
        else:
            left_f, top_f, wide, tall = self.box(height, width, draws)
            box = (
                left_f / shrunk,
                top_f / shrunk,
                min((left_f + wide) / shrunk, image.width),
                min((top_f + tall) / shrunk, image.height),
            )
            image = image.resize((columns, rows), FILTERS[self.recipe.interpolation], box=box)
            placed = Placed(left_f, top_f, columns / wide, rows / tall, (rows, columns), mirrored)
        pixels_HWC = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return (np.ascontiguousarray(pixels_HWC[:, ::-1]) if mirrored else pixels_HWC), placed

    def normalized(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """uint8 views (H, W, C) as float32 (N, C, H, W): the same numbers as `Preprocess.picture` gives."""
        out_NCHW = torch.empty(len(pixels), 3, *self.recipe.size)
        for one_CHW, pixels_HWC in zip(out_NCHW, pixels):  # picture by picture: each stays in the cache
            one_CHW.copy_(torch.from_numpy(pixels_HWC).permute(2, 0, 1))
            one_CHW.div_(255).sub_(self._mean_C11).div_(self._std_C11)
        return out_NCHW


def look_at(
    source: bytes | Path, views: Sequence[View], draws_VD: np.ndarray
) -> tuple[list[np.ndarray], list[Placed]]:
    """All views of one picture, decoded once. `MediaError` for what cannot be read.

    `draws_VD` holds `DRAWS` uniform numbers a view.
    """
    draws = draws_VD.tolist()
    try:
        image, shrunk, upright = _opened(source, views, draws)
    except _DAMAGE:
        image = read_picture(source)  # says what is wrong; a picture that it can read after all is fine
        shrunk, upright = 1.0, (image.height, image.width)
    image = scalable(image)
    pixels, places = [], []
    for view, numbers in zip(views, draws):
        one, placed = view.look(image, numbers, shrunk, upright)
        pixels.append(one)
        places.append(placed)
    return pixels, places


def _opened(
    source: bytes | Path, views: Sequence[View], draws: Sequence[Sequence[float]]
) -> tuple[Image.Image, float, tuple[int, int]]:
    """The upright picture, how many times smaller than stored it was decoded, and (height, width) in full."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError("too large")  # `read_picture` words it
    turned = image.getexif().get(_ORIENTATION, 1)
    upright = (width, height) if turned in (5, 6, 7, 8) else (height, width)
    shrunk = 1.0
    if image.format == "JPEG":
        shrunk = _shrink(views, draws, upright)
        if shrunk > 1:
            drafted = image.draft(None, (width // int(shrunk), height // int(shrunk)))
            shrunk = 1.0 if drafted is None else shrunk
    image.load()
    return ImageOps.exif_transpose(image) if turned in range(2, 9) else image, shrunk, upright


def _shrink(views: Sequence[View], draws: Sequence[Sequence[float]], upright: tuple[int, int]) -> float:
    """How many times smaller a JPEG may be decoded: every crop keeps at least the view's pixels."""
    least = 8.0
    for view, numbers in zip(views, draws):
        if view.whole:
            return 1.0
        _, _, wide, tall = view.box(*upright, numbers)
        least = min(least, wide / view.recipe.size[1], tall / view.recipe.size[0])
    return float(2 ** max(0, math.floor(math.log2(max(least, 1.0)))))
