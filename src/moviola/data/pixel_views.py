"""Further views of a picture for consistency objectives: MoCo v3's strong view and AugMix.

Each is made from the picture itself (not from pixels that were cropped or normalised before) and from
random numbers of its own. Lengths are in pixels of a view whose short side is 224 and are scaled with
the view's own.

MoCo v3 (Chen, Xie, He, ICCV 2021, arXiv 2104.02057): a random crop, colours shaken, sometimes grey, a blur
and a mirror. AugMix (Hendrycks et al., ICLR 2020, arXiv 1912.02781): a random crop and mirror, of which
chains of operations are mixed, and the mixture is mixed with the crop again.

The operations are those of `moviola.data.augmentations`, which differ from the authors' in this: what is
moved in is CLIP's mean colour, not black; shears turn about the picture's middle, not its corner; crops
are scaled bicubically. Rotations and translations are not rounded to whole degrees and pixels.

Axis letters: H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter

from moviola.data.augmentations import Augment, Augmentation, apply, draw
from moviola.media import on_white
from moviola.types import UsageError

PixelView = Callable[[Image.Image, tuple[int, int], np.random.Generator], np.ndarray]
"""view(picture, size (H, W), rng) -> uint8 pixels_HWC of an upright picture of any size."""

MIXED = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""AugMix's operations: none of those that ImageNet-C tests."""
_SIDE = 224  # the short side of the view that blurs are given for


def moco(
    picture: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    jitter_chance: float = 0.8,
    grey_chance: float = 0.2,
    blur: tuple[float, float] = (0.1, 2.0),
) -> np.ndarray:
    """MoCo v3's strong view: uint8 pixels_HWC.

    `jitter`: by how much brightness, contrast and saturation (factors about 1) and hue (a share of the
    circle) may change, in any order. `blur`: the least and largest standard deviation.
    """
    view = _crop(picture, size, rng, area)
    if rng.random() < jitter_chance:
        factors = rng.uniform(-1, 1, 4) * jitter
        for kind in rng.permutation(4):
            if kind == 3:
                view = _turn_hue(view, factors[3])
            else:
                name = ("brightness", "contrast", "colour")[kind]
                view = _operate(view, name, 1 + factors[kind])
    if rng.random() < grey_chance:
        view = view.convert("L").convert("RGB")
    sigma = rng.uniform(*blur) * min(size) / _SIDE
    return np.array(view.filter(ImageFilter.GaussianBlur(sigma)))


def augmix(
    picture: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    severity: int = 1,
    chains: int = 3,
    longest: int = 3,
) -> np.ndarray:
    """AugMix of a random crop: uint8 pixels_HWC.

    Each of `chains` applies 1 to `longest` operations; their weights are Dirichlet(1), and the share of the
    plain crop is Beta(1, 1). `severity` is from 1 to 10.
    """
    if not 1 <= severity <= 10 or chains < 1 or longest < 1:
        raise UsageError(
            f"AugMix needs a severity from 1 to 10 and chains of at least one operation, got {severity}, "
            f"{chains} chains and {longest} operations."
        )
    crop = _crop(picture, size, rng, area)
    plain_HWC = np.asarray(crop, np.float32)
    mixed_HWC = np.zeros_like(plain_HWC)
    for weight in rng.dirichlet(np.ones(chains)):
        chain = crop
        for _ in range(rng.integers(1, longest + 1)):
            name = MIXED[rng.integers(len(MIXED))]
            chain = _operate(chain, name, _strength(name, rng.uniform(0.1, severity) / 10, rng))
        mixed_HWC += np.float32(weight) * np.asarray(chain, np.float32)
    share = np.float32(rng.beta(1.0, 1.0))
    return np.rint(share * plain_HWC + (1 - share) * mixed_HWC).astype(np.uint8)


VIEWS: Mapping[str, PixelView] = {"moco": moco, "augmix": augmix}


def _crop(
    picture: Image.Image, size: tuple[int, int], rng: np.random.Generator, area: tuple[float, float]
) -> Image.Image:
    """A random crop at `size`, its ratio within a third of the view's, mirrored every second time."""
    height, width = size
    shape = width / height
    law = Augment(area=area, ratio=(shape * 3 / 4, shape * 4 / 3), operations=0, mirror=0.5)
    seed = int(rng.integers(1 << 62))
    (drawn,) = draw(seed, "", (picture.height, picture.width), 1, law)
    return apply(drawn, on_white(picture), size)


def _operate(picture: Image.Image, name: str, value: float) -> Image.Image:
    """One operation of `augmentations` on the whole picture."""
    return apply(Augmentation(0.0, 0.0, 1.0, 1.0, operations=((name, value),)), picture)


def _strength(name: str, level: float, rng: np.random.Generator) -> float:
    """AugMix's ranges at a level from 0 to 1, in the units of `augmentations`."""
    if name == "posterize":
        return 4 - int(4 * level)  # bits that stay: never more than four
    if name == "solarize":
        return 256 - int(256 * level)
    most = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 1 / 3, "translate_y": 1 / 3}
    sign = -1 if rng.random() < 0.5 else 1
    return sign * level * most.get(name, 0.0)


def _turn_hue(picture: Image.Image, share: float) -> Image.Image:
    """Every hue further along the colour circle by `share` of it."""
    pixels_HWC = np.array(picture.convert("HSV"))
    pixels_HWC[..., 0] += np.uint8(round(share * 255) % 256)
    return Image.fromarray(pixels_HWC, "HSV").convert("RGB")
