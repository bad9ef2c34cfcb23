"""A task that differs from what a small CLIP was trained on in its looks and in its words.

The CLIP learns 36 things, a colour and a shape, from clear pictures and texts such as "photo of a red star".
The task shows them in haze and calls them "star red". Half of the things, as on a chess board of colours
and shapes, are labelled for it (`BASE`); the others (`NEW`) are only met when it is measured. What is learned
about the haze and the wording, and not about the things, serves both.

The pictures are the long-tailed world's. Axis letters: N pictures, C classes, S side in pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data import long_tail
from moviola.data.long_tail import COLOURS, SHAPES
from moviola.metrics.classification import topk_accuracy
from moviola.types import Batch

SIDE, CONTEXT_LENGTH, KINDS = long_tail.SIDE, 14, 6  # of colours, and of shapes
END = long_tail.vocabulary_size() - 1
START = END + 1
FORMS = ("photo of a {}", "picture of a {}", "a {}", "my {}")
"""Texts that the CLIP is trained on; the first is the task's prompt."""
HAZE = (0.6, 80.0)  # what is left of a pixel's value, and what is added
_THINGS = [(colour, shape) for colour in range(KINDS) for shape in range(KINDS)]
BASE = np.array([n for n, (colour, shape) in enumerate(_THINGS) if (colour + shape) % 2 == 0])
NEW = np.array([n for n, (colour, shape) in enumerate(_THINGS) if (colour + shape) % 2])


def names(*, reworded: bool) -> list[str]:
    """What each thing is called: "red star", or "star red"."""
    told = [(COLOURS[colour], SHAPES[shape]) for colour, shape in _THINGS]
    return [" ".join(pair[::-1] if reworded else pair) for pair in told]


def prompts(form: str = FORMS[0], *, reworded: bool = False) -> Tensor:
    """tokens_CL of all things in a form."""
    return tokens([form.format(name) for name in names(reworded=reworded)])


def tokens(texts: Sequence[str]) -> Tensor:
    """tokens_NL int64: a start token, a number a word, an end token, zeros."""
    words_NL = torch.from_numpy(long_tail.tokens(texts))
    return F.pad(words_NL, (1, 0), value=START)[:, :CONTEXT_LENGTH]


def pictures(seed: int, per_class: int, *, hazy: bool = False) -> tuple[Tensor, Tensor]:
    """As many of every thing: image_NCSS from -1 to 1 and label_N. Each seed draws other pictures."""
    pixels_NSS3, class_N = long_tail.even_pictures(seed, per_class)
    numbers_C = np.array([colour * len(SHAPES) + shape for colour, shape in _THINGS])
    kept = np.isin(class_N, numbers_C)
    pixels_NSS3 = pixels_NSS3[kept]
    if hazy:
        left, added = HAZE
        pixels_NSS3 = np.rint(left * pixels_NSS3.astype(np.float32) + added).clip(0, 255).astype(np.uint8)
    label_N = np.searchsorted(numbers_C, class_N[kept])
    return long_tail.pixels(pixels_NSS3), torch.from_numpy(label_N)


class Labelled:
    """Pictures and the numbers of their classes. Implements `moviola.training.loop.TrainingData`."""

    def __init__(self, image_NCSS: Tensor, label_N: Tensor) -> None:
        self.image_NCSS, self.label_N = image_NCSS, label_N

    def __len__(self) -> int:
        return len(self.label_N)

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> Batch:
        return {"image": self.image_NCSS[rows], "label": self.label_N[rows]}


def of_classes(image_NCSS: Tensor, label_N: Tensor, classes_C: np.ndarray) -> Labelled:
    """Those of some classes, numbered along `classes_C` (rising)."""
    kept_N = torch.isin(label_N, torch.from_numpy(classes_C))
    return Labelled(image_NCSS[kept_N], torch.searchsorted(torch.from_numpy(classes_C), label_N[kept_N]))


def small_clip(seed: int) -> CLIP:
    """An untrained CLIP for these pictures and words: a convolutional stem, two layers a tower."""
    vision = VitConfig(SIDE, 8, width=64, layers=2, heads=4, stem=((16, 0), (32, 0), (64, 0)))
    text = TextConfig(CONTEXT_LENGTH, START + 1, width=64, layers=2, heads=4, eot_id=END)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(ClipConfig(64, vision, text))


@torch.no_grad()
def measure(model: torch.nn.Module, seed: int, *, per_class: int = 40) -> dict[str, float]:
    """Top-1 in percent among the base and among the new things of the task, and their harmonic mean."""
    towers, tokens_CL = cast(Any, model), prompts(reworded=True)
    image_NCSS, label_N = pictures(seed, per_class, hazy=True)
    figures = {}
    for name, classes_C in (("base", BASE), ("new", NEW)):
        test = of_classes(image_NCSS, label_N, classes_C)
        image_ND, text_CD = towers.encode_image(test.image_NCSS), towers.encode_text(tokens_CL[classes_C])
        scores_NC = towers.score(text_CD, image_ND).T
        figures[name] = topk_accuracy(scores_NC.numpy(), test.label_N.numpy(), (1,))["top1"]
    return {"harmonic mean": harmonic_mean(figures["base"], figures["new"]), **figures}


def harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
