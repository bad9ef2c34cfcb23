"""A linear classifier on the unit vectors of a frozen model, and the two plainest ways to fit one.

`nearest_mean` compares with the mean vector of each class; `linear_probe` is multinomial logistic
regression, as CLIP's authors probe features (Radford et al. 2021, arXiv 2103.00020, appendix A.3), its
strength of regularisation chosen by cross-validation within the training pictures.

Axis letters: N pictures, D embedding width, C classes, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import build_config
from moviola.clip.loaded import unit
from moviola.parts.adapted import Adapted
from moviola.types import ClipBatch, UsageError

if TYPE_CHECKING:
    from moviola.clip.loaded import Model

PENALTIES = tuple(10.0**power for power in range(-4, 3))
"""Strengths of L2 regularisation that the linear probe chooses from: times the mean loss of a picture."""
FOLDS = 5


@dataclass(frozen=True)
class LinearHead:
    """logits_NC = vectors_ND @ weight_DC + bias_C for unit vectors; `notes` are for the user."""

    weight_DC: np.ndarray
    bias_C: np.ndarray
    notes: tuple[str, ...] = ()

    def logits(self, vectors_ND: np.ndarray) -> np.ndarray:
        return np.asarray(vectors_ND @ self.weight_DC + self.bias_C, dtype=np.float32)


@dataclass(frozen=True)
class HeadConfig:
    """`method` and `options` say how the head was fitted; `classes` how many it tells apart."""

    method: str = "linear-probe"
    classes: int = 2
    options: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class WithHead(Adapted):
    """A frozen model and a linear classifier of its image vectors."""

    adaptation = "classifier"

    def __init__(self, base: nn.Module, config: HeadConfig, head: LinearHead | None = None) -> None:
        super().__init__(base)
        self.config = config
        weight_DC = torch.zeros(self.dim, config.classes)
        self.register_buffer("weight_DC", weight_DC if head is None else _tensor(head.weight_DC))
        self.register_buffer(
            "bias_C", weight_DC.new_zeros(config.classes) if head is None else _tensor(head.bias_C)
        )

    @classmethod
    def from_base(cls, base: Model, config: Mapping[str, Any], classes: Sequence[str]) -> Self:
        return cls(base.module, build_config(HeadConfig, config))

    def classify_vectors(self, vectors_BD: Tensor) -> Tensor:
        """Logits of image or video vectors of any length, in float32."""
        head_DC, bias_C = self.get_buffer("weight_DC"), self.get_buffer("bias_C")
        return F.normalize(vectors_BD.float(), dim=-1) @ head_DC.float() + bias_C.float()

    def classify_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.classify_vectors(self.encode_image(pixels_BCHW))

    def classify_video(self, batch: ClipBatch) -> Tensor:
        """Of the video's one vector, as it was when the head was fitted."""
        return self.classify_vectors(self.pool(self.encode_video(batch), batch.mask_BT))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def check_labels(vectors_ND: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """How many vectors each class has: (C,). Raises `UsageError` where one has none, or rows do not fit."""
    if vectors_ND.ndim != 2 or labels_N.shape != vectors_ND.shape[:1] or not len(labels_N):
        raise UsageError(
            f"Expected vectors (N, D) and one label for each, got {vectors_ND.shape} and {labels_N.shape}."
        )
    if not np.isfinite(vectors_ND).all():
        raise UsageError("Some vectors are not finite.", hint="Look at the pictures they come from.")
    if not np.issubdtype(labels_N.dtype, np.integer) or labels_N.min() < 0 or labels_N.max() >= classes:
        raise UsageError(
            f"Labels must be class numbers in 0..{classes - 1}, got {labels_N.dtype} in "
            f"{labels_N.min()}..{labels_N.max()}."
        )
    count_C = np.bincount(labels_N, minlength=classes)
    if not count_C.all():
        raise UsageError(
            f"{int((count_C == 0).sum())} of {classes} classes have no picture: numbers "
            f"{', '.join(map(str, np.flatnonzero(count_C == 0)[:5]))}.",
            hint="Add pictures to them, or leave the classes out.",
        )
    return count_C


def class_means(vectors_ND: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """The mean vector of each class, not normalised: mean_CD, in float64."""
    count_C = check_labels(vectors_ND, labels_N, classes)
    sum_CD = np.zeros((classes, vectors_ND.shape[1]))
    np.add.at(sum_CD, labels_N, vectors_ND.astype(np.float64))
    return sum_CD / count_C[:, None]


def nearest_mean(
    vectors_ND: np.ndarray, labels_N: np.ndarray, text_CD: np.ndarray, *, logit_scale: float, seed: int = 0
) -> LinearHead:
    """Logit scale times the cosine to each class's mean vector. Words and `seed` are not used."""
    mean_CD = unit(class_means(vectors_ND, labels_N, len(text_CD)))
    return LinearHead(logit_scale * mean_CD.T, np.zeros(len(mean_CD), np.float32))


def linear_probe(
    vectors_ND: np.ndarray,
    labels_N: np.ndarray,
    text_CD: np.ndarray,
    *,
    logit_scale: float,
    seed: int = 0,
    penalty: float | None = None,
) -> LinearHead:
    """Multinomial logistic regression with an L2 penalty; words are not used.

    `penalty` None: the one of `PENALTIES` with the least cross-validated loss over up to five folds, the
    middle of them where a class has one picture. Vectors are scaled by the square root of D, so that
    penalties mean the same at any width. Weights are sought in the span of the vectors, where the
    minimum lies: exact, and much faster for few pictures.
    """
    classes = len(text_CD)
    count_C = check_labels(vectors_ND, labels_N, classes)
    if penalty is not None and penalty < 0:
        raise UsageError(f"The penalty must not be negative, got {penalty}.")
    scale = vectors_ND.shape[1] ** 0.5
    basis_DR, x_NR = _in_span(torch.from_numpy(vectors_ND.astype(np.float64)) * scale)
    y_N = torch.from_numpy(labels_N)
    notes: tuple[str, ...] = ()
    if penalty is None:
        folds = min(FOLDS, int(count_C.min()))
        if folds < 2:
            penalty = PENALTIES[len(PENALTIES) // 2]
            notes = (f"A class has one picture, so the penalty was not chosen but is {penalty:g}.",)
        else:
            fold_N = torch.from_numpy(folds_of(labels_N, folds, seed))
            losses = sum(_held_out_losses(x_NR, y_N, fold_N == fold, classes) for fold in range(folds))
            penalty = PENALTIES[int(np.argmin(losses))]
    weight_RC, bias_C = _regress(x_NR, y_N, classes, penalty)
    head_DC = (basis_DR @ weight_RC * scale).float().numpy()
    return LinearHead(head_DC, bias_C.float().numpy(), (*notes, f"penalty {penalty:g}"))


def folds_of(labels_N: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each row, every class spread evenly over all of them: (N,) in 0..folds - 1."""
    order_N = np.random.default_rng(seed).permutation(len(labels_N))
    fold_N = np.empty(len(labels_N), np.int64)
    for label in np.unique(labels_N):
        rows = order_N[labels_N[order_N] == label]
        fold_N[rows] = np.arange(len(rows)) % folds
    return fold_N


def _in_span(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis_DR of the rows where they are fewer than D, and the rows in it: x_NR."""
    if len(x_ND) >= x_ND.shape[1]:
        return torch.eye(x_ND.shape[1], dtype=x_ND.dtype), x_ND
    basis_DN, triangle_NN = torch.linalg.qr(x_ND.T)
    return basis_DN, triangle_NN.T


def _held_out_losses(x_ND: Tensor, y_N: Tensor, out_N: Tensor, classes: int) -> np.ndarray:
    """The summed loss of the rows left out at each of `PENALTIES`, the strongest solved first."""
    losses = np.zeros(len(PENALTIES))
    solved = None
    for place in reversed(range(len(PENALTIES))):
        solved = _regress(x_ND[~out_N], y_N[~out_N], classes, PENALTIES[place], solved)
        weight_DC, bias_C = solved
        losses[place] = F.cross_entropy(x_ND[out_N] @ weight_DC + bias_C, y_N[out_N], reduction="sum")
    return losses


def _regress(
    x_ND: Tensor,
    y_N: Tensor,
    classes: int,
    penalty: float,
    begin: tuple[Tensor, Tensor] | None = None,
    steps: int = 200,
) -> tuple[Tensor, Tensor]:
    """The minimum of mean cross-entropy + penalty / 2 |W|^2, by L-BFGS; the bias is not penalised."""
    weight_DC, bias_C = begin or (x_ND.new_zeros(x_ND.shape[1], classes), x_ND.new_zeros(classes))
    weight_DC, bias_C = (t.clone().requires_grad_() for t in (weight_DC, bias_C))
    optimizer = torch.optim.LBFGS(
        [weight_DC, bias_C], max_iter=steps, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x_ND @ weight_DC + bias_C, y_N) + penalty / 2 * weight_DC.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight_DC.detach(), bias_C.detach()
