"""A made web whose captions are often another picture's, and its reinforcement by a teacher.

The pictures are those of the long-tailed world, of 30 of its classes and all equally frequent. A share of
the pairs carries the caption of another row, and a quarter of all captions names only the shape or
only the colour. Every picture is stored in a few augmented views, as a reinforced set has them.

Axis letters: N pairs, A views a picture, S side in pixels, L tokens, K synthetic captions, C classes,
T sentences a class, D the teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.data import long_tail as world
from moviola.training.augment import random_resized_crop
from moviola.types import UsageError

COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross")
CLASSES = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SIZES = (world.SIDE, world.CONTEXT_LENGTH, world.vocabulary_size())
"""What towers must fit: pixels a side, tokens a text, tokens there are."""
_ONLY_SHAPE, _ONLY_COLOUR = 0.15, 0.10
_SENTENCES = ("picture of a {it}", "photo of a {it}", "my {it}", "a {it}: best price ever")
_CHOSEN = np.array([CLASSES.index(c) if c in CLASSES else -1 for c in world.CLASSES])


@dataclass(frozen=True)
class NoisyPairs:
    """views_NA3SS float32 as an image tower takes them, text_NL tokens."""

    views_NA3SS: Tensor
    text_NL: Tensor


@dataclass(frozen=True)
class Reinforcement:
    """What a teacher adds: synthetic_NKL tokens, and its unit vectors of all views and captions."""

    synthetic_NKL: Tensor
    image_NAD: Tensor
    text_ND: Tensor
    synthetic_NKD: Tensor


def noisy_pairs(seed: int, count: int, *, mismatched: float, views: int) -> NoisyPairs:
    """`count` pairs, the share `mismatched` of which have the caption of another of them."""
    if not 0 <= mismatched <= 1 or views < 1:
        raise UsageError(f"Expected a share from 0 to 1 and at least one view, got {mismatched} and {views}.")
    pixels_N3SS, class_N = _pictures(seed, count)
    rng = np.random.default_rng([seed, 2])
    moved = rng.permutation(count)[: round(mismatched * count)]
    said_N = class_N.copy()
    said_N[moved] = class_N[np.roll(moved, 1)]
    rows_N = np.arange(count)
    crops = [
        random_resized_crop(
            pixels_N3SS, rows_N, seed=seed * views + v, size=world.SIDE, area=(0.6, 1.0), flip=0
        )
        for v in range(views)
    ]
    return NoisyPairs(torch.stack(crops, 1), torch.from_numpy(world.tokens(_captions(rng, said_N))))


def _pictures(seed: int, count: int) -> tuple[Tensor, np.ndarray]:
    """Pictures of the chosen classes with their class: (N, 3, S, S) and (N,)."""
    spare = 1.1 * len(world.CLASSES) / len(CLASSES)
    pool = world.long_tail(seed, int(spare * count) + 100, exponent=0.0, noise=0.0)
    class_N = _CHOSEN[pool.class_N]
    kept = np.flatnonzero(class_N >= 0)[:count]
    return world.pixels(pool.pixels_NSS3[kept]), class_N[kept]


def labelled(seed: int, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """New pictures (N, 3, S, S), their class (N,), and a prompt a class (C, L) to tell it by."""
    pixels_NSS3, class_N = world.even_pictures(seed, per_class)
    class_N = _CHOSEN[class_N]
    kept = class_N >= 0
    prompts = [f"picture of a {colour} {shape}" for colour, shape in CLASSES]
    made = world.pixels(pixels_NSS3[kept]), torch.from_numpy(class_N[kept])
    return *made, torch.from_numpy(world.tokens(prompts))


def _captions(rng: np.random.Generator, class_N: np.ndarray) -> list[str]:
    sentence_N, part_N = rng.integers(len(_SENTENCES), size=len(class_N)), rng.random(len(class_N))
    texts = []
    for label, sentence, part in zip(class_N.tolist(), sentence_N.tolist(), part_N.tolist(), strict=True):
        colour, shape = CLASSES[label]
        it = f"{colour} {shape}"
        if part < _ONLY_SHAPE:
            it = shape
        elif part < _ONLY_SHAPE + _ONLY_COLOUR:
            it = f"{colour} one"
        texts.append(_SENTENCES[sentence].format(it=it))
    return texts


def candidates() -> Tensor:
    """What the made captioner can say: sentences_CTL tokens, some for every class."""
    texts = [s.format(it=f"{colour} {shape}") for colour, shape in CLASSES for s in _SENTENCES]
    return torch.from_numpy(world.tokens(texts)).unflatten(0, (len(CLASSES), len(_SENTENCES)))


def reinforce(
    pairs: NoisyPairs,
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    *,
    captions: int = 2,
) -> Reinforcement:
    """Run the teacher once over every view and caption.

    The synthetic captions of a picture are the teacher's own: sentences of the class whose sentences are
    nearest to the mean of its views. The truth is not looked at.
    """
    image_NAD = _unit(pairs.views_NA3SS.flatten(0, 1), encode_image).unflatten(0, pairs.views_NA3SS.shape[:2])
    sentences_CTL = candidates()
    said_CTD = _unit(sentences_CTL.flatten(0, 1), encode_text).unflatten(0, sentences_CTL.shape[:2])
    class_N = (image_NAD.mean(1) @ said_CTD.mean(1).T).argmax(1)
    first_N = torch.arange(len(class_N)) % sentences_CTL.shape[1]
    which_NK = (first_N[:, None] + torch.arange(captions)) % sentences_CTL.shape[1]
    return Reinforcement(
        sentences_CTL[class_N[:, None], which_NK],
        image_NAD,
        _unit(pairs.text_NL, encode_text),
        said_CTD[class_N[:, None], which_NK],
    )


@torch.no_grad()
def _unit(inputs: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([F.normalize(encode(part), dim=-1) for part in inputs.split(512)])


def batches(
    pairs: NoisyPairs, added: Reinforcement | None, *, seed: int, size: int, steps: int
) -> Iterator[dict[str, Tensor]]:
    """Rows at random; of each one view, its caption and one synthetic caption, with the stored vectors.

    The same seed draws the same rows and views with and without a reinforcement.
    """
    generator = torch.Generator().manual_seed(seed)
    count, views = pairs.views_NA3SS.shape[:2]
    for _ in range(steps):
        rows = torch.randint(count, (size,), generator=generator)
        view = torch.randint(views, (size,), generator=generator)
        said = torch.randint(1 << 30, (size,), generator=generator)
        batch = {"image": pairs.views_NA3SS[rows, view], "text": pairs.text_NL[rows]}
        if added is not None:
            said %= added.synthetic_NKL.shape[1]
            batch |= {
                "synthetic": added.synthetic_NKL[rows, said],
                "teacher_image": added.image_NAD[rows, view],
                "teacher_text": added.text_ND[rows],
                "teacher_synthetic": added.synthetic_NKD[rows, said],
            }
        yield batch
