"""What moves most in a clip and what changes its colours most: the 27 labels of spatio-temporal statistics.

A square frame is cut into 28 blocks in three ways: a 4 x 4 grid of cells, four rings about the centre, and
each quadrant's two triangles. Of every way the labels name the block with the strongest motion boundary and
the boundary's dominant direction (of the horizontal and of the vertical flow), the block whose colours change
most, the one whose colours change least, and the dominant colour of both; and for the whole clip the frame of
strongest motion and the dominant colour. A motion boundary is the gradient of the flow: what the camera adds
to all pixels alike leaves none. Numbers count from 1; of blocks that tie the first is taken.

Wang, Jiao, Bao, He, Liu, Liu: "Self-supervised Video Representation Learning by Uncovering Spatio-temporal
Statistics", TPAMI 2021, arXiv 2008.13426. Known differences are listed in `systems.video.sts_statistics`.

Axis letters: N clips, T frames, F flow maps, H, W pixels of a frame, P pixels, C colours (red, green, blue),
K the 28 blocks, A atoms, D the 8 directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moviola.types import UsageError

FRAMES, SIDE = 16, 112
"""Of the authors' clips; others are handled as `motion_statistics` and `blocks` say."""
PATTERNS = {"cells": slice(0, 16), "rings": slice(16, 20), "triangles": slice(20, 28)}
"""The blocks of each way to cut a frame, among all 28."""
DIRECTIONS = 8
MOTION_NAMES = (
    *(
        f"{p}, {flow} motion: {what}"
        for p in PATTERNS
        for flow in ("u", "v")
        for what in ("block", "direction")
    ),
    "u motion: frame",
    "v motion: frame",
)
APPEARANCE_NAMES = (
    *(
        f"{p}, {which}: {what}"
        for p in PATTERNS
        for which in ("diverse", "consistent")
        for what in ("block", "colour")
    ),
    "colour",
)
NAMES = MOTION_NAMES + APPEARANCE_NAMES
"""u is the horizontal flow, v the vertical one."""


@dataclass(frozen=True)
class Blocks:
    """The 28 blocks of a frame. An atom is the set of pixels that lie in the same blocks.

    mask_KP   which pixels a block has; the diagonal of a quadrant is in both of its triangles
    atom_P    the number of each pixel's atom
    member_KA 1 where an atom lies in a block, else 0
    """

    side: int
    mask_KP: np.ndarray
    atom_P: np.ndarray
    member_KA: np.ndarray

    @property
    def area_K(self) -> np.ndarray:
        return self.mask_KP.sum(axis=1)


@lru_cache(maxsize=8)
def blocks(side: int) -> Blocks:
    """The blocks of a square frame of `side` pixels, which must divide by 8 (by 4 for cells)."""
    if side < 8 or side % 8:
        raise UsageError(
            f"Cells and rings need a square whose side divides by 8, got {side} pixels.",
            hint="Scale or crop to 112, or for example to 56 or 64.",
        )
    y_HW, x_HW = np.indices((side, side))
    cell_HW = y_HW // (side // 4) * 4 + x_HW // (side // 4)
    edge_HW = np.minimum.reduce([y_HW, x_HW, side - 1 - y_HW, side - 1 - x_HW])
    ring_HW = 3 - edge_HW // (side // 8)
    half = side // 2
    below_HW, right_HW = y_HW >= half, x_HW >= half
    mirrored_HW = below_HW ^ right_HW
    row_HW, column_HW = y_HW % half, np.where(mirrored_HW, half - 1 - x_HW % half, x_HW % half)
    quadrant_HW = 2 * below_HW + right_HW
    lower_HW, upper_HW = row_HW >= column_HW, row_HW <= column_HW
    masks = [cell_HW == k for k in range(16)] + [ring_HW == k for k in range(4)]
    for quadrant in range(4):
        first, second = (upper_HW, lower_HW) if quadrant in (1, 2) else (lower_HW, upper_HW)
        masks += [(quadrant_HW == quadrant) & first, (quadrant_HW == quadrant) & second]
    mask_KP = np.stack(masks).reshape(len(masks), -1)
    _, first_A, atom_P = np.unique(mask_KP, axis=1, return_index=True, return_inverse=True)
    return Blocks(side, mask_KP, atom_P.reshape(-1), mask_KP[:, first_A].astype(np.float64))


# --------------------------------------------------------------------------------------------------
# Motion
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MotionSums:
    """What the motion labels are read from.

    oriented_NKD the magnitude of the summed boundary in each block by direction; over all directions it is
                 the block's magnitude. A pixel's is shared by the two directions nearest to its own
    frame_NF     the magnitude of each flow map's own boundary, over the frame
    """

    oriented_NKD: np.ndarray
    frame_NF: np.ndarray


def boundaries(flow_NFHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of flow maps along x and y, each like `flow_NFHW`: 3 x 3 Prewitt kernels, convolved.

    Convolution turns the kernel over, so a flow that rises to the right has a negative gradient.
    """
    padded = np.pad(np.asarray(flow_NFHW, np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    across, down = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    dx = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    return dx, down[..., :-2] + down[..., 1:-1] + down[..., 2:]


def motion_sums(flow_NFHW: np.ndarray, frames: int = FRAMES) -> MotionSums:
    """The sums of one component of the flow. Of F maps the first `frames` - 1 count as frames."""
    grid = blocks(flow_NFHW.shape[-1])
    dx_NFHW, dy_NFHW = boundaries(flow_NFHW)
    # every map's boundary by itself for the frame, and their signed sum for the blocks
    kept = slice(0, frames - 1)
    frame_NF = np.sqrt(dx_NFHW[:, kept] ** 2 + dy_NFHW[:, kept] ** 2).sum(axis=(2, 3), dtype=np.float64)
    dx_NP, dy_NP = (d.sum(axis=1, dtype=np.float64).reshape(len(d), -1) for d in (dx_NFHW, dy_NFHW))
    size_NP = np.hypot(dx_NP, dy_NP)
    place_NP = np.degrees(np.arctan2(dy_NP, dx_NP)) % 360 / (360 / DIRECTIONS)
    low_NP = place_NP.astype(np.int64)
    share_NP = place_NP - low_NP
    atoms = grid.member_KA.shape[1]
    bin_NP = (np.arange(len(dx_NP))[:, None] * atoms + grid.atom_P) * DIRECTIONS
    count = len(dx_NP) * atoms * DIRECTIONS
    oriented = sum(
        np.bincount((bin_NP + (low_NP + step) % DIRECTIONS).ravel(), (size_NP * part).ravel(), count)
        for step, part in ((0, 1 - share_NP), (1, share_NP))
    )
    oriented_NAD = np.asarray(oriented).reshape(len(dx_NP), atoms, DIRECTIONS)
    return MotionSums(grid.member_KA @ oriented_NAD, frame_NF)


def motion_statistics(u_NFHW: np.ndarray, v_NFHW: np.ndarray, *, frames: int = FRAMES) -> np.ndarray:
    """The labels in the order of `MOTION_NAMES`, int64 (N, 14), from the flow's two components.

    Directions count from 0 degrees (1) in steps of 45 by the y axis, which points down. Cells without any
    motion are 0, direction 0; rings and triangles without are 1, direction 1. Clips of `frames` frames have
    `frames` - 1 flow maps, or one more that leads to the frame after the clip. Raises `UsageError` for other
    numbers, for components of different shapes, and for flow that is not finite.
    """
    flows = _checked_flow(u_NFHW, v_NFHW, frames)
    named_N = np.stack([_named_motion(motion_sums(flow, frames), flow.shape[-1]) for flow in flows], axis=1)
    blocks_N12 = named_N[..., :6].reshape(-1, 2, 3, 2).swapaxes(1, 2).reshape(-1, 12)
    return np.concatenate([blocks_N12, named_N[..., 6]], axis=1)


def _named_motion(sums: MotionSums, side: int) -> np.ndarray:
    """Block and direction of each pattern, and the frame: (N, 7) of one component."""
    size_NK, row_N = sums.oriented_NKD.sum(axis=2), np.arange(len(sums.frame_NF))
    named = []
    for pattern, part in PATTERNS.items():
        # rings differ in size, so theirs is a mean
        strength_NK = size_NK[:, part] / (blocks(side).area_K[part] if pattern == "rings" else 1)
        block_N = strength_NK.argmax(axis=1)
        direction_N = sums.oriented_NKD[row_N, part.start + block_N].argmax(axis=1)
        moves_N = strength_NK[row_N, block_N] > 0 if pattern == "cells" else np.ones(len(row_N), bool)
        named += [(block_N + 1) * moves_N, (direction_N + 1) * moves_N]
    return np.stack([*named, sums.frame_NF.argmax(axis=1) + 1], axis=1)


def _checked_flow(u_NFHW: Any, v_NFHW: Any, frames: int) -> list[np.ndarray]:
    if u_NFHW is None or v_NFHW is None:
        raise UsageError(
            "Motion labels need the optical flow of the clip, both components.",
            hint="moviola.media.flow.optical_flow computes it.",
        )
    flows = [np.asarray(flow, np.float32) for flow in (u_NFHW, v_NFHW)]
    shape = flows[0].shape
    if shape != flows[1].shape or len(shape) != 4 or shape[2] != shape[3]:
        raise UsageError(
            f"The flow's components are arrays (N, F, S, S) of one shape, got {shape} and {flows[1].shape}."
        )
    if frames < 2 or shape[1] not in (frames - 1, frames):
        raise UsageError(
            f"A clip of {frames} frames has {frames - 1} or {frames} flow maps, got {shape[1]}.",
            hint="For clips of another length pass frames=.",
        )
    if not all(np.isfinite(flow).all() for flow in flows):
        raise UsageError("The optical flow holds values that are not finite.")
    return flows


# --------------------------------------------------------------------------------------------------
# Appearance
# --------------------------------------------------------------------------------------------------


def block_ious(rgb_THWC: np.ndarray) -> np.ndarray:
    """iou_K of one clip, uint8: how much of a block's colour histograms all frames share.

    Per colour, over 256 bins, the sum of the least count of any frame by the sum of the greatest; the mean of
    the three. 1: the colours never change; 0: no frame has a value that all have.
    """
    grid = blocks(rgb_THWC.shape[1])
    frames, atoms = len(rgb_THWC), grid.member_KA.shape[1]
    bins = np.arange(frames * 3).reshape(frames, 1, 3) * atoms + grid.atom_P[:, None]
    bin_TPC = bins * 256 + rgb_THWC.reshape(frames, -1, 3)
    count_TCAB = np.bincount(bin_TPC.ravel(), minlength=frames * 3 * atoms * 256).astype(np.float32)
    # counts are whole numbers below 2**24, so float32 adds them exactly
    count_TCKB = grid.member_KA.astype(np.float32) @ count_TCAB.reshape(frames, 3, atoms, 256)
    shared_CK = count_TCKB.min(axis=0).sum(axis=-1, dtype=np.float64)
    return np.asarray((shared_CK / count_TCKB.max(axis=0).sum(axis=-1, dtype=np.float64)).mean(axis=0))


def octant(codes: np.ndarray) -> int:
    """The octant, 1 to 8, of the most frequent of colours coded as blue * 65536 + green * 256 + red.

    Of colours as frequent, the one of the least code. Octants split every colour at 128: blue, blue-green,
    blue-red, white, dark, green, red, green-red.
    """
    code_P = np.sort(codes, axis=None)
    start_R = np.flatnonzero(np.diff(code_P, prepend=-1))
    code = int(code_P[start_R[np.diff(start_R, append=len(code_P)).argmax()]])
    blue, green, red = (code >> shift & 128 for shift in (16, 8, 0))
    return 1 + 4 * (not blue) + (green > 0) + 2 * (red > 0)


def appearance_statistics(rgb_NTHWC: np.ndarray, *, official_strip: bool = False) -> np.ndarray:
    """The labels in the order of `APPEARANCE_NAMES`, int64 (N, 13), of RGB clips from 0 to 255.

    A colour is the octant of the single most frequent colour of a block over all frames. Values that are not
    whole are rounded. `official_strip`: the authors' code takes, for the colour of the second ring, the first
    T - side / 8 frames of the whole square in place of the ring's bottom strip, its middle black; their
    labels need it. Raises `UsageError` for other shapes and for values below 0 or above 255.
    """
    shape = np.shape(rgb_NTHWC)
    if len(shape) != 5 or shape[1] < 2 or shape[2] != shape[3] or shape[4] != 3:
        raise UsageError(f"Clips are (N, T, S, S, 3) with two frames or more, got {shape}.")
    rgb = whole_pixels(rgb_NTHWC)
    labels = [_appearance(rgb_THWC, official_strip) for rgb_THWC in rgb]
    return np.array(labels, np.int64).reshape(len(rgb), len(APPEARANCE_NAMES))


def _appearance(rgb_THWC: np.ndarray, official_strip: bool) -> list[int]:
    grid = blocks(rgb_THWC.shape[1])
    iou_K = block_ious(rgb_THWC)
    code_TP = (rgb_THWC.astype(np.int32) @ np.array([1, 256, 65536], np.int32)).reshape(len(rgb_THWC), -1)
    labels = []
    for part in PATTERNS.values():
        for found in (iou_K[part].argmin(), iou_K[part].argmax()):
            block = part.start + int(found)
            official = official_strip and block == PATTERNS["rings"].start + 1
            codes = _second_ring(code_TP, grid.side) if official else code_TP[:, grid.mask_KP[block]]
            labels += [int(found) + 1, octant(codes)]
    return [*labels, octant(code_TP)]


def _second_ring(code_TP: np.ndarray, side: int) -> np.ndarray:
    """The pixels that the authors' code counts in the second ring (see `appearance_statistics`)."""
    width = side // 8
    square_THW = code_TP.reshape(-1, side, side)[:, 2 * width : -2 * width, 2 * width : -2 * width].copy()
    middle = slice(width, -width)
    square_THW[:, middle, middle] = 0
    strips = (square_THW[:, :width], square_THW[:, middle, :width], square_THW[:, middle, -width:])
    return np.concatenate([part.ravel() for part in (*strips, square_THW[:-width])])


def whole_pixels(rgb: Any) -> np.ndarray:
    """Pixels of any shape as uint8: floats are rounded, and must then lie in 0 to 255."""
    given = np.asarray(rgb)
    if given.dtype == np.uint8:
        return given
    whole = np.rint(given)
    if given.size and not (whole.min() >= 0 and whole.max() <= 255):  # also where one is not a number
        raise UsageError(
            f"Colours are counted from 0 to 255, got values from {given.min()} to {given.max()}.",
            hint="Pass pixels as they were decoded, before mean and standard deviation.",
        )
    return whole.astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# Both
# --------------------------------------------------------------------------------------------------


def labels_of(rgb_NTHWC: np.ndarray, flow_NF2HW: np.ndarray, **options: bool) -> np.ndarray:
    """All labels in the order of `NAMES`, int64 (N, 27); see `motion_statistics`, `appearance_statistics`."""
    if rgb_NTHWC.shape[:1] + rgb_NTHWC.shape[2:4] != flow_NF2HW.shape[:1] + flow_NF2HW.shape[3:]:
        raise UsageError(f"The flow {flow_NF2HW.shape} is not of the clips {rgb_NTHWC.shape}: other sizes.")
    motion_N14 = motion_statistics(flow_NF2HW[:, :, 0], flow_NF2HW[:, :, 1], frames=rgb_NTHWC.shape[1])
    return np.concatenate([motion_N14, appearance_statistics(rgb_NTHWC, **options)], axis=1)
