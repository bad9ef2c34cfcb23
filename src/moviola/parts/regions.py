"""Regions of pictures: boxes as masks, what is kept of a picture, and which boxes show which entity.

Boxes are xyxy pixels of the upright picture; both corners belong to them. A dense captioner's output is
`{phrase: [[x1, y1, x2, y2], ...]}` a picture, best box first.

Axis letters: H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from moviola.parts.sentence_parser import Parse
from moviola.types import UsageError

Box = tuple[float, float, float, float]
Dense = Mapping[str, Sequence[Sequence[float]]]
"""Phrase -> its boxes."""
Regions = Mapping[str, Sequence[Box | None]]
"""Entity name -> its boxes; none: it was not found; None in place of a box: the whole picture."""


def box_mask(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """mask_HW of the (height, width) = `size`, True in the box; fractions as Pillow draws rectangles."""
    height, width = size
    if len(box) != 4 or not np.isfinite(box).all():
        raise UsageError(f"A box is [left, top, right, bottom] in pixels, got {list(box)}.")
    left, top, right, bottom = box
    if right < left or bottom < top:
        raise UsageError(f"A box goes from its left top to its right bottom corner, got {list(box)}.")
    if right < 0 or bottom < 0 or left > width - 1 or top > height - 1:
        raise UsageError(
            f"The box {list(box)} lies outside the picture of {width} x {height} pixels.",
            hint="Boxes are pixels of the upright picture, not shares of its sides.",
        )
    image = Image.new("L", (width, height), 0)
    ImageDraw.Draw(image).rectangle([(left, top), (right, bottom)], fill=255)
    return np.asarray(image) > 0


def keep(pixels_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The picture with everything outside the mask made black."""
    return pixels_HW3 * mask_HW[..., None].astype(np.uint8)


def overlay(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one size laid over one another, each where its grey is above 0."""
    made_HW3 = np.zeros_like(pictures[0])
    for pixels_HW3 in pictures:
        present_HW = grey(pixels_HW3) > 0
        made_HW3[present_HW] = pixels_HW3[present_HW]
    return made_HW3


def grey(pixels_HW3: np.ndarray) -> np.ndarray:
    """8-bit grey as Pillow's mode L."""
    return np.asarray(Image.fromarray(pixels_HW3).convert("L"))


# --------------------------------------------------------------------------------------------------
# Which boxes show which entity
# --------------------------------------------------------------------------------------------------


def by_table(table: Mapping[str, Sequence[str]], dense: Dense) -> dict[str, list[Box | None]]:
    """Each entity's phrases, as a table says, and each phrase's first box; None where it has none."""
    return {name: [_first_box(dense.get(phrase)) for phrase in phrases] for name, phrases in table.items()}


def by_words(parse: Parse, dense: Dense) -> dict[str, list[Box | None]]:
    """Each entity with the boxes of the phrases that hold all words of its name.

    Case and a plural s do not count. Where some of these phrases also hold all the entity's attributes,
    only those are taken.
    """
    words = {phrase: _words(phrase) for phrase in dense}
    table = {}
    for entity in parse.entities:
        named = [phrase for phrase in dense if _words(entity.name) <= words[phrase]]
        exact = [phrase for phrase in named if _words(entity.text) <= words[phrase]]
        table[entity.name] = exact or named
    return by_table(table, dense)


def _words(text: str) -> set[str]:
    found = re.findall(r"\w+", text.casefold())
    return {word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word for word in found}


def _first_box(boxes: Sequence[Sequence[float]] | None) -> Box | None:
    if not boxes:
        return None
    left, top, right, bottom = boxes[0]
    return left, top, right, bottom
