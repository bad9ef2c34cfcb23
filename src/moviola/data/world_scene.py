"""Still pictures of the made world: what is in them, where, and what may truly be said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from moviola.data import world_draw as draw
from moviola.data import world_text as text
from moviola.data.world_draw import GROUNDS, TEXTURES
from moviola.data.world_shapes import COLOURS, FACINGS, LARGEST_TURN, SHAPES, SIZES, Dice, Rgb, jitter, mix
from moviola.types import UsageError

__all__ = ["Ground", "Photo", "Scene", "Thing", "picture"]

Photo = Image.Image | np.ndarray | tuple[Image.Image | np.ndarray, str]
"""A picture alone (used as a ground), or with the name of what it shows (also used as an object)."""

_GROUND_SHARES = (0.24, 0.12, 0.09, 0.06, 0.06, 0.1, 0.11, 0.05, 0.05, 0.04, 0.04, 0.04)
_NATURAL: dict[str, tuple[tuple[str, ...], tuple[Rgb, Rgb]]] = {
    # kind -> colours an object on it must not have, the two colours it is made of
    "grass": (("green",), ((40, 98, 30), (96, 170, 62))),
    "sky": (("blue", "white"), ((96, 164, 232), (244, 248, 252))),
    "sand": (("yellow", "orange", "brown"), ((196, 164, 112), (238, 214, 166))),
    "water": (("blue",), ((24, 92, 158), (110, 182, 216))),
    "bricks": (("red", "brown", "orange"), ((158, 70, 52), (206, 196, 184))),
}
ALIKE: dict[str, tuple[str, ...]] = {
    # colours too close to tell apart as object and ground once light and noise are added
    "red": ("orange", "pink"),
    "orange": ("red", "yellow", "brown"),
    "yellow": ("orange", "white"),
    "pink": ("red", "white"),
    "brown": ("orange", "black", "red"),
    "black": ("brown",),
    "white": ("yellow", "pink", "gray"),
    "gray": ("white",),
    "purple": ("blue",),
    "blue": ("purple",),
    "green": (),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: names for words, numbers in pixels. `place` is (row, column) in thirds.

    `box` is (x0, y0, x1, y1) around the object as if nothing covered it. `photo` names what a
    photo object shows (then `shape` is "photo" and `colour` is empty).
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    place: tuple[int, int]
    box: tuple[float, float, float, float]
    facing: str | None = None
    photo: str | None = None


@dataclass(frozen=True, slots=True)
class Ground:
    """What lies behind. `colours` names one or two colours; empty for natural grounds and photos."""

    kind: str
    colours: tuple[str, ...]
    photo: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """A still picture and the truth about it.

    `pixels_HWC` uint8 RGB. `captions` are training wording, `held_out` the same facts in wording
    never used for training. `relation`: where the first thing is as seen from the second (left,
    right, above, below, inside). `same`: all things share shape and colour (a counting scene).
    `masks_KHW` bool, the visible pixels of each thing, only when asked for.
    """

    pixels_HWC: np.ndarray
    things: tuple[Thing, ...]
    ground: Ground
    relation: str | None
    same: bool
    captions: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    masks_KHW: np.ndarray | None = None


def check_palette(colours: Sequence[str], shapes: Sequence[str]) -> None:
    """Refuse names the world does not know, and too few colours for an object to differ from its ground."""
    unknown = [c for c in colours if c not in COLOURS] + [s for s in shapes if s not in SHAPES]
    if unknown:
        raise UsageError(
            f"The made world does not know {', '.join(unknown)}.",
            hint=f"Colours: {', '.join(COLOURS)}. Shapes: {', '.join(SHAPES)}.",
        )
    if len(set(colours)) < 3 or not shapes:
        raise UsageError(
            f"The made world needs three colours and a shape, got {len(set(colours))} and {len(shapes)}.",
            hint="A ground uses up to two colours, and an object needs another.",
        )


def split_photo(photo: Photo) -> tuple[Image.Image, str | None]:
    picture_, name = photo if isinstance(photo, tuple) else (photo, None)
    made = Image.fromarray(picture_) if isinstance(picture_, np.ndarray) else picture_
    return (made if made.mode == "RGB" else made.convert("RGB")), name


def roll_ground(
    dice: Dice, photos: Sequence[Photo] | None, colours: Sequence[str], kinds: Sequence[str] = GROUNDS
) -> tuple[Ground, draw.SceneryLook, tuple[str, ...]]:
    """A ground: its words, how to draw it, and the colours an object on it must not have."""
    place = (dice.draw(), dice.draw(), dice.uniform(0.45, 0.95))
    if photos and "photo" in kinds and dice.chance(0.15):
        image, name = split_photo(dice.pick(photos))
        blur = dice.uniform(0.8, 2.5)
        look = draw.SceneryLook("photo", ((0, 0, 0), (0, 0, 0)), 0, place, image, blur)
        return Ground("photo", (), name), look, ()
    shares = [share if kind in kinds else 0.0 for kind, share in zip(GROUNDS, _GROUND_SHARES)]
    at, kind = dice.draw() * sum(shares), "plain"
    for name, share in zip(GROUNDS, shares):
        at -= share
        if at < 0:
            kind = name
            break
    variant = dice.below(8)
    if kind in _NATURAL:
        avoid, (first, second) = _NATURAL[kind]
        shades = (_shade(first, dice), _shade(second, dice))
        return Ground(kind, ()), draw.SceneryLook(kind, shades, variant, place), avoid
    name = dice.pick(colours)
    colour = jitter(name, dice)
    if kind == "plain":
        return (
            Ground(kind, (name,)),
            draw.SceneryLook(kind, (colour, colour), 0, place),
            (name, *ALIKE[name]),
        )
    if kind == "gradient":
        other = dice.pick([c for c in colours if c != name])
        look = draw.SceneryLook(kind, (colour, jitter(other, dice)), variant, place)
        return Ground(kind, (name, other)), look, (name, other, *ALIKE[name], *ALIKE[other])
    second = trim(colour, dice, dice.uniform(0.3, 0.55))
    return (
        Ground(kind, (name,)),
        draw.SceneryLook(kind, (colour, second), variant, place),
        (name, *ALIKE[name]),
    )


def _shade(colour: Rgb, dice: Dice) -> Rgb:
    return mix(colour, (255, 255, 255) if dice.chance(0.5) else (0, 0, 0), dice.uniform(0, 0.18))


def trim(colour: Rgb, dice: Dice, share: float) -> Rgb:
    """A lighter or darker partner of the colour, for stripes, dots and checks."""
    light = sum(colour) / 3
    towards_white = light < 70 or (light < 190 and dice.chance(0.6))
    return mix(colour, (255, 255, 255) if towards_white else (0, 0, 0), share)


def roll_look(dice: Dice, shape: str, colour: str, texture: str) -> draw.Look:
    shade = jitter(colour, dice)
    place = (dice.draw(), dice.draw(), dice.uniform(0.2, 0.3))
    rim = trim(shade, dice, 0.75) if dice.chance(0.18) else None
    shadow = dice.uniform(0.1, 0.25) if dice.chance(0.15) else 0.0
    return draw.Look(
        shape, shade, trim(shade, dice, dice.uniform(0.55, 0.85)), texture, dice.below(8), place, rim, shadow
    )


def roll_angle(dice: Dice, shape: str) -> tuple[float, str | None]:
    """A turn that keeps the shape's name true, and an arrow's facing."""
    if shape == "photo":
        return 0.0, None
    limit = LARGEST_TURN[shape]
    turn = dice.uniform(-limit, limit)
    if shape != "arrow":
        return turn, None
    facing = dice.pick(tuple(FACINGS))
    return turn + FACINGS[facing], facing


def roll_texture(dice: Dice) -> str:
    return dice.pick(TEXTURES[1:]) if dice.chance(0.3) else "plain"


def in_thirds(x: float, y: float, size: int) -> tuple[int, int]:
    return min(2, max(0, int(3 * y / size))), min(2, max(0, int(3 * x / size)))


def _spread(dice: Dice, radii: Sequence[float], size: int) -> list[tuple[float, float]]:
    """Centres such that no two objects touch; tries again from scratch where one does not fit."""
    for _ in range(60):
        made: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(12):
                x, y = dice.uniform(radius, size - radius), dice.uniform(radius, size - radius)
                if all(math.hypot(x - u, y - v) > radius + r + 1 for (u, v), r in zip(made, radii)):
                    made.append((x, y))
                    break
            else:
                break
        if len(made) == len(radii):
            return made
    raise UsageError(f"{len(radii)} objects of radius {max(radii):.0f} do not fit in {size} pixels.")


def _pair_places(dice: Dice, first: float, second: float, link: str, size: int) -> list[tuple[float, float]]:
    """Centres of two objects of the given radii so that the first is `link` the second, plainly."""
    if link == "inside":
        x, y = dice.uniform(second, size - second), dice.uniform(second, size - second)
        slack = max(0.0, 0.45 * second - first)
        return [(x + dice.uniform(-slack, slack), y + dice.uniform(-slack, slack)), (x, y)]
    apart = dice.uniform(first + second + 1, size - first - second)
    start = dice.uniform(0, size - first - second - apart)
    near = start + (first if link in ("left", "above") else second)
    ends = (near, near + apart) if link in ("left", "above") else (near + apart, near)
    wide = max(first, second)
    across = dice.uniform(wide, size - wide)
    lean = min(0.22 * apart, across - wide, size - wide - across)
    lean = dice.uniform(-lean, lean)
    if link in ("left", "right"):
        return [(ends[0], across), (ends[1], across + lean)]
    return [(across, ends[0]), (across + lean, ends[1])]


def stamp(patch: Image.Image, left: int, top: int, size: int, level: int = 128) -> np.ndarray:
    """The pixels of a whole picture (bool HW) that a coverage patch fills at least by half."""
    made = np.zeros((size, size), dtype=bool)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + patch.width, size), min(top + patch.height, size)
    if x0 < x1 and y0 < y1:
        made[y0:y1, x0:x1] = np.asarray(patch)[y0 - top : y1 - top, x0 - left : x1 - left] >= level
    return made


def _in(value: float, size: int) -> float:
    return float(min(max(value, 0), size))


def _roll_sizes(dice: Dice, kind: str, count: int, relation: str | None) -> list[str]:
    """Size words that leave room for all: the more objects, the smaller."""
    if relation == "inside":
        return ["small", "large"]
    if kind == "one":
        return [dice.pick(("small", "medium", "large"))]
    if kind == "many":
        return [dice.pick(("small", "medium")) if count <= 3 else "small"] * count
    return [dice.pick(("small", "medium")) if k < 2 else "small" for k in range(count)]


_KINDS = (("one", 0.38), ("many", 0.22), ("relation", 0.24), ("mixed", 0.12), ("ground", 0.04))


def _roll_kind(dice: Dice) -> str:
    at = dice.draw()
    for kind, share in _KINDS:
        at -= share
        if at < 0:
            return kind
    return "one"


def picture(
    seed: int,
    index: int,
    *,
    size: int = 64,
    photos: Sequence[Photo] | None = None,
    captions: int = 3,
    masks: bool = False,
    colours: Sequence[str] = tuple(COLOURS),
    shapes: Sequence[str] = SHAPES,
) -> Scene:
    """One still scene, `size` by `size`, with `captions` training and as many held-out captions.

    The same (seed, index) and arguments give the same bytes; asking for masks changes nothing else.
    `photos` serve as grounds (blurred) and, where they carry a name, as objects.
    """
    check_palette(colours, shapes)
    dice = Dice(seed, index)
    ground, look, avoid = roll_ground(dice, photos, colours)
    palette = [colour for colour in colours if colour not in avoid] or [
        c for c in colours if c not in ground.colours
    ]
    named = [photo for photo in photos or () if isinstance(photo, tuple)]
    kind = _roll_kind(dice)
    if not palette:
        raise UsageError(
            "A scene needs more colours than its ground uses.", hint="Give at least three colours."
        )

    count, same, relation = 1, False, None
    if kind == "many":
        count, same = 2 + dice.below(4), True
    elif kind == "mixed":
        count = 3 + dice.below(2)
    elif kind == "relation":
        count, relation = 2, dice.pick(("left", "right", "above", "below", "left", "right", "inside"))
    elif kind == "ground":
        count = 0

    sizes = _roll_sizes(dice, kind, count, relation)
    radii = [dice.uniform(*SIZES[name]) * size for name in sizes]
    if same:
        radii = [radii[0]] * count
    if relation is not None:
        centres = _pair_places(dice, radii[0], radii[1], relation, size)
    else:
        centres = _spread(dice, radii, size)

    things: list[Thing] = []
    looks: list[draw.Look] = []
    kinds_left = dice.sample(shapes, min(count, len(shapes))) if not same else []
    first_shape, first_colour, texture = dice.pick(shapes), dice.pick(palette), roll_texture(dice)
    for k in range(count):
        shape = first_shape if same else kinds_left[k % len(kinds_left)]
        colour = first_colour if same else dice.pick(palette)
        if not same:
            texture = roll_texture(dice)
        name = None
        if relation == "inside":  # the outer one is a roomy shape, plain, in another colour
            if k == 1:
                shape = dice.pick(
                    [s for s in ("circle", "square", "hexagon", "ring") if s in shapes] or shapes
                )
                texture = "plain"
                others = [c for c in palette if c != things[0].colour and c not in ALIKE[things[0].colour]]
                colour = dice.pick(others or palette)
        elif named and not same and dice.chance(0.3):
            image, name = split_photo(dice.pick(named))
            shape, texture = "photo", "plain"
        angle, facing = roll_angle(dice, shape)
        x, y = centres[k]
        seen = roll_look(dice, shape, colour, texture)
        if name is not None:
            seen = draw.Look("photo", (0, 0, 0), (0, 0, 0), photo=image)
        looks.append(seen)
        box = (x - radii[k], y - radii[k], x + radii[k], y + radii[k])
        things.append(
            Thing(
                shape, "" if name else colour, sizes[k], texture, x, y, radii[k], angle,
                in_thirds(x, y, size), box, facing, name,
            )
        )  # fmt: skip

    canvas = draw.scenery(look, size)
    masks_KHW = np.zeros((count, size, size), dtype=bool) if masks else None
    for k in reversed(range(count)):  # the first thing is on top
        thing = things[k]
        patch, left, top = draw.paint(canvas, looks[k], thing.x, thing.y, thing.radius, thing.angle)
        bound = patch.getbbox()
        if bound is not None:
            x0, y0, x1, y1 = bound
            things[k] = replace(
                thing,
                box=(_in(left + x0, size), _in(top + y0, size), _in(left + x1, size), _in(top + y1, size)),
            )
        if masks_KHW is not None:
            mark = stamp(patch, left, top, size)
            masks_KHW &= ~mark
            masks_KHW[k] |= mark
    scene = Scene(
        draw.develop([canvas], draw.Camera.roll(dice))[0],
        tuple(things),
        ground,
        relation,
        same,
        masks_KHW=masks_KHW,
    )
    made = text.captions(scene, dice, captions)
    held_out = text.captions(scene, Dice(seed, index, 1), captions, "held-out") if captions else ()
    return replace(scene, captions=made, held_out=held_out)
