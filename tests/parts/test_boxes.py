from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.parts.boxes import (
    assign,
    cxcywh_to_xyxy,
    match_boxes,
    paired_giou,
    pairwise_giou,
    pairwise_iou,
    shares_of_picture,
    xyxy_to_cxcywh,
)
from moviola.types import UsageError


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    return torch.cat([low, low + 0.05 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64)], -1)


def test_both_forms_of_a_box():
    boxes = random_boxes(3, 5)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    one = torch.tensor([10.0, 20.0, 30.0, 60.0])
    assert xyxy_to_cxcywh(one).tolist() == [20, 40, 20, 40]


def test_overlaps_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [4, 0, 6, 2], [0, 0, 1, 1]])
    assert pairwise_iou(a, b)[0].tolist() == pytest.approx([1 / 7, 1, 0, 1 / 4])
    # hulls of 9, 4, 12 and 4; unions of 7, 4, 8 and 4
    assert pairwise_giou(a, b)[0].tolist() == pytest.approx([1 / 7 - 2 / 9, 1, -4 / 12, 1 / 4])
    assert pairwise_iou(a, b, epsilon=1.0)[0].tolist() == pytest.approx([1 / 8, 4 / 5, 0, 1 / 5])


def test_overlap_counted_on_a_grid_of_cells():
    generator = np.random.default_rng(0)
    for _ in range(50):
        corners = np.sort(generator.integers(0, 12, (2, 2, 2)), axis=1)  # box, low or high, axis
        corners[:, 1] += 1
        cells = np.zeros((2, 13, 13), bool)
        for box, ((x0, y0), (x1, y1)) in enumerate(corners):
            cells[box, y0:y1, x0:x1] = True
        a, b = torch.from_numpy(corners.reshape(2, 1, 4)).double()
        iou = (cells[0] & cells[1]).sum() / (cells[0] | cells[1]).sum()
        low, high = corners[:, 0].min(0), corners[:, 1].max(0)
        hull = (high - low).prod()
        assert pairwise_iou(a, b).item() == pytest.approx(iou)
        assert pairwise_giou(a, b).item() == pytest.approx(iou - 1 + (cells[0] | cells[1]).sum() / hull)


def test_pairs_are_the_diagonal_of_all_pairs():
    a, b = random_boxes(4, 6, seed=1), random_boxes(4, 6, seed=2)
    torch.testing.assert_close(paired_giou(a, b), pairwise_giou(a, b).diagonal(dim1=-2, dim2=-1))
    assert pairwise_giou(a, b[:, :2]).shape == (4, 6, 2)
    assert ((pairwise_giou(a, b) >= -1) & (pairwise_giou(a, b) <= pairwise_iou(a, b) + 1e-12)).all()


def test_boxes_without_area_have_no_overlap_and_no_nan():
    point = torch.zeros(1, 4, requires_grad=True)
    value = pairwise_giou(point, torch.zeros(1, 4))
    value.sum().backward()
    assert value.item() == 0
    assert torch.isfinite(point.grad).all()


def test_gradients_of_giou():
    a, b = random_boxes(5, seed=3).requires_grad_(), random_boxes(5, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: paired_giou(x, y, epsilon=1e-4), (a, b))


def test_shares_of_a_picture():
    outside, flat, turned = [50.0, 0, 60, 9], [5.0, 5, 5, 9], [9.0, 9, 5, 12]
    unknown = [1, 2, float("nan"), 4]
    boxes = torch.tensor([[10.0, 5, 30, 15], [-10, -10, 20, 10], outside, flat, turned, unknown])
    shares, valid = shares_of_picture(boxes[None], (20, 40))
    assert valid[0].tolist() == [True, True, False, False, False, False]
    assert shares[0, 0].tolist() == [0.5, 0.5, 0.5, 0.5]
    assert shares[0, 1].tolist() == [0.25, 0.25, 0.5, 0.5]
    assert (shares[0, 2:] == 0).all()


def brute_force(cost_RC, mask_R):
    rows = np.flatnonzero(mask_R)
    columns = cost_RC.shape[1]
    if len(rows) <= columns:
        choices = itertools.permutations(range(columns), len(rows))
        return min(sum(cost_RC[r, c] for r, c in zip(rows, choice, strict=True)) for choice in choices)
    choices = itertools.permutations(rows, columns)
    return min(sum(cost_RC[r, c] for c, r in enumerate(choice)) for choice in choices)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_the_assignment_is_the_best_there_is(seed, rows, columns, ties):
    rng = np.random.default_rng(seed)
    batch = 6
    cost = rng.integers(-2, 3, (batch, rows, columns)) if ties else rng.normal(size=(batch, rows, columns))
    mask = rng.random((batch, rows)) < 0.8
    got = assign(cost.astype(np.float32) if ties else cost, mask)
    assert got.dtype == np.int64
    assert (got[~mask] == -1).all()
    for b in range(batch):
        served = np.flatnonzero(got[b] >= 0)
        assert len(served) == min(mask[b].sum(), columns)
        assert len(set(got[b, served])) == len(served)
        assert cost[b, served, got[b, served]].sum() == pytest.approx(brute_force(cost[b], mask[b]), abs=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (3, 8), (8, 4)])
def test_larger_assignments(rows, columns):
    cost = np.random.default_rng(rows).normal(size=(3, rows, columns)) * 1e3
    got = assign(cost)
    for b in range(3):
        served = np.flatnonzero(got[b] >= 0)
        best = brute_force(cost[b], np.ones(rows, bool))
        assert cost[b, served, got[b, served]].sum() == pytest.approx(best)


def test_each_matrix_is_assigned_as_if_alone():
    rng = np.random.default_rng(5)
    cost, mask = rng.normal(size=(40, 6, 9)), rng.random((40, 6)) < 0.6
    together = assign(cost, mask)
    alone = np.concatenate([assign(cost[b : b + 1], mask[b : b + 1]) for b in range(40)])
    assert (together == alone).all()


def test_costs_that_are_not_finite_are_avoided_and_do_not_hang():
    cost = np.array([[[np.nan, 1.0], [0.5, np.inf]]])
    assert assign(cost).tolist() == [[1, 0]]
    assert sorted(assign(np.full((1, 2, 2), np.nan))[0]) == [0, 1]


def test_nothing_to_assign():
    assert assign(np.zeros((0, 3, 3))).shape == (0, 3)
    assert assign(np.zeros((2, 0, 3))).shape == (2, 0)
    assert (assign(np.zeros((2, 3, 3)), np.zeros((2, 3), bool)) == -1).all()
    with pytest.raises(UsageError, match="mask"):
        assign(np.zeros((2, 3, 3)), np.zeros((2, 4), bool))


def test_matching_undoes_a_shuffle():
    boxes = xyxy_to_cxcywh(random_boxes(8, 5, seed=7).float() / 2.2)
    order = torch.stack([torch.randperm(5) for _ in range(8)])
    predicted = torch.stack([b[o] for b, o in zip(boxes, order, strict=True)])
    valid = torch.rand(8, 5) < 0.7
    matched = match_boxes(predicted, boxes, valid)
    assert (matched == torch.where(valid, order.argsort(1), -1)).all()


def test_matching_minimises_its_cost():
    predicted = xyxy_to_cxcywh(random_boxes(1, 4, seed=8).float() / 2.2)
    boxes = xyxy_to_cxcywh(random_boxes(1, 3, seed=9).float() / 2.2)
    for l1, giou in ((5.0, 2.0), (1.0, 0.0), (0.0, 1.0)):
        cost = l1 * torch.cdist(boxes[0], predicted[0], p=1)
        cost -= giou * pairwise_giou(cxcywh_to_xyxy(boxes[0]), cxcywh_to_xyxy(predicted[0]))
        matched = match_boxes(
            predicted, boxes, torch.ones(1, 3, dtype=torch.bool), l1_cost=l1, giou_cost=giou
        )
        got = cost[torch.arange(3), matched[0]].sum().item()
        assert got == pytest.approx(brute_force(cost.numpy(), np.ones(3, bool)), abs=1e-5)
