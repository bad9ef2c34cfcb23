"""Boxes, their overlap, and the exact one-to-one matching of predicted boxes with true ones.

Boxes are xyxy (left, top, right, bottom) or cxcywh (centre, width, height), in pixels or as shares of
the picture's width and height. Batch axes may come before the box axis.

Axis letters: B batch, N and M boxes, Q predicted boxes, R rows and C columns of a cost matrix.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moviola.types import UsageError

__all__ = [
    "assign",
    "cxcywh_to_xyxy",
    "match_boxes",
    "paired_giou",
    "pairwise_giou",
    "pairwise_iou",
    "shares_of_picture",
    "xyxy_to_cxcywh",
]


def xyxy_to_cxcywh(boxes_N4: Tensor) -> Tensor:
    low_N2, high_N2 = boxes_N4[..., :2], boxes_N4[..., 2:]
    return torch.cat([(low_N2 + high_N2) / 2, high_N2 - low_N2], dim=-1)


def cxcywh_to_xyxy(boxes_N4: Tensor) -> Tensor:
    centre_N2, half_N2 = boxes_N4[..., :2], boxes_N4[..., 2:] / 2
    return torch.cat([centre_N2 - half_N2, centre_N2 + half_N2], dim=-1)


def shares_of_picture(boxes_BM4: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """xyxy pixels -> (cxcywh shares of the picture, (B, M) bool: what is left has an area).

    `size` is (height, width). Boxes are cut at the picture's edges first; what lies outside, is empty
    or turned inside out, or holds NaN has no area, and its shares are zeros.
    """
    height, width = size
    scale_4 = boxes_BM4.new_tensor([width, height, width, height])
    shares_BM4 = (boxes_BM4 / scale_4).clamp(0, 1)
    valid_BM = (shares_BM4[..., 2:] > shares_BM4[..., :2]).all(-1)
    return xyxy_to_cxcywh(shares_BM4).masked_fill(~valid_BM.unsqueeze(-1), 0), valid_BM


def _giou(a_4: Tensor, b_4: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of xyxy boxes that broadcast against each other."""
    inside_2 = (torch.minimum(a_4[..., 2:], b_4[..., 2:]) - torch.maximum(a_4[..., :2], b_4[..., :2])).clamp(
        0
    )
    around_2 = (torch.maximum(a_4[..., 2:], b_4[..., 2:]) - torch.minimum(a_4[..., :2], b_4[..., :2])).clamp(
        0
    )
    shared, hull = inside_2.prod(-1), around_2.prod(-1)
    union = (a_4[..., 2:] - a_4[..., :2]).prod(-1) + (b_4[..., 2:] - b_4[..., :2]).prod(-1) - shared
    tiny = torch.finfo(union.dtype).tiny  # two boxes without area have IoU 0, not NaN
    iou = shared / (union + epsilon).clamp_min(tiny)
    return iou, iou - (hull - union) / hull.clamp_min(tiny)


def pairwise_iou(a_N4: Tensor, b_M4: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """Intersection over union of every xyxy box with every other: (..., N, M).

    `epsilon` is added to the union, as some official codes do.
    """
    return _giou(a_N4.unsqueeze(-2), b_M4.unsqueeze(-3), epsilon)[0]


def pairwise_giou(a_N4: Tensor, b_M4: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of every xyxy box with every other: (..., N, M), from -1 to 1.

    IoU less the share of the smallest box around both that neither covers.
    """
    return _giou(a_N4.unsqueeze(-2), b_M4.unsqueeze(-3), epsilon)[1]


def paired_giou(a_N4: Tensor, b_N4: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """Generalised IoU of box i with box i: (..., N)."""
    return _giou(a_N4, b_N4, epsilon)[1]


def match_boxes(
    predicted_BQ4: Tensor,
    boxes_BM4: Tensor,
    valid_BM: Tensor,
    *,
    l1_cost: float = 5.0,
    giou_cost: float = 2.0,
    epsilon: float = 0.0,
) -> Tensor:
    """DETR's matching without classes: for each true box the predicted box it gets, -1 for none. (B, M).

    Both in cxcywh. The pairs of a picture minimise the sum of l1_cost * |a - b|_1 - giou_cost * gIoU;
    boxes that are not valid take no part, and min(Q, boxes) pairs are made.
    """
    with torch.no_grad():
        predicted_BQ4, boxes_BM4 = predicted_BQ4.float(), boxes_BM4.float()
        cost_BMQ = l1_cost * (boxes_BM4.unsqueeze(2) - predicted_BQ4.unsqueeze(1)).abs().sum(-1)
        cost_BMQ -= giou_cost * pairwise_giou(
            cxcywh_to_xyxy(boxes_BM4), cxcywh_to_xyxy(predicted_BQ4), epsilon=epsilon
        )
        matched = assign(cost_BMQ.cpu().numpy(), valid_BM.cpu().numpy())
    return torch.from_numpy(matched).to(predicted_BQ4.device)


def assign(cost_BRC: np.ndarray, mask_BR: np.ndarray | None = None) -> np.ndarray:
    """The assignment of rows to columns with the least total cost, of many matrices at once.

    -> (B, R) int64: each row's column, -1 where it gets none. A column serves one row at most, and as
    many rows are served as can be. Rows with `mask_BR` False take no part. Costs that are not finite
    count as very dear, so a diverged model ends in a NaN loss and not here.

    Kuhn and Munkres' algorithm with potentials, one shortest augmenting path per row (O(R^2 C)),
    all matrices in step; exact in float64.
    """
    if cost_BRC.ndim != 3 or (mask_BR is not None and mask_BR.shape != cost_BRC.shape[:2]):
        mask = None if mask_BR is None else mask_BR.shape
        raise UsageError(
            f"Expected costs (B, rows, columns) and a mask (B, rows), got {cost_BRC.shape} and {mask}."
        )
    batch, rows, columns = cost_BRC.shape
    mask_BR = np.ones((batch, rows), bool) if mask_BR is None else mask_BR.astype(bool)
    cost_BRC = cost_BRC.astype(np.float64)
    finite = np.isfinite(cost_BRC)
    dear = 2 * np.abs(cost_BRC[finite]).sum() + 1 if finite.any() else 1.0
    cost_BRC = np.where(finite, cost_BRC, dear)
    spare = max(0, int(mask_BR.sum(1).max(initial=0)) - columns)
    if spare:  # columns that stand for "none": dearer than any change among the others
        dear = 2 * np.abs(cost_BRC).sum(axis=(1, 2), keepdims=True) + 1
        cost_BRC = np.concatenate([cost_BRC, np.broadcast_to(dear, (batch, rows, spare))], axis=2)
    wide = columns + spare
    row_price, column_price = np.zeros((batch, rows)), np.zeros((batch, wide + 1))
    owner = np.full((batch, wide + 1), -1)  # the row each column serves; the last column is where paths start
    for row in range(rows):
        every = np.flatnonzero(mask_BR[:, row])
        owner[every, wide] = row
        at = np.full(batch, wide)
        came_from = np.full((batch, wide), wide)
        slack, done = np.full((batch, wide), np.inf), np.zeros((batch, wide + 1), bool)
        b = every
        while len(b):
            done[b, at[b]] = True
            r = owner[b, at[b]]
            reduced = cost_BRC[b, r] - row_price[b, r, None] - column_price[b, :wide]
            better = ~done[b, :wide] & (reduced < slack[b])
            slack[b] = np.where(better, reduced, slack[b])
            came_from[b] = np.where(better, at[b, None], came_from[b])
            open_slack = np.where(done[b, :wide], np.inf, slack[b])
            nearest = open_slack.argmin(1)
            step = open_slack[np.arange(len(b)), nearest]
            k, c = np.nonzero(done[b])
            row_price[b[k], owner[b[k], c]] += step[k]
            column_price[b[k], c] -= step[k]
            slack[b] = np.where(done[b, :wide], slack[b], slack[b] - step[:, None])
            at[b] = nearest
            b = b[owner[b, nearest] >= 0]
        b = every
        while len(b := b[at[b] != wide]):  # turn the path over: each column takes the row before it
            previous = came_from[b, at[b]]
            owner[b, at[b]] = owner[b, previous]
            at[b] = previous
    column_BR = np.full((batch, rows), -1, np.int64)
    b, c = np.nonzero(owner[:, :columns] >= 0)
    column_BR[b, owner[b, c]] = c
    return column_BR
