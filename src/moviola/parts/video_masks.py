"""Which tokens of a clip an encoder sees and a decoder reconstructs: masks over a grid of tubelets.

Masks are bool, True where a token is left out, and lie over the tokens of a clip layer after layer, each
layer row after row. Tube masks: Tong et al. 2022 (VideoMAE); running cells: Wang et al. 2023 (VideoMAE V2).
Draws come from `generator`, or from torch's global one where there is none.

Axis letters: B clips, U layers in time, H rows, W columns, S places of a layer (H * W), N tokens (U * S),
K tokens that are kept, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moviola.types import UsageError

Grid = tuple[int, int, int]
"""Layers in time, rows and columns."""
_CELL = 4  # places of a cell of 2 x 2, read row by row


def tube_mask(
    count: int, grid: Grid, ratio: float = 0.9, *, generator: torch.Generator | None = None
) -> Tensor:
    """hidden_BN: floor(ratio * S) places of each clip, drawn once and hidden in every layer."""
    layers, rows, columns = grid
    places = rows * columns
    hidden = int(ratio * places) if 0 < ratio < 1 else 0
    if not 0 < hidden < places:
        raise UsageError(
            f"A tube mask hides some of the {places} places and leaves some: its ratio lies between 0 and 1, "
            f"got {ratio}, which hides {int(ratio * places)}."
        )
    order_BS = torch.rand(count, places, generator=generator).argsort(1)
    hidden_BS = torch.zeros(count, places, dtype=torch.bool).scatter_(1, order_BS[:, :hidden], True)
    return hidden_BS.repeat(1, layers)


def running_cell_mask(
    count: int,
    grid: Grid,
    ratio: float = 0.5,
    *,
    phase_B: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """skipped_BN: int(4 * ratio) of every 2 x 2 cell's places, which run on by one from layer to layer.

    All cells of a layer are alike, so every layer skips the same share, and over any four layers each place
    is skipped int(4 * ratio) times. Phase p (0 to 3, drawn where not given) begins p + 1 shifts on.
    """
    layers, rows, columns = grid
    skipped = int(_CELL * ratio)
    if not 0 < skipped < _CELL:
        raise UsageError(
            f"A running cell skips 1, 2 or 3 of its 4 places: a ratio of 0.25 to 0.99, got {ratio}."
        )
    if rows % 2 or columns % 2:
        raise UsageError(
            f"Cells of 2 x 2 need an even number of rows and columns, got {rows} x {columns}.",
            hint="Choose another picture or patch size, or reconstruct all hidden tokens (decoder_ratio=0).",
        )
    if phase_B is None:
        phase_B = torch.randint(_CELL, (count,), generator=generator)
    place_HW = 2 * (torch.arange(rows) % 2)[:, None] + torch.arange(columns) % 2
    shift_BU = phase_B[:, None] + 1 + torch.arange(layers)
    return ((place_HW.flatten() + shift_BU[..., None]) % _CELL < skipped).flatten(1)


def kept(mask_BN: Tensor) -> Tensor:
    """index_BK of the tokens that a mask keeps, in rising order; each clip keeps as many."""
    if mask_BN.ndim != 2 or mask_BN.dtype != torch.bool:
        raise UsageError(f"A mask is bool (B, N), got {mask_BN.dtype} {tuple(mask_BN.shape)}.")
    keep_BN = ~mask_BN
    counts = keep_BN.sum(1)
    if not len(counts) or int(counts.min()) == 0:
        raise UsageError("A mask must keep at least one token of every clip.")
    if int(counts.min()) != int(counts.max()):
        raise UsageError(
            f"All clips must keep equally many tokens, got {int(counts.min())} to {int(counts.max())}.",
            hint="Draw the masks with one ratio.",
        )
    return keep_BN.nonzero()[:, 1].unflatten(0, (len(mask_BN), -1))


def take(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """x_BKD: the tokens of each clip that its row of indices names."""
    return x_BND.gather(1, index_BK[..., None].expand(-1, -1, x_BND.shape[-1]))
