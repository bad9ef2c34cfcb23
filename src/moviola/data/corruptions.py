"""Fifteen ways in which a camera, the weather or a file spoils a picture, in five severities each.

In the manner of ImageNet-C (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261), written anew on Pillow
and NumPy: accuracies are not to be compared with published ones. Every parameter is in `CORRUPTIONS`.
Lengths are in pixels of a picture whose short side is 224 and are scaled with the picture's own, so that a
blur looks the same at every size. Noise is one draw a pixel and JPEG works on blocks of 8 pixels whatever
the size, and both vanish when a large picture is made small afterwards: corrupt a picture at the size at
which the model sees it.

Random numbers are a hash of (seed, id, name, severity): the same on every run and in any order.

Axis letters: H height, W width, P points of a kernel, K side of a kernel.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from moviola.data.hashing import hash_strings, hash_uint64
from moviola.media import on_white
from moviola.types import UsageError

Group = Literal["noise", "blur", "weather", "digital"]
Apply = Callable[[np.ndarray, tuple[float, ...], float, np.random.Generator], np.ndarray]
SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224  # the short side that the lengths are given for


@dataclass(frozen=True)
class Corruption:
    """`parameters[severity - 1]` has a value for each of `named`; `apply` takes pixels_HW3 from 0 to 1, them,
    the short side as a share of 224, and the random numbers.
    """

    group: Group
    named: tuple[str, ...]
    parameters: tuple[tuple[float, ...], ...]
    apply: Apply


def corruption_names(group: Group | None = None) -> tuple[str, ...]:
    """All names, or those of a group: noise, blur, weather, digital."""
    if group is not None and group not in get_args(Group):
        raise UsageError(f"There is no group {group!r}.", hint=f"Groups: {', '.join(get_args(Group))}.")
    return tuple(name for name, made in CORRUPTIONS.items() if group in (None, made.group))


def corrupt(picture: Image.Image, name: str, severity: int, *, seed: int = 0, id: str = "") -> Image.Image:
    """The picture, spoilt: RGB, of the same size; transparent parts are laid on white.

    `id` names the picture, so that two of one set get different noise.
    """
    if name not in CORRUPTIONS:
        raise UsageError(f"There is no corruption {name!r}.", hint=f"There are {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise UsageError(f"A severity is 1, 2, 3, 4 or 5, got {severity}.")
    made = CORRUPTIONS[name]
    pixels_HW3 = np.asarray(on_white(picture), np.float32) / 255
    scale = min(pixels_HW3.shape[:2]) / _SIDE
    spoilt_HW3 = made.apply(pixels_HW3, made.parameters[severity - 1], scale, _rng(seed, id, name, severity))
    return Image.fromarray(np.rint(spoilt_HW3.clip(0, 1) * 255).astype(np.uint8))


def _rng(seed: int, id: str, name: str, severity: int) -> np.random.Generator:
    import pyarrow as pa

    key, stream = hash_strings(pa.array([id, name], pa.string())).tolist()
    drawn = hash_uint64(seed, np.array([key], np.uint64), stream=stream + severity)
    return np.random.default_rng(int(drawn[0]))


# --------------------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------------------


def _gaussian_noise(
    x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator
) -> np.ndarray:
    return x + p[0] * rng.standard_normal(x.shape, np.float32)


def _shot_noise(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * p[0]).astype(np.float32) / p[0]


def _impulse_noise(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.random(x.shape, np.float32)
    return np.where(drawn < p[0] / 2, 0, np.where(drawn < p[0], 1, x))


# --------------------------------------------------------------------------------------------------
# Blur
# --------------------------------------------------------------------------------------------------


def _defocus_blur(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    at = np.linspace(-1, 1, 33)
    disc_P2 = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2)
    return _spread(x, disc_P2[np.hypot(*disc_P2.T) <= 1] * p[0] * scale)


def _motion_blur(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    return _streak(x, p[0] * scale, rng.uniform(0, np.pi))


def _zoom_blur(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    height, width = x.shape[:2]
    picture, zooms = _picture(x), np.linspace(1, p[0], 12)
    total = np.zeros_like(x)
    for zoom in zooms.tolist():
        left, top = width * (1 - 1 / zoom) / 2, height * (1 - 1 / zoom) / 2
        box = (left, top, width - left, height - top)
        shown = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
        total += np.asarray(shown, np.float32) / 255
    return total / len(zooms)


def _glass_blur(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Blurred, and every pixel taken from somewhere near, and blurred again."""
    soft = _gaussian(x, p[0] * scale)
    return _gaussian(_moved(soft, rng.uniform(-1, 1, (2, *x.shape[:2])) * p[1] * scale), p[0] * scale)


# --------------------------------------------------------------------------------------------------
# Weather
# --------------------------------------------------------------------------------------------------


def _fog(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """White light instead of the picture's, by the depth of a plasma cloud: x e^-d + 0.95 (1 - e^-d)."""
    plasma = np.zeros(x.shape[:2], np.float32)
    for octave in range(1, 8):
        plasma += p[1] ** -octave * _field(rng.random((2**octave + 1,) * 2, np.float32), x.shape[:2])
    plasma = (plasma - plasma.min()) / max(float(np.ptp(plasma)), 1e-6)
    through = np.exp(-p[0] * (0.5 + plasma))[..., None]
    return x * through + 0.95 * (1 - through)


def _snow(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """A greyer, paler picture with streaks of flakes in two directions before it."""
    share, flake, length, pale = p
    cells = [max(2, round(side / max(1.0, flake * scale))) for side in x.shape[:2]]
    flakes = np.zeros(x.shape[:2], np.float32)
    for _ in range(2):
        bright = _field((rng.random(cells, np.float32) < share / 2).astype(np.float32), x.shape[:2])
        flakes += _streak(bright[..., None], length * scale, rng.uniform(0.25, 0.75) * np.pi)[..., 0]
    grey = x.mean(-1, keepdims=True)
    return (1 - pale) * x + pale * np.maximum(x, 0.5 * grey + 0.5) + 1.5 * flakes[..., None]


def _brightness(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """More of the value of HSV, hue and saturation kept."""
    value = x.max(-1, keepdims=True)
    wanted = np.minimum(value + p[0], 1)
    return np.where(value > 0, x * (wanted / np.maximum(value, 1e-6)), wanted)


# --------------------------------------------------------------------------------------------------
# Digital
# --------------------------------------------------------------------------------------------------


def _contrast(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean((0, 1), keepdims=True)
    return mean + p[0] * (x - mean)


def _saturation(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    grey = x @ np.array([[0.299], [0.587], [0.114]], np.float32)
    return grey + p[0] * (x - grey)


def _elastic(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Every pixel from where a smooth random field points: waves of about p[1] pixels, p[0] high (RMS)."""
    cells = [max(2, round(side / (p[1] * scale)) + 1) for side in x.shape[:2]]
    fields = [_field(rng.standard_normal(cells, np.float32), x.shape[:2]) for _ in range(2)]
    field_2HW = np.stack([field / max(float(np.sqrt((field**2).mean())), 1e-6) for field in fields])
    return _moved(x, field_2HW * p[0] * scale)


def _pixelate(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    # small pictures keep cells larger than their pixels, or nothing would happen to them
    cell = (p[0] - 1) * scale + max(1.0, scale)
    height, width = x.shape[:2]
    small = _picture(x).resize((max(1, int(width / cell)), max(1, int(height / cell))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST), np.float32) / 255


def _jpeg(x: np.ndarray, p: tuple[float, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=int(p[0]))
    return np.asarray(Image.open(file), np.float32) / 255


# --------------------------------------------------------------------------------------------------
# What they are made of
# --------------------------------------------------------------------------------------------------


def _picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


def _field(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A coarse grid drawn out smoothly to `size` (height, width)."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC), np.float32)


def _streak(x: np.ndarray, length: float, angle: float) -> np.ndarray:
    along_P = np.linspace(-0.5, 0.5, 2 * int(length) + 9) * length
    return _spread(x, np.outer(along_P, [np.sin(angle), np.cos(angle)]))


def _gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    radius = int(np.ceil(3 * sigma)) + 1
    bell = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * max(sigma, 1e-3) ** 2))
    return _convolve(x, np.outer(bell, bell))


def _spread(x: np.ndarray, points_P2: np.ndarray) -> np.ndarray:
    """Every pixel spread evenly over points (down, right) around it, in parts of a pixel too."""
    radius = int(np.ceil(np.abs(points_P2).max())) + 1
    kernel_KK = np.zeros((2 * radius + 1,) * 2)
    whole_P2 = np.floor(points_P2).astype(int)
    part_P2 = points_P2 - whole_P2
    for down in (0, 1):
        for right in (0, 1):
            share_P2 = np.abs(1 - np.array([down, right]) - part_P2)
            row_P, column_P = whole_P2.T + radius + np.array([[down], [right]])
            np.add.at(kernel_KK, (row_P, column_P), share_P2.prod(1))
    return _convolve(x, kernel_KK)


def _convolve(x: np.ndarray, kernel_KK: np.ndarray) -> np.ndarray:
    """Each channel with a kernel that is made to add up to 1; the edge pixels go on beyond the edge."""
    height, width = x.shape[:2]
    radius = len(kernel_KK) // 2
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    size = padded.shape[:2]
    kernel = np.fft.rfft2(kernel_KK / kernel_KK.sum(), size)
    made = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * kernel[..., None], size, axes=(0, 1))
    # a circular convolution is right where the kernel does not reach over the edge: from 2 * radius on
    return made[2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width].astype(np.float32)


def _moved(x: np.ndarray, offset_2HW: np.ndarray) -> np.ndarray:
    """The picture's value at (down, right) pixels from each place, between pixels by bilinear weights."""
    height, width = x.shape[:2]
    rows = np.clip(np.arange(height)[:, None] + offset_2HW[0], 0, height - 1)
    columns = np.clip(np.arange(width) + offset_2HW[1], 0, width - 1)
    top, left = rows.astype(int), columns.astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    upper = x[top, left] * (1 - across) + x[top, right] * across
    lower = x[bottom, left] * (1 - across) + x[bottom, right] * across
    return upper * (1 - down) + lower * down


def _one(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian noise": Corruption(
        "noise", ("standard deviation",), _one(0.08, 0.12, 0.18, 0.26, 0.38), _gaussian_noise
    ),
    "shot noise": Corruption("noise", ("photons at white",), _one(60, 25, 12, 5, 3), _shot_noise),
    "impulse noise": Corruption(
        "noise", ("share of values",), _one(0.03, 0.06, 0.09, 0.17, 0.27), _impulse_noise
    ),
    "defocus blur": Corruption("blur", ("radius",), _one(3, 4, 6, 8, 10), _defocus_blur),
    "glass blur": Corruption(
        "blur", ("sigma", "reach"), ((0.7, 2), (0.9, 3), (1.1, 4.5), (1.3, 6), (1.6, 8)), _glass_blur
    ),
    "motion blur": Corruption("blur", ("length",), _one(9, 14, 20, 28, 38), _motion_blur),
    "zoom blur": Corruption("blur", ("largest zoom",), _one(1.11, 1.16, 1.21, 1.26, 1.33), _zoom_blur),
    "snow": Corruption(
        "weather",
        ("share of cells", "flake", "streak", "paleness"),
        (
            (0.03, 2.5, 7, 0.2),
            (0.05, 2.5, 8, 0.35),
            (0.07, 3, 10, 0.45),
            (0.1, 3, 11, 0.55),
            (0.14, 3, 12, 0.65),
        ),
        _snow,
    ),
    "fog": Corruption(
        "weather", ("depth", "decay"), ((0.5, 2), (0.75, 2), (1.0, 1.8), (1.35, 1.7), (1.8, 1.6)), _fog
    ),
    "brightness": Corruption("weather", ("added value",), _one(0.1, 0.2, 0.3, 0.4, 0.5), _brightness),
    "contrast": Corruption("digital", ("factor",), _one(0.4, 0.3, 0.2, 0.1, 0.05), _contrast),
    "saturation": Corruption("digital", ("factor",), _one(1.6, 2.2, 3, 5, 10), _saturation),
    "elastic": Corruption(
        "digital", ("height", "wave"), ((1.5, 24), (2.2, 24), (3, 24), (4, 24), (5, 24)), _elastic
    ),
    "pixelate": Corruption("digital", ("cell",), _one(1.5, 2, 2.75, 3.75, 5), _pixelate),
    "jpeg": Corruption("digital", ("quality",), _one(25, 18, 15, 10, 7), _jpeg),
}
"""By name; parameters from severity 1 to 5."""
