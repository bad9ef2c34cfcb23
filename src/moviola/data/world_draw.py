"""Drawing for the made world: shapes, textures, grounds and the camera's faults.

Everything is a pure function of its arguments.
Coordinates are continuous pixels: pixel `i` covers `[i, i + 1)`. Pictures are uint8 RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from moviola.data.world_shapes import OUTLINES, Dice, Rgb

__all__ = ["GROUNDS", "TEXTURES", "Camera", "Look", "SceneryLook", "develop", "paint", "scenery"]


# --------------------------------------------------------------------------------------------------
# Textures: a small bank of grey fields, cropped and scaled for every use
# --------------------------------------------------------------------------------------------------

TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
GROUNDS: tuple[str, ...] = (
    "plain",
    "gradient",
    "striped",
    "dotted",
    "checkered",
    "noisy",
    "cloudy",
    "grass",
    "sky",
    "sand",
    "water",
    "bricks",
    "photo",
)
_FIELD = 192
_VARIANTS = 8


def _smooth_noise(rng: np.random.Generator, reach_y: float, reach_x: float) -> np.ndarray:
    """Noise with a wanted correlation length per axis, zero mean, unit spread, periodic."""
    fy = np.fft.fftfreq(_FIELD)[:, None] * reach_y
    fx = np.fft.fftfreq(_FIELD)[None, :] * reach_x
    spectrum = np.fft.fft2(rng.standard_normal((_FIELD, _FIELD))) * np.exp(
        -2 * (np.pi**2) * (fy**2 + fx**2) / 4
    )
    noise = np.fft.ifft2(spectrum).real
    return (noise - noise.mean()) / (noise.std() + 1e-9)


@lru_cache(maxsize=256)
def _field(kind: str, variant: int) -> Image.Image:
    """A grey picture, 0 for the first colour and 255 for the second; the same in every process."""
    rng = np.random.Generator(np.random.Philox(key=[sum(map(ord, kind)), variant]))
    y, x = np.mgrid[0:_FIELD, 0:_FIELD] / _FIELD
    angle = np.pi * variant / _VARIANTS
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    if kind == "striped":
        field = 0.5 + 3 * np.sin(2 * np.pi * 12 * along)
    elif kind == "dotted":
        field = 0.5 + 5 * (np.cos(2 * np.pi * 11 * along) + np.cos(2 * np.pi * 11 * across) - 0.75)
    elif kind == "checkered":
        slant = 0.25 * angle
        u, v = x * np.cos(slant) + y * np.sin(slant), -x * np.sin(slant) + y * np.cos(slant)
        field = 0.5 + 5 * np.sin(2 * np.pi * 6.5 * u) * np.sin(2 * np.pi * 6.5 * v)
    elif kind == "gradient":
        turn = 2 * angle
        ramp = x * np.cos(turn) + y * np.sin(turn)
        field = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    elif kind == "noisy":
        field = 0.5 + 0.28 * _smooth_noise(rng, 1 + 0.4 * variant, 1 + 0.4 * variant)
    elif kind in ("cloudy", "photo"):
        field = 0.5 + 0.25 * (_smooth_noise(rng, 40, 40) + 0.5 * _smooth_noise(rng, 14, 14))
    elif kind == "grass":
        field = 0.5 + 0.27 * _smooth_noise(rng, 16, 1.8) + 0.1 * _smooth_noise(rng, 60, 60)
    elif kind == "sky":
        field = (0.35 * _smooth_noise(rng, 14, 34) - 0.05) * (0.4 + y) + 0.2 * y
    elif kind == "sand":
        field = 0.5 + 0.16 * _smooth_noise(rng, 1.6, 1.6) + 0.16 * _smooth_noise(rng, 20, 60)
    elif kind == "water":
        field = 0.5 + 0.5 * np.sin(2 * np.pi * 10 * y + 1.3 * _smooth_noise(rng, 14, 40)) - 0.2
    else:  # bricks: mortar between rows, and between bricks, every other row shifted by half a brick
        row = np.floor(y * 14)
        joint = np.abs((y * 14) % 1 - 0.5) > 0.4
        upright = np.abs((x * 7 + 0.5 * (row % 2)) % 1 - 0.5) > 0.45
        field = 0.9 * (joint | upright) + 0.08 * _smooth_noise(rng, 2, 2)
    return Image.fromarray((255 * np.clip(field, 0, 1)).astype(np.uint8))


def _crop(kind: str, variant: int, place: tuple[float, float, float], side: tuple[int, int]) -> Image.Image:
    """The part of a field at `place` (left, top, side as shares of the field), at `side` pixels."""
    left, top, extent = (share * _FIELD for share in place)
    left, top = left % (_FIELD - extent), top % (_FIELD - extent)
    box = (left, top, left + extent, top + extent)
    return _field(kind, variant).resize(side, Image.Resampling.BILINEAR, box=box)


@dataclass(frozen=True, slots=True)
class SceneryLook:
    """A ground as drawn: its kind, its two colours and which part of which field."""

    kind: str
    colours: tuple[Rgb, Rgb]
    variant: int
    place: tuple[float, float, float]
    photo: Image.Image | None = None
    blur: float = 0.0


def scenery(look: SceneryLook, size: int, shift: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Draw a ground; `shift` moves the view by shares of the field (a camera that drifts)."""
    if look.photo is not None:
        left, top, extent = look.place
        width, height = look.photo.size
        side = extent * min(width, height)
        left = min(max(left + shift[0], 0.0), 1.0) * (width - side)
        top = min(max(top + shift[1], 0.0), 1.0) * (height - side)
        made = look.photo.resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        return made.filter(ImageFilter.GaussianBlur(look.blur * size / 64)) if look.blur else made
    first, second = look.colours
    made = Image.new("RGB", (size, size), first)
    if look.kind != "plain":
        left, top, extent = look.place
        place = (left + shift[0], top + shift[1], extent)
        made.paste(second, (0, 0, size, size), _crop(look.kind, look.variant, place, (size, size)))
    return made


# --------------------------------------------------------------------------------------------------
# Objects
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """An object as drawn. `trim` is drawn in the texture, `rim` around the edge (None: no rim)."""

    shape: str
    colour: Rgb
    trim: Rgb
    texture: str = "plain"
    variant: int = 0
    place: tuple[float, float, float] = (0.0, 0.0, 0.3)
    rim: Rgb | None = None
    shadow: float = 0.0
    photo: Image.Image | None = None


def _stencil(shape: str, radius: float, angle: float, x: float, y: float) -> tuple[Image.Image, int, int]:
    """The coverage (0 to 255) of a shape on its own small patch, and the patch's corner."""
    left, top = math.floor(x - radius - 1), math.floor(y - radius - 1)
    side = math.ceil(2 * radius) + 3
    fine = 4 if radius < 30 else 2
    patch = Image.new("L", (side * fine, side * fine), 0)
    pen = ImageDraw.Draw(patch)
    outline, hole, _ = OUTLINES[shape]
    cos, sin = math.cos(math.radians(angle)) * radius * fine, math.sin(math.radians(angle)) * radius * fine
    turn = np.array([[cos, sin], [-sin, cos]])
    centre = np.array([(x - left) * fine - 0.5, (y - top) * fine - 0.5])
    pen.polygon((outline @ turn + centre).ravel().tolist(), fill=255)
    if hole is not None:
        pen.polygon((hole @ turn + centre).ravel().tolist(), fill=0)
    return patch.reduce(fine), left, top


def _photo_stencil(radius: float, x: float, y: float) -> tuple[Image.Image, int, int]:
    """Photos are squares on whole pixels."""
    half = 0.8 * radius
    side = max(2, round(2 * half))
    return Image.new("L", (side, side), 255), round(x - half), round(y - half)


def paint(
    canvas: Image.Image, look: Look, x: float, y: float, radius: float, angle: float, opacity: float = 1.0
) -> tuple[Image.Image, int, int]:
    """Draw one object onto `canvas` in place; returns its coverage patch and the patch's corner."""
    if look.photo is not None:
        mask, left, top = _photo_stencil(radius, x, y)
    else:
        mask, left, top = _stencil(look.shape, radius, angle, x, y)
    if opacity < 1:
        level = max(0.0, opacity)
        mask = mask.point([int(level * v) for v in range(256)])
    if look.shadow:
        reach = max(1, round(look.shadow * radius))
        canvas.paste((0, 0, 0), (left + reach, top + reach), mask.point(_SHADE))
    if look.photo is not None:
        canvas.paste(
            look.photo.resize(mask.size, Image.Resampling.BILINEAR, reducing_gap=2.0), (left, top), mask
        )
        return mask, left, top
    canvas.paste(look.rim or look.colour, (left, top), mask)
    inner = mask
    if look.rim is not None:
        inner, inner_left, inner_top = _stencil(look.shape, radius * 0.84, angle, x, y)
        if opacity < 1:
            inner = inner.point([int(max(0.0, opacity) * v) for v in range(256)])
        canvas.paste(look.colour, (inner_left, inner_top), inner)
    else:
        inner_left, inner_top = left, top
    if look.texture != "plain":
        grain = _crop(look.texture, look.variant, look.place, inner.size)
        if angle % 360:
            grain = grain.rotate(-angle, Image.Resampling.BILINEAR)
        canvas.paste(look.trim, (inner_left, inner_top), ImageChops.multiply(inner, grain))
    return mask, left, top


_SHADE = [int(0.35 * v) for v in range(256)]


# --------------------------------------------------------------------------------------------------
# The camera: light, noise and blur, so that nobody learns the renderer
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Camera:
    gain: float = 1.0
    offset: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    light: float = 0.0
    light_from: int = 0
    grain_at: float = 0.0

    @classmethod
    def roll(cls, dice: Dice) -> Camera:
        return cls(
            gain=dice.uniform(0.82, 1.1),
            offset=dice.uniform(-8, 14),
            noise=dice.uniform(0, 9) if dice.chance(0.7) else 0.0,
            blur=dice.uniform(0.3, 0.8) if dice.chance(0.3) else 0.0,
            light=dice.uniform(0.05, 0.3) if dice.chance(0.35) else 0.0,
            light_from=dice.below(_VARIANTS),
            grain_at=dice.draw(),
        )


_GRAIN = 1 << 20


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[7, 7])).standard_normal(_GRAIN, dtype=np.float32)


@lru_cache(maxsize=64)
def _light(size: int, variant: int) -> np.ndarray:
    ramp = np.asarray(_field("gradient", variant).resize((size, size)), dtype=np.float32) / 255 - 0.5
    return ramp[:, :, None]


def develop(frames: Sequence[Image.Image], camera: Camera) -> np.ndarray:
    """Pictures of one size as uint8 THWC, through the camera's light, noise and blur."""
    if camera.blur:
        soft = ImageFilter.GaussianBlur(camera.blur * frames[0].width / 64)
        frames = [frame.filter(soft) for frame in frames]
    size = frames[0].width
    made = np.empty((len(frames), frames[0].height, size, 3), dtype=np.uint8)
    gain: float | np.ndarray = camera.gain
    if camera.light:
        gain = camera.gain * (1 + camera.light * _light(size, camera.light_from))
    count = made[0].size
    room = _GRAIN - count
    for i, frame in enumerate(frames):
        pixels = np.asarray(frame, dtype=np.float32) * gain
        pixels += camera.offset
        if camera.noise:
            start = int((camera.grain_at + 0.618034 * i) % 1 * room) if room > 0 else 0
            grain = _grain()[start : start + count]
            if grain.size < count:
                grain = np.resize(grain, count)
            pixels += (grain * camera.noise).reshape(pixels.shape)
        made[i] = np.clip(pixels, 0, 255, out=pixels)
    return made
