"""Pairs of 56 categories that nobody names to the learner, some with another picture's caption.

A picture shows a spot of one colour on a field of another, at any place, in any light, with grain and
two small squares of chance colours. Its category is the pair of colours. A caption speaks of the spot,
of the field or of both, and has three words for every colour, so that two captions of one category
seldom agree in a word. `noise` of the pairs have their captions dealt anew among themselves.

Axis letters: N pairs, S side in pixels, L tokens, C categories, D width of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.data.long_tail import pixels
from moviola.data.world_shapes import COLOURS
from moviola.metrics.classification import topk_accuracy
from moviola.metrics.clustering import adjusted_rand, purity
from moviola.parts.kmeans import kmeans

HUES = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
CATEGORIES = tuple((spot, field) for spot in HUES for field in HUES if spot != field)
SIDE, CONTEXT_LENGTH = 24, 8
_WORDS_A_HUE, _FILLERS, _TEACHER_WIDTH = 3, 6, 32
_SPOT, _FIELD = 1 + len(HUES) * _WORDS_A_HUE, 2 + len(HUES) * _WORDS_A_HUE  # the words for the two things
VOCABULARY = _FIELD + 1 + _FILLERS + 1  # 0 fills up, the largest id ends a text


class PairsByRow:
    """Pictures, tokens and `external_teacher`, a vector of what each caption means.

    The teacher stands for a language model: it knows which words mean the same, and nothing of pictures.
    Implements `moviola.training.loop.TrainingData`.
    """

    def __init__(self, pixels_NSS3: np.ndarray, tokens_NL: np.ndarray, teacher_ND: np.ndarray) -> None:
        self.pixels_NSS3, self.tokens_NL = pixels_NSS3, torch.from_numpy(tokens_NL)
        self.teacher_ND = torch.from_numpy(teacher_ND)

    def __len__(self) -> int:
        return len(self.pixels_NSS3)

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, Tensor]:
        return {
            "image": pixels(self.pixels_NSS3[rows]),
            "text": self.tokens_NL[rows],
            "row": torch.from_numpy(np.asarray(rows, np.int64)),
            "external_teacher": self.teacher_ND[rows],
        }


@dataclass(frozen=True)
class HiddenPairs:
    """What to train on, and new pictures with their categories: (N, 3, S, S) and category_N.

    `fit` is for a probe to learn from, `test` to measure it on.
    """

    data: PairsByRow
    fit: tuple[Tensor, np.ndarray]
    test: tuple[Tensor, np.ndarray]


def hidden_pairs(seed: int, count: int = 6400, *, noise: float = 0.4, a_category: int = 20) -> HiddenPairs:
    """`count` pairs to train on, and twice `a_category` new pictures of each category for a probe."""
    rng = np.random.default_rng([seed, 0])
    category_N = rng.integers(len(CATEGORIES), size=count)
    told_N = category_N.copy()
    dealt = rng.permutation(count)[: round(noise * count)]
    told_N[dealt] = category_N[rng.permutation(dealt)]
    data = PairsByRow(_pictures(rng, category_N), *_captions(rng, told_N))
    new_N = np.repeat(np.arange(len(CATEGORIES)), a_category)
    fit, test = ((pixels(_pictures(rng, new_N)), new_N) for _ in range(2))
    return HiddenPairs(data, fit, test)


def _hues(category_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the spot's and the field's hues."""
    numbers_C2 = np.array([[HUES.index(hue) for hue in pair] for pair in CATEGORIES])
    return numbers_C2[category_N, 0], numbers_C2[category_N, 1]


def _pictures(rng: np.random.Generator, category_N: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3)."""
    count, at_S = len(category_N), np.arange(SIDE) + 0.5
    table = np.array([COLOURS[hue] for hue in HUES], np.float32)
    spot_N3, field_N3 = (
        table[hue] + rng.normal(0, 25, (count, 3)).astype(np.float32) for hue in _hues(category_N)
    )
    canvas = np.tile(field_N3[:, None, None, :], (1, SIDE, SIDE, 1))

    def distances(place_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return at_S - place_N2[:, :1], at_S - place_N2[:, 1:]

    x_NS, y_NS = distances(rng.uniform(7, SIDE - 7, (count, 2)))
    radius_N = rng.uniform(4, 7, count)
    inside_NSS = x_NS[:, None, :] ** 2 + y_NS[:, :, None] ** 2 < radius_N[:, None, None] ** 2
    canvas = np.where(inside_NSS[..., None], spot_N3[:, None, None, :], canvas)
    for _ in range(2):
        x_NS, y_NS = distances(rng.uniform(0, SIDE, (count, 2)))
        inside_NSS = (abs(x_NS)[:, None, :] < 2) & (abs(y_NS)[:, :, None] < 2)
        chance_N3 = rng.uniform(0, 255, (count, 1, 1, 3)).astype(np.float32)
        canvas = np.where(inside_NSS[..., None], chance_N3, canvas)
    canvas *= rng.uniform(0.6, 1.2, (count, 1, 1, 1)).astype(np.float32)  # light
    canvas += 25 * rng.standard_normal(canvas.shape, np.float32)  # grain
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _captions(rng: np.random.Generator, category_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """tokens_NL int64 and the teacher's unit vectors (N, D)."""
    count, (spot_N, field_N) = len(category_N), _hues(category_N)
    words = 1 + _WORDS_A_HUE * np.stack([spot_N, field_N]) + rng.integers(_WORDS_A_HUE, size=(2, count))
    filler_N, kind_N = _FIELD + 1 + rng.integers(_FILLERS, size=count), rng.integers(4, size=count)
    tokens_NL = np.zeros((count, CONTEXT_LENGTH), np.int64)
    said_N2 = np.stack([kind_N != 1, kind_N != 0], 1)  # a quarter of the spot alone, a quarter of the field
    for n in range(count):
        spot, field = [words[0, n], _SPOT], [words[1, n], _FIELD]
        parts = ([*spot], [*field], [*spot, *field], [*field, *spot])[kind_N[n]]
        sentence = [filler_N[n], *parts, VOCABULARY - 1]
        tokens_NL[n, : len(sentence)] = sentence
    meanings = np.random.default_rng(7).standard_normal((2, len(HUES), _TEACHER_WIDTH))
    vector_ND = meanings[0, spot_N] * said_N2[:, :1] + meanings[1, field_N] * said_N2[:, 1:]
    vector_ND = (vector_ND + 0.3 * rng.standard_normal(vector_ND.shape)).astype(np.float32)
    return tokens_NL, vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)


@torch.no_grad()
def probe(model: Any, made: HiddenPairs) -> dict[str, float]:
    """How well the picture vectors of a model (`encode_image`) tell the categories apart, in percent.

    The accuracy of a linear classifier fitted to pictures of known categories; and the adjusted Rand
    index and purity of as many clusters as there are categories.
    """
    fit_ND, test_MD = (F.normalize(model.encode_image(x), dim=-1).numpy() for x, _ in (made.fit, made.test))
    scores_MC = linear_probe(fit_ND, made.fit[1], test_MD, ridge=1e-3)
    found_M = kmeans(test_MD, len(CATEGORIES)).labels_N
    return {
        "linear probe top-1": topk_accuracy(scores_MC, made.test[1], (1,))["top1"],
        "ARI of clusters": 100 * adjusted_rand(found_M, made.test[1]),
        "purity of clusters": 100 * purity(found_M, made.test[1]),
    }


def linear_probe(fit_ND: np.ndarray, class_N: np.ndarray, test_MD: np.ndarray, *, ridge: float) -> np.ndarray:
    """Class scores (M, C) of a least-squares classifier on standardised features; `ridge` per item."""
    mean_D, spread_D = fit_ND.mean(0), fit_ND.std(0) + 1e-6
    x_ND, y_MD = ((v.astype(np.float64) - mean_D) / spread_D for v in (fit_ND, test_MD))
    target_NC = np.eye(class_N.max() + 1)[class_N] - 1 / (class_N.max() + 1)
    gram_DD = x_ND.T @ x_ND + ridge * len(x_ND) * np.eye(x_ND.shape[1])
    return y_MD @ np.linalg.solve(gram_DD, x_ND.T @ target_NC)
