"""Still lifes drawn in two manners, whose words for shapes differ: no one context before a name fits both.

A picture is plain or striped. In striped ones each shape goes by its neighbour's name: "circle" is what a
plain picture calls a square, and the other way round. A text may say which manner it speaks of ("a picture at
glow a red circle", "... at shade ..."), or not ("a picture with a red circle"); those of the task do not. So
the right context depends on the picture, and on something of it that no class tells.

The light is warm or cool, by any amount. In the task's pictures it goes with the manner, warm with plain and
cool with striped; where it is `turned`, the other way round: another domain, in which whoever took the light
for the manner errs. Half of the 40 things, as on a chess board of colours and pairs of shapes, are `BASE`,
the others `NEW`.

Axis letters: N pictures, S side in pixels, L tokens, C classes, F forms of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data import still_lifes
from moviola.data.pixel_views import VIEWS
from moviola.data.reworded import harmonic_mean
from moviola.data.still_lifes import CONTEXT_LENGTH, END_OF_TEXT, SHAPES, SIDE, StillLifes, thing_name
from moviola.metrics.classification import topk_accuracy

Light = Literal["any", "bound", "turned"]
COUNT = 40  # things: four colours by ten shapes
BASE, NEW = (
    np.array([n for n in range(COUNT) if (n // len(SHAPES) + n % len(SHAPES) // 2) % 2 == part])
    for part in (0, 1)
)
FORMS = ("a picture with a {}", "a picture at glow a {}", "a picture at shade a {}")
"""What is said without a manner, of plain and of striped pictures."""
_STRIPES, _TINT = 0.3, 0.3  # how much darker stripes are; by how much red and blue change in full light


@dataclass(frozen=True)
class Manners:
    """pixels_NSS3 uint8; name_N, the thing's number as the picture's manner calls it; striped_N 0 or 1."""

    pixels_NSS3: np.ndarray
    name_N: np.ndarray
    striped_N: np.ndarray

    def __len__(self) -> int:
        return len(self.name_N)

    def some(self, names: Sequence[int] | np.ndarray, each: int) -> Manners:
        """The first `each` pictures of every name, in the order of the names."""
        rows = np.concatenate([np.flatnonzero(self.name_N == name)[:each] for name in names])
        return Manners(self.pixels_NSS3[rows], self.name_N[rows], self.striped_N[rows])

    @property
    def images_NCSS(self) -> Tensor:
        """As an image tower takes them."""
        return as_images(self.pixels_NSS3)


def as_images(pixels_NSS3: np.ndarray) -> Tensor:
    """images_NCSS float32 from -1 to 1."""
    return torch.from_numpy(pixels_NSS3).permute(0, 3, 1, 2) / 127.5 - 1


def pictures(seed: int, count: int, light: Light, *, split: int) -> Manners:
    """About `count` pictures; another `split` of a seed gives others by the same law."""
    made = still_lifes.still_lifes(seed, 2 * count, together=0.0, split=split)
    rows = np.flatnonzero(made.thing_N < COUNT)
    made = StillLifes(made.pixels_NSS3[rows], made.thing_N[rows], made.faint_NF[rows])
    rng = np.random.default_rng([seed, split, 9])
    striped_N = rng.integers(2, size=len(rows))
    warmth_N = rng.uniform(-1, 1, len(rows))
    if light != "any":
        sign = 1 if light == "bound" else -1
        warmth_N = sign * (1 - 2 * striped_N) * rng.uniform(0.3, 1, len(rows))
    across_SS = np.add.outer(np.arange(SIDE), np.arange(SIDE))
    shift_N = rng.integers(6, size=len(rows))
    stripes_NSS = (across_SS + shift_N[:, None, None]) % 6 < 3
    shade_NSS = 1 - _STRIPES * striped_N[:, None, None] * stripes_NSS
    gain_N3 = 1 + _TINT * warmth_N[:, None] * np.array([1, 0, -1])
    pixels_NSS3 = made.pixels_NSS3 * shade_NSS[..., None] * gain_N3[:, None, None, :]
    pixels_NSS3 = np.clip(np.rint(pixels_NSS3), 0, 255).astype(np.uint8)
    # neighbours are the even and the odd shape of a pair
    return Manners(pixels_NSS3, made.thing_N ^ striped_N, striped_N)


def prompts(form: str, names: Sequence[int] | np.ndarray) -> Tensor:
    """tokens_CL of things in a form."""
    return still_lifes.tokens([form.format(thing_name(int(name))) for name in names])


def told(made: Manners, seed: int, *, manner: float) -> Tensor:
    """text_NL of each picture, its manner said with a chance of `manner`."""
    said_N = np.random.default_rng([seed, 3]).random(len(made)) < manner
    forms_N = said_N * (1 + made.striped_N)
    texts_FCL = torch.stack([prompts(form, range(COUNT)) for form in FORMS])
    return texts_FCL[torch.from_numpy(forms_N), torch.from_numpy(made.name_N)]


def small_clip(seed: int) -> CLIP:
    """An untrained CLIP for these pictures and words: a convolutional stem, two layers a tower."""
    vision = VitConfig(SIDE, 8, width=64, layers=2, heads=2, stem=((16, 0), (32, 0), (64, 0)))
    words = still_lifes.vocabulary_size()
    text = TextConfig(CONTEXT_LENGTH, words, width=48, layers=2, heads=2, eot_id=END_OF_TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(ClipConfig(48, vision, text))


def _enough(each: int) -> int:
    """Pictures among which every name comes `each` times: twice as many on average, and some more."""
    return 2 * COUNT * each + 20 * COUNT


def task(seed: int, *, shots: int = 16) -> dict[str, Tensor]:
    """`shots` labelled pictures of each base class with both views of each: image, moco, augmix and label."""
    made = pictures(seed, _enough(shots), "bound", split=1).some(BASE, shots)
    rng = np.random.default_rng([seed, 4])
    batch = {"image": made.images_NCSS, "label": torch.from_numpy(np.searchsorted(BASE, made.name_N))}
    for name, view in VIEWS.items():
        seen = [view(Image.fromarray(pixels), (SIDE, SIDE), rng) for pixels in made.pixels_NSS3]
        batch[name] = as_images(np.stack(seen))
    return batch


def measure(
    classify: Callable[[Tensor, Tensor], Tensor], seed: int, *, light: Light, each: int = 20
) -> dict[str, float]:
    """Top-1 in percent among the base and among the new classes, and their harmonic mean.

    classify(tokens_CL, images_NCSS) -> logits_NC; the tokens name no manner.
    """
    made, figures = pictures(seed, _enough(each), light, split=2), {}
    for name, classes in (("base", BASE), ("new", NEW)):
        some = made.some(classes, each)
        with torch.no_grad():
            logits_NC = classify(prompts(FORMS[0], classes), some.images_NCSS)
        label_N = np.searchsorted(classes, some.name_N)
        figures[name] = topk_accuracy(logits_NC.numpy(), label_N, (1,))["top1"]
    return {"harmonic mean": harmonic_mean(figures["base"], figures["new"]), **figures}
