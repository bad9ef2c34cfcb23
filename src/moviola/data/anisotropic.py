"""Made vectors of an image and a text tower: Gaussian classes that share a covariance far from round.

Image vectors are `common` + class direction + noise whose standard deviations fall along rotated axes; text
vectors lie around another common vector (the gap between modalities) and know the class directions only
roughly. Nearest means suffer from the wide axes, words from their own noise.

Axis letters: N vectors, C classes, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moviola.clip.loaded import unit


class MadeVectors(NamedTuple):
    """Unit rows, float32, `shots` or `tested` of each class in the order of classes."""

    train_ND: np.ndarray
    train_N: np.ndarray
    test_ND: np.ndarray
    test_N: np.ndarray
    text_CD: np.ndarray


def anisotropic_classes(
    seed: int,
    *,
    classes: int = 40,
    dim: int = 128,
    shots: int = 16,
    tested: int = 50,
    apart: float = 0.3,
    spread: float = 1.3,
    fall: float = 0.3,
    word_noise: float = 0.5,
    gap: float = 0.3,
) -> MadeVectors:
    """Noise of length `spread`, its deviation on axis d as (1 + d)^-fall; class directions of length `apart`.

    `word_noise` is the error of a text vector, in lengths of a class direction.
    """
    rng = np.random.default_rng(seed)
    scale_D = (1.0 + np.arange(dim)) ** -fall
    scale_D *= spread / np.linalg.norm(scale_D)
    turn_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    common_D, words_D = unit(rng.standard_normal((2, dim)))
    direction_CD, error_CD = apart * unit(rng.standard_normal((2, classes, dim)))
    text_CD = unit(gap * words_D + direction_CD + word_noise * error_CD)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        label_N = np.repeat(np.arange(classes), count)
        noise_ND = (rng.standard_normal((len(label_N), dim)) * scale_D) @ turn_DD.T
        return unit(common_D + direction_CD[label_N] + noise_ND), label_N

    return MadeVectors(*draw(shots), *draw(tested), text_CD)
