"""Losses of pictures with described boxes: where a region is, and which description is its own.

Axis letters: B batch, R region queries, M boxes, L tokens, E embedding width, K matched pairs, N texts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moviola.parts.boxes import cxcywh_to_xyxy, match_boxes, paired_giou
from moviola.training.nce import cross_entropy
from moviola.types import Batch, UsageError

ROWS = ("predicted_BR4", "regions_BRE", "boxes_BM4", "described_BME", "valid_BM", "available_BM")
"""What `grounding_losses` reads of each row."""


def described_boxes(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """A `RegionField`'s boxes (B, M, 4), which are described (B, M), and the descriptions (B, M, L)."""
    boxes, texts, mask = batch["boxes"], batch["region_text"], batch["region_mask"]
    if texts.ndim != 3 or mask.shape != texts.shape[:2] or boxes.shape != (*mask.shape, 4):
        raise UsageError(
            f"Expected boxes (B, M, 4), region_text (B, M, L) and region_mask (B, M), got "
            f"{tuple(boxes.shape)}, {tuple(texts.shape)} and {tuple(mask.shape)}.",
            hint="Every box needs one description: give as many `regions` as `boxes` in each row.",
        )
    if len(boxes) != len(batch["image"]):
        raise UsageError(f"There are {len(batch['image'])} pictures and boxes for {len(boxes)}.")
    return boxes, mask.bool(), texts


def grounding_losses(
    rows: Mapping[str, Tensor],
    scale: Tensor,
    *,
    l1_cost: float,
    giou_cost: float,
    iou_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """L1 and gIoU losses of matched boxes, and the regions' cross-entropy over all descriptions.

    `rows`: `predicted_BR4` and `boxes_BM4` as cxcywh shares, `regions_BRE` and `described_BME` normalised,
    `valid_BM` where there is a box, `available_BM` where there is a description. Each valid box is
    matched with one predicted box of its picture (`match_boxes`); those beyond the number of regions
    stay alone. The box losses are sums over the pairs, divided by the number of valid boxes. A matched
    region must find the description of its box among the available ones of all pictures; a description
    whose box is not valid is nobody's, but a negative. Where there is no box, all three are zero.
    """
    predicted_BR4, regions_BRE, boxes_BM4, described_BME, valid_BM, available_BM = (
        rows[name] for name in ROWS
    )
    matched_BM = match_boxes(
        predicted_BR4, boxes_BM4, valid_BM, l1_cost=l1_cost, giou_cost=giou_cost, epsilon=iou_epsilon
    )
    b_K, m_K = (matched_BM >= 0).nonzero(as_tuple=True)
    if not len(b_K):
        nothing = 0 * predicted_BR4.sum()
        return nothing, nothing, 0 * regions_BRE.sum()
    r_K, count = matched_BM[b_K, m_K], valid_BM.sum()
    found_K4, true_K4 = predicted_BR4[b_K, r_K], boxes_BM4[b_K, m_K]
    l1 = (found_K4 - true_K4).abs().sum() / count
    giou_K = paired_giou(cxcywh_to_xyxy(found_K4), cxcywh_to_xyxy(true_K4), epsilon=iou_epsilon)
    place_BM = (available_BM.flatten().cumsum(0) - 1).view_as(available_BM)  # among the available ones
    texts_NE, target_K = described_BME[available_BM], place_BM[b_K, m_K]
    region = cross_entropy(regions_BRE[b_K, r_K], texts_NE, target_K, scale).mean()
    return l1, (1 - giou_K).sum() / count, region


def by_process(outputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The `ROWS` of each process by themselves, or all together where no `process` tells them apart."""
    rows, process_B = {name: outputs[name] for name in ROWS}, outputs.get("process")
    if process_B is None:
        return [rows]
    every = torch.unique(process_B).tolist()
    return [{name: value[process_B == process] for name, value in rows.items()} for process in every]
