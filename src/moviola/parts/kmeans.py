"""k-means (Lloyd's algorithm) for many clusters: exact, in bands, without the N x K distances in memory.

Three things make it fast. The nearest centroid is where x . c - |c|^2 / 2 is largest, one matrix
product a tile. A point whose centroid stayed, or came no farther, can only be drawn away by a centroid
that moved: the others are as far as they were, so it is compared with those that moved alone. And a
run whose labels no longer change is over.

Clusters that run empty take over the points that lie farthest from their own centroids, one each, the
farthest first, so the sum of distances never grows. Points that are all alike can still leave clusters
empty: their labels do not occur.

Axis letters: N points, K clusters, D width, M points or clusters of a selection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moviola.types import UsageError

_ROWS, _COLUMNS = 1024, 2048  # a tile of scores is 8 MB: it stays in the cache until its maxima are taken
_FULL = 0.8  # above this share of moved centroids the selection costs more than it saves


@dataclass(frozen=True)
class Clusters:
    """labels_N int64, centroids_KD float32 (means, not normalised), and `inertia`, the sum of squared
    distances to them; `steps` has the inertia at every assignment of the restart that was kept."""

    labels_N: np.ndarray
    centroids_KD: np.ndarray
    inertia: float
    steps: tuple[float, ...]


def kmeans(
    x_ND: np.ndarray | Tensor,
    clusters: int,
    *,
    iterations: int = 20,
    restarts: int = 3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Clusters of points by Euclidean distance, the best of `restarts` runs by inertia.

    Every run starts from points drawn without replacement by a generator of (seed, run) and moves the
    centroids at most `iterations` times; labels are those of the final centroids. Raises `UsageError`
    for more clusters than points, NaN or infinite values, and counts below 1.
    """
    x_ND = _checked(x_ND, clusters, iterations, restarts).to(device)
    # the mean taken out keeps |c|^2 small beside the distances: fewer digits are lost to cancellation
    mean_D = x_ND.mean(0)
    x_ND = x_ND - mean_D
    best: tuple[float, Tensor, Tensor, tuple[float, ...]] | None = None
    for run in range(restarts):
        first_K = np.random.default_rng([seed, run]).choice(len(x_ND), clusters, replace=False)
        labels_N, centroids_KD, steps = _lloyd(x_ND, x_ND[torch.from_numpy(first_K).to(device)], iterations)
        if best is None or steps[-1] < best[0]:
            best = (steps[-1], labels_N, centroids_KD, steps)
    assert best is not None
    inertia, labels_N, centroids_KD, steps = best
    return Clusters(labels_N.cpu().numpy(), (centroids_KD + mean_D).cpu().numpy(), inertia, steps)


def nearest(x_ND: np.ndarray | Tensor, centroids_KD: np.ndarray | Tensor) -> np.ndarray:
    """The nearest centroid of each point: labels_N int64."""
    points_ND, means_KD = (torch.as_tensor(v, dtype=torch.float32) for v in (x_ND, centroids_KD))
    return _best(points_ND, means_KD)[1].cpu().numpy()


def _lloyd(x_ND: Tensor, centroids_KD: Tensor, iterations: int) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    square = float(x_ND.double().square().sum())
    score_N, labels_N = _best(x_ND, centroids_KD)
    steps = [_inertia(square, score_N)]
    for _ in range(iterations):
        moved_KD, before_N = _means(x_ND, labels_N, len(centroids_KD), score_N), labels_N
        score_N, labels_N = _reassign(x_ND, centroids_KD, moved_KD, score_N, labels_N)
        centroids_KD = moved_KD
        steps.append(_inertia(square, score_N))
        if torch.equal(labels_N, before_N):
            break
    return labels_N, centroids_KD, tuple(steps)


def _inertia(square: float, score_N: Tensor) -> float:
    """|x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2), summed."""
    return max(0.0, square - 2 * float(score_N.double().sum()))


def cluster_means(x_ND: Tensor, labels_N: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The mean of every cluster's points, zeros where it has none, and how many it has: (K, D), (K,)."""
    order_N = labels_N.argsort(stable=True)
    count_K = torch.bincount(labels_N, minlength=clusters)
    # sums over sorted points: the same bits every time, also where scattered adds would race
    sums_KD = torch.segment_reduce(x_ND[order_N], "sum", lengths=count_K, axis=0, initial=0)
    return sums_KD / count_K.clamp_min(1).unsqueeze(1), count_K


def check_labels(labels: Tensor, clusters: int) -> None:
    """Labels are cluster numbers from 0 to `clusters` - 1, or `UsageError`."""
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < clusters:
        raise UsageError(
            f"Labels must be cluster numbers from 0 to {clusters - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}."
        )


def _means(x_ND: Tensor, labels_N: Tensor, clusters: int, score_N: Tensor) -> Tensor:
    """`cluster_means`, where empty clusters take over the points farthest from their centroids."""
    made_KD, count_K = cluster_means(x_ND, labels_N, clusters)
    empty_M = (count_K == 0).nonzero().flatten()
    if len(empty_M):
        distance_N = x_ND.square().sum(1) - 2 * score_N
        made_KD[empty_M] = x_ND[distance_N.argsort(descending=True, stable=True)[: len(empty_M)]]
    return made_KD


def _reassign(
    x_ND: Tensor, old_KD: Tensor, new_KD: Tensor, score_N: Tensor, labels_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores and labels for centroids that moved a little, as a full search would give them."""
    moved_K = (old_KD != new_KD).any(1)
    moved_M = moved_K.nonzero().flatten()
    if len(moved_M) > _FULL * len(new_KD):
        return _best(x_ND, new_KD)
    own_moved_M = moved_K[labels_N].nonzero().flatten()
    own_KD = new_KD[labels_N[own_moved_M]]
    own_M = (x_ND[own_moved_M] * own_KD).sum(1) - own_KD.square().sum(1) / 2
    farther_M = own_moved_M[own_M < score_N[own_moved_M]]
    score_N, labels_N = score_N.clone(), labels_N.clone()
    score_N[own_moved_M] = own_M
    if not len(moved_M):
        return score_N, labels_N
    stays_N = torch.ones(len(x_ND), dtype=torch.bool, device=x_ND.device)
    stays_N[farther_M] = False
    near_M = stays_N.nonzero().flatten()
    for rows_M, ids_M in ((near_M, moved_M), (farther_M, torch.arange(len(new_KD), device=x_ND.device))):
        found_M, place_M = _best(x_ND, new_KD[ids_M], rows_M)
        better_M = found_M > score_N[rows_M]
        score_N[rows_M[better_M]] = found_M[better_M]
        labels_N[rows_M[better_M]] = ids_M[place_M[better_M]]
    return score_N, labels_N


def _best(x_ND: Tensor, centroids_KD: Tensor, rows_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest x . c - |c|^2 / 2 of each point (of `rows_M`) and whose it is, the first where equal."""
    half_K = -centroids_KD.square().sum(1) / 2
    count = len(x_ND) if rows_M is None else len(rows_M)
    score_N = x_ND.new_full((count,), -torch.inf)
    label_N = torch.zeros(count, dtype=torch.int64, device=x_ND.device)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        band_MD = x_ND[part] if rows_M is None else x_ND[rows_M[part]]
        for first in range(0, len(centroids_KD), _COLUMNS):
            tile = slice(first, first + _COLUMNS)
            found_M, place_M = _row_maximum(torch.addmm(half_K[tile], band_MD, centroids_KD[tile].T))
            better_M = found_M > score_N[part]
            score_N[part] = torch.where(better_M, found_M, score_N[part])
            label_N[part] = torch.where(better_M, place_M + first, label_N[part])
    return score_N, label_N


def _row_maximum(scores_MK: Tensor) -> tuple[Tensor, Tensor]:
    if scores_MK.device.type == "cpu":  # NumPy's argmax took a tenth of torch's time beside the product
        place_M = torch.from_numpy(scores_MK.numpy().argmax(1))
        return scores_MK.gather(1, place_M.unsqueeze(1)).squeeze(1), place_M
    found_M, place_M = scores_MK.max(1)
    return found_M, place_M


def _checked(x_ND: np.ndarray | Tensor, clusters: int, iterations: int, restarts: int) -> Tensor:
    points_ND = torch.as_tensor(x_ND).detach().to(torch.float32)
    if points_ND.ndim != 2 or not points_ND.numel():
        raise UsageError(f"k-means takes points (N, D), got {tuple(points_ND.shape)}.")
    if min(clusters, iterations, restarts) < 1:
        raise UsageError(
            "k-means needs at least one cluster, iteration and restart, got "
            f"{clusters}, {iterations} and {restarts}."
        )
    if clusters > len(points_ND):
        raise UsageError(
            f"k-means cannot make {clusters} clusters of {len(points_ND)} points.",
            hint="Ask for fewer clusters or give more points.",
        )
    broken_M = (~torch.isfinite(points_ND).all(1)).nonzero().flatten()
    if len(broken_M):
        raise UsageError(
            f"{len(broken_M)} of {len(points_ND)} points hold NaN or infinity, the first at row "
            f"{int(broken_M[0])}."
        )
    return points_ND
