"""Clusters of an episode's rows, and looking them up by row number: what prototype objectives share.

Axis letters: B batch, M rows of an episode (ascending), K clusters, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moviola.data.hashing import hash_uint64
from moviola.parts.kmeans import kmeans
from moviola.types import UsageError

_LOGITS = 1 << 24  # logits that exist at a time


def in_row_order(
    row_ids: Sequence[int], features: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """rows_M ascending and each of `features` (M, D) in that order; raises as `check_features`."""
    order_M = np.argsort(np.asarray(row_ids, np.int64), kind="stable")
    rows_M = np.asarray(row_ids, np.int64)
    for name, x_MD in features.items():
        check_features(name, x_MD, rows_M)
    return rows_M[order_M], {name: x_MD[order_M] for name, x_MD in features.items()}


def cluster_rows(
    features: Mapping[str, np.ndarray],
    rows_M: np.ndarray,
    clusters: int,
    *,
    iterations: int,
    restarts: int,
    seed: int,
    episode: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """`rows`, and of each named (M, D) of `features` `<name>_labels` (M,) and `<name>_centroids` (K, D).

    Starting points are hashes of (seed, episode, place of the name).
    """
    made = {"rows": rows_M}
    for stream, (name, x_MD) in enumerate(features.items()):
        start = int(hash_uint64(seed, np.array([episode]), stream)[0])
        got = kmeans(x_MD, clusters, iterations=iterations, restarts=restarts, seed=start, device=device)
        made |= {f"{name}_labels": got.labels_N, f"{name}_centroids": got.centroids_KD}
    return made


def check_features(name: str, x_MD: np.ndarray, rows_M: np.ndarray) -> None:
    """One finite vector for each row, or `UsageError`."""
    if x_MD.ndim != 2 or len(x_MD) != len(rows_M):
        raise UsageError(
            f"The {name} features are {x_MD.shape} for {len(rows_M)} rows: expected one vector a row."
        )
    broken_M = np.flatnonzero(~np.isfinite(x_MD).all(1))
    if len(broken_M):
        raise UsageError(
            f"The {name} features of {len(broken_M)} of {len(rows_M)} rows are NaN or infinite, the first "
            f"of them rows {rows_M[broken_M[:4]].tolist()}.",
            hint="If it is all rows the model has diverged: lower the learning rate. Else look at them.",
        )


def on_device(tables: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tables where the model is: they come from a checkpoint on the CPU."""
    if all(table.device == device for table in tables.values()):
        return tables
    return {name: table.to(device) for name, table in tables.items()}


def places(rows_M: Tensor, row_B: Tensor) -> Tensor:
    """Where each of `row_B` lies in the ascending `rows_M`; one that is not there raises `UsageError`."""
    at_B = torch.searchsorted(rows_M, row_B.contiguous()).clamp_max(len(rows_M) - 1)
    lost = row_B[rows_M[at_B] != row_B]
    if len(lost):
        raise UsageError(
            f"{len(lost)} of the batch's {len(row_B)} rows are not in this episode, so they have no cluster: "
            f"rows {lost[:4].tolist()}.",
            hint="on_episode must be given the rows of all steps until the next episode.",
        )
    return at_B


def row_log_sum_exp(z_BD: Tensor, keys_KD: Tensor, scale: Tensor) -> Tensor:
    """log sum_k exp(scale * z . key_k): (B,), its logits made in bands, and again for the gradient."""

    def some(part_MD: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(part_MD.device.type, enabled=False):
            return (scale * part_MD @ keys_KD.T).logsumexp(1)

    parts = z_BD.split(max(1, _LOGITS // len(keys_KD)))
    if len(parts) == 1:
        return some(z_BD, scale)
    return torch.cat([checkpoint(some, part, scale, use_reentrant=False) for part in parts])


def soft_means(values_KD: Tensor, teacher_KE: Tensor, temperature: float) -> Tensor:
    """For each cluster the mean of all `values`, weighed by softmax(T_y . T_k / temperature): (K, D)."""
    bands = teacher_KE.split(max(1, _LOGITS // len(teacher_KE)))
    return torch.cat([(band_ME @ teacher_KE.T / temperature).softmax(1) @ values_KD for band_ME in bands])
