from __future__ import annotations

import pytest
import torch

from moviola.parts.video_masks import kept, running_cell_mask, take, tube_mask
from moviola.types import UsageError


def made(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("grid", "ratio"), [((8, 14, 14), 0.9), ((4, 4, 4), 0.75), ((3, 5, 2), 0.31)])
def test_a_tube_hides_the_same_exact_count_in_every_layer(grid, ratio):
    layers, rows, columns = grid
    hidden_BUS = tube_mask(5, grid, ratio, generator=made()).unflatten(1, (layers, -1))
    assert (hidden_BUS == hidden_BUS[:, :1]).all()
    assert (hidden_BUS.sum(-1) == int(ratio * rows * columns)).all()
    assert len({tuple(row) for row in hidden_BUS[:, 0].tolist()}) > 1  # drawn clip by clip
    assert torch.equal(hidden_BUS.flatten(1), tube_mask(5, grid, ratio, generator=made()))


@pytest.mark.parametrize(("ratio", "skips"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.6, 2)])
def test_cells_run_on_so_that_four_layers_skip_every_place_equally_often(ratio, skips):
    skipped_BUHW = running_cell_mask(4, (9, 6, 4), ratio, phase_B=torch.arange(4)).unflatten(1, (9, 6, 4))
    cells_BUHWcc = skipped_BUHW.unflatten(3, (2, 2)).unflatten(2, (3, 2)).transpose(3, 4)
    assert (cells_BUHWcc.sum((-1, -2)) == skips).all()
    assert (cells_BUHWcc == cells_BUHWcc[:, :, :1, :1]).all()
    for start in range(6):
        assert (skipped_BUHW[:, start : start + 4].sum(1) == skips).all()
    assert torch.equal(skipped_BUHW[0, 1:], skipped_BUHW[1, :-1])  # phases are shifts of one another


def test_phases_are_drawn():
    masks = running_cell_mask(64, (4, 4, 4), generator=made())
    assert len({tuple(row) for row in masks.tolist()}) == 4


def test_kept_tokens_are_taken_in_order():
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    index = kept(mask)
    assert index.tolist() == [[1, 2], [0, 3]]
    x = torch.arange(16.0).view(2, 4, 2)
    assert torch.equal(take(x, index), torch.stack([x[0, [1, 2]], x[1, [0, 3]]]))


BAD = {
    "no ratio": (lambda: tube_mask(1, (2, 4, 4), 0.0), "between 0 and 1, got 0.0"),
    "ratio of one": (lambda: tube_mask(1, (2, 4, 4), 1.0), "between 0 and 1, got 1.0"),
    "nothing hidden": (lambda: tube_mask(1, (2, 2, 2), 0.2), "hides 0"),
    "nothing seen": (lambda: kept(torch.ones(2, 4, dtype=torch.bool)), "keep at least one"),
    "no clips": (lambda: kept(torch.ones(0, 4, dtype=torch.bool)), "keep at least one"),
    "unequal counts": (lambda: kept(torch.tensor([[True, False], [False, False]])), "got 1 to 2"),
    "not bool": (lambda: kept(torch.zeros(2, 4)), "A mask is bool"),
    "odd grid": (lambda: running_cell_mask(1, (2, 4, 3)), "even number of rows and columns, got 4 x 3"),
    "cell ratio": (lambda: running_cell_mask(1, (2, 4, 4), 0.2), "0.25 to 0.99, got 0.2"),
    "whole cell": (lambda: running_cell_mask(1, (2, 4, 4), 1.0), "got 1.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()
