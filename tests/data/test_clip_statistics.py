from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file

from moviola.data import clip_statistics as stats
from moviola.types import UsageError

rng = np.random.default_rng


def named(names, labels):
    return dict(zip(names, labels.tolist(), strict=True))


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "43-sts-statistics"
    data = load_file(folder / "labels.safetensors")

    def clips(name):
        low = data[f"in/{name}_low"].repeat(4, axis=2).repeat(4, axis=3)
        return np.concatenate([low, data[f"in/{name}_full"][None]])

    rgb = clips("rgb")[..., ::-1]  # stored as BGR
    u, v = (clips(name).astype(np.float32) * np.float32(40) / np.float32(255) - 20 for name in "uv")
    return json.loads((folder / "labels.json").read_text()), data, rgb, u, v


def test_parity_of_every_label_and_sum(oracle):
    meta, data, rgb, u, v = oracle
    got = {}
    for ending, turn in (("", slice(None)), ("_flipped", slice(None, None, -1))):
        seen = rgb[:, :, :, turn], u[..., turn], v[..., turn]
        got[f"out/motion_labels{ending}"] = stats.motion_statistics(*seen[1:])
        got[f"out/appearance_labels{ending}"] = stats.appearance_statistics(seen[0], official_strip=True)
    sums = [stats.motion_sums(flow) for flow in (u, v)]
    size = np.stack([s.oriented_NKD.sum(axis=2) for s in sums], axis=1)
    cells, rings, triangles = (size[..., part] for part in stats.PATTERNS.values())
    got["out/p1_sums"], got["out/p3_sums"] = cells, triangles
    got["out/p2_means"] = rings / stats.blocks(112).area_K[16:20]
    got["out/frame_sums"] = np.stack([s.frame_NF for s in sums], axis=1)
    got["out/iou"] = np.stack([stats.block_ious(clip) for clip in rgb])
    got["out/clip1_du_dx_sum"] = stats.boundaries(u[1:2])[0][0].sum(axis=0)

    assert set(got) == {name for name in data if name.startswith("out/")}
    for name, value in got.items():
        wanted = data[name]
        assert value.shape == wanted.shape, name
        if "labels" in name:
            assert (value == wanted).all(), name
        else:
            worst = (np.abs(value - wanted) / np.maximum(np.abs(wanted), 1)).max()
            assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def test_the_second_rings_colour_as_intended_and_as_released(oracle):
    """Only the clip that was made for it tells them apart."""
    _, data, rgb, _, _ = oracle
    intended = stats.appearance_statistics(rgb)
    differs = np.argwhere(intended != data["out/appearance_labels"])
    assert differs.tolist() == [[0, 5]]
    assert stats.APPEARANCE_NAMES[5] == "rings, diverse: colour"
    assert (data["out/appearance_labels"][0, 5], intended[0, 5]) == (5, 4)


# --------------------------------------------------------------------------------------------------
# The same, pixel by pixel
# --------------------------------------------------------------------------------------------------


def blocks_one_by_one(side):
    """The 28 lists of pixels, from the definitions."""
    half, cell, width = side // 2, side // 4, side // 8
    places = [(y, x) for y in range(side) for x in range(side)]
    found = [
        [(y, x) for y, x in places if (y // cell, x // cell) == (i, j)] for i in range(4) for j in range(4)
    ]
    inside = []
    for ring in range(1, 5):
        low, high = half - ring * width, half + ring * width
        square = [(y, x) for y, x in places if low <= y < high and low <= x < high]
        found.append([place for place in square if place not in set(inside)])
        inside = square
    for top, left, mirrored in ((0, 0, False), (0, half, True), (half, 0, True), (half, half, False)):
        lower, upper = [], []
        for row in range(half):
            for column in range(half):
                place = (top + row, left + (half - 1 - column if mirrored else column))
                lower += [place] if row >= column else []
                upper += [place] if row <= column else []
        found += [upper, lower] if mirrored else [lower, upper]
    return found


def motion_one_by_one(flow_FHW, frames):
    side = flow_FHW.shape[1]
    around = np.pad(flow_FHW, ((0, 0), (1, 1), (1, 1)), mode="symmetric").astype(np.float64)
    grad = np.zeros((len(flow_FHW), 2, side, side))
    for f in range(len(flow_FHW)):
        for y in range(side):
            for x in range(side):
                near = around[f, y : y + 3, x : x + 3]
                grad[f, 0, y, x] = near[:, 0].sum() - near[:, 2].sum()
                grad[f, 1, y, x] = near[0].sum() - near[2].sum()
    summed = grad.sum(axis=0)
    labels = []
    found = blocks_one_by_one(side)
    for name, part in stats.PATTERNS.items():
        strengths, votes = [], []
        for block in found[part]:
            vote = [0.0] * 8
            for y, x in block:
                dx, dy = summed[:, y, x]
                angle = np.degrees(np.arctan2(dy, dx)) % 360
                low, share = int(angle // 45), angle % 45 / 45
                vote[low % 8] += np.hypot(dx, dy) * (1 - share)
                vote[(low + 1) % 8] += np.hypot(dx, dy) * share
            votes.append(vote)
            strengths.append(sum(vote) / (len(block) if name == "rings" else 1))
        best = int(np.argmax(strengths))
        labels += [best + 1, int(np.argmax(votes[best])) + 1]
    sizes = [np.hypot(*g).sum() for g in grad[: frames - 1]]
    return [*labels, int(np.argmax(sizes)) + 1]


def octant_one_by_one(colours):
    counts = Counter(colours)
    most = max(counts.values())
    red, green, blue = min((c for c in counts if counts[c] == most), key=lambda c: c[::-1])
    order = ("001", "011", "101", "111", "000", "010", "100", "110")
    return order.index("".join(str(int(c >= 128)) for c in (red, green, blue))) + 1


def appearance_one_by_one(rgb_THWC):
    labels = []
    found = blocks_one_by_one(rgb_THWC.shape[1])
    for part in stats.PATTERNS.values():
        ious = []
        for block in found[part]:
            y, x = np.array(block).T
            shares = []
            for colour in range(3):
                counts = [np.bincount(frame[y, x, colour], minlength=256) for frame in rgb_THWC]
                shares.append(np.min(counts, axis=0).sum() / np.max(counts, axis=0).sum())
            ious.append(np.mean(shares))
        for best in (int(np.argmin(ious)), int(np.argmax(ious))):
            colours = [tuple(f[y, x].tolist()) for f in rgb_THWC for y, x in found[part][best]]
            labels += [best + 1, octant_one_by_one(colours)]
    return [*labels, octant_one_by_one([tuple(p) for p in rgb_THWC.reshape(-1, 3).tolist()])]


@pytest.mark.parametrize(("side", "frames", "maps"), [(16, 5, 4), (24, 6, 6)])
def test_labels_equal_those_counted_pixel_by_pixel(side, frames, maps):
    draw = rng(side)
    u, v = draw.normal(size=(2, 2, maps, side, side)).astype(np.float32)
    wanted = []
    for u_FHW, v_FHW in zip(u, v):
        a, b = motion_one_by_one(u_FHW, frames), motion_one_by_one(v_FHW, frames)
        wanted.append([*a[:2], *b[:2], *a[2:4], *b[2:4], *a[4:6], *b[4:6], a[6], b[6]])
    assert stats.motion_statistics(u, v, frames=frames).tolist() == wanted
    # few colours, so that some are frequent
    rgb = (draw.integers(0, 6, (2, frames, side, side, 3)) * 50).astype(np.uint8)
    rgb[:, 0, : side // 2] = 7
    assert stats.appearance_statistics(rgb).tolist() == [appearance_one_by_one(clip) for clip in rgb]


def test_blocks_are_those_of_the_definitions():
    grid = stats.blocks(24)
    wanted = np.zeros_like(grid.mask_KP)
    for k, places in enumerate(blocks_one_by_one(24)):
        wanted[k, [y * 24 + x for y, x in places]] = True
    assert (grid.mask_KP == wanted).all()
    assert (grid.member_KA[:, grid.atom_P] == wanted).all()
    assert stats.blocks(112).area_K[20:].tolist() == [1596] * 8


# --------------------------------------------------------------------------------------------------
# What the card lists
# --------------------------------------------------------------------------------------------------


def test_a_constant_flow_changes_no_motion_label():
    u, v = rng(1).integers(-160, 160, (2, 3, 15, 56, 56)).astype(np.float32) / 16  # exact sums
    wanted = stats.motion_statistics(u, v)
    assert (stats.motion_statistics(u + 3, v - 7.5) == wanted).all()
    each = rng(2).integers(-8, 8, (3, 15, 1, 1)).astype(np.float32)  # another constant in every frame
    assert (stats.motion_statistics(u + each, v - each) == wanted).all()


@pytest.mark.parametrize("cell", range(1, 17))
def test_a_square_that_moves_is_found_in_its_cell(cell):
    u = np.zeros((1, 16, 112, 112), np.float32)
    row, column = divmod(cell - 1, 4)
    u[:, :, row * 28 + 8 : row * 28 + 20, column * 28 + 8 : column * 28 + 20] = 4
    v = np.zeros_like(u)
    v[:, 5] = u[:, 5]
    labels = named(stats.MOTION_NAMES, stats.motion_statistics(u, v)[0])
    assert labels["cells, u motion: block"] == labels["cells, v motion: block"] == cell
    assert (labels["u motion: frame"], labels["v motion: frame"]) == (1, 6)
    ring = 4 if row in (0, 3) or column in (0, 3) else 2
    assert labels["rings, u motion: block"] in (ring, ring - 1)


def test_directions_of_a_boundary():
    """Flow that rises to the right has, by convolution, a gradient to the left; then others."""
    y_HW, x_HW = np.indices((56, 56))
    for flow_HW, direction in ((x_HW, 5), (-x_HW, 1), (y_HW, 7), (-y_HW, 3), (-x_HW - y_HW, 2)):
        flow = np.broadcast_to(flow_HW.astype(np.float32), (1, 15, 56, 56))
        labels = stats.motion_statistics(flow, flow)[0]
        assert labels[[9, 11]].tolist() == [direction, direction]


def test_no_motion_at_all():
    still = np.full((2, 15, 112, 112), 3.3, np.float32)
    assert stats.motion_statistics(still, still).tolist() == [[0] * 4 + [1] * 8 + [1, 1]] * 2


def test_a_static_clip_shares_all_its_colours():
    clip = np.broadcast_to(rng(3).integers(0, 256, (1, 56, 56, 3), np.uint8), (16, 56, 56, 3))
    assert (stats.block_ious(clip) == 1).all()
    labels = named(stats.APPEARANCE_NAMES, stats.appearance_statistics(clip[None])[0])
    assert all(labels[f"{p}, {w}: block"] == 1 for p in stats.PATTERNS for w in ("diverse", "consistent"))


def test_a_block_that_flickers_is_the_diverse_one():
    clip = np.broadcast_to(rng(4).integers(0, 100, (1, 64, 64, 3), np.uint8), (16, 64, 64, 3)).copy()
    clip[::2, 16:32, 32:48], clip[1::2, 16:32, 32:48] = (255, 0, 0), (0, 0, 255)
    clip[0, 16:32, 32:48] = (0, 0, 255)
    labels = named(stats.APPEARANCE_NAMES, stats.appearance_statistics(clip[None])[0])
    assert labels["cells, diverse: block"] == 7
    assert labels["cells, diverse: colour"] == 1  # blue in 9 of 16 frames
    assert labels["triangles, diverse: block"] in (3, 4)  # of the top right quadrant
    assert labels["cells, consistent: block"] == 1


@pytest.mark.parametrize(
    ("colour", "label"),
    [
        ((0, 0, 200), 1),
        ((0, 128, 255), 2),
        ((128, 0, 128), 3),
        ((255, 255, 255), 4),
        ((127, 127, 127), 5),
        ((0, 128, 0), 6),
        ((200, 0, 0), 7),
        ((200, 200, 0), 8),
    ],
)
def test_dominant_colours(colour, label):
    clip = np.zeros((1, 2, 8, 8, 3), np.uint8)
    clip[:, :, :, :5] = colour
    clip[0, 0, 0, 5:] = 255 - np.array(colour)
    assert stats.appearance_statistics(clip)[0, -1] == label


def test_of_colours_as_frequent_the_one_of_least_blue_is_taken():
    clip = np.zeros((1, 2, 8, 8, 3), np.uint8)
    clip[:, 0], clip[:, 1] = (255, 200, 10), (0, 0, 11)
    assert stats.appearance_statistics(clip)[0, -1] == 8


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_flow_that_does_not_fit():
    u = np.zeros((1, 15, 64, 64), np.float32)
    with pytest.raises(UsageError, match="need the optical flow"):
        stats.motion_statistics(None, None)
    for count in (0, 14, 17):
        with pytest.raises(UsageError, match=f"15 or 16 flow maps, got {count}"):
            stats.motion_statistics(*np.zeros((2, 1, count, 64, 64), np.float32))
    assert stats.motion_statistics(u[:, :7], u[:, :7], frames=8).shape == (1, 14)
    with pytest.raises(UsageError, match="of one shape"):
        stats.motion_statistics(u, u[..., :56])
    with pytest.raises(UsageError, match=r"\(N, F, S, S\)"):
        stats.motion_statistics(u[..., :56], u[..., :56])
    with pytest.raises(UsageError, match="not finite"):
        stats.motion_statistics(u, u * np.nan)


@pytest.mark.parametrize("side", [4, 60, 100, 0])
def test_sides_that_do_not_divide_by_8(side):
    flow = np.zeros((1, 15, side, side), np.float32)
    with pytest.raises(UsageError, match=f"divides by 8, got {side}"):
        stats.motion_statistics(flow, flow)
    with pytest.raises(UsageError, match=f"divides by 8, got {side}"):
        stats.appearance_statistics(np.zeros((1, 16, side, side, 3), np.uint8))


def test_pixels_that_are_no_colours():
    clip = rng(5).integers(0, 256, (1, 4, 16, 16, 3)).astype(np.float32)
    wanted = stats.appearance_statistics(clip.astype(np.uint8))
    assert (stats.appearance_statistics(clip + 1e-4) == wanted).all()  # rounded
    for bad in (clip - 30, clip + 30, clip / 0.27 - 2, clip * np.nan):
        with pytest.raises(UsageError, match="from 0 to 255, got"):
            stats.appearance_statistics(bad)
    with pytest.raises(UsageError, match="with two frames or more"):
        stats.appearance_statistics(clip[:, :1])
    with pytest.raises(UsageError, match=r"\(N, T, S, S, 3\)"):
        stats.appearance_statistics(clip[..., :2])
    with pytest.raises(UsageError, match=r"\(N, T, S, S, 3\)"):
        stats.appearance_statistics(clip[:, :, :8])


def test_flow_of_another_size_than_the_clip():
    clip = np.zeros((1, 16, 64, 64, 3), np.uint8)
    with pytest.raises(UsageError, match="other sizes"):
        stats.labels_of(clip, np.zeros((1, 15, 2, 56, 56), np.float32))
    with pytest.raises(UsageError, match="15 or 16 flow maps"):
        stats.labels_of(clip, np.zeros((1, 14, 2, 64, 64), np.float32))
    assert stats.labels_of(clip, np.zeros((1, 15, 2, 64, 64), np.float32)).shape == (1, len(stats.NAMES))
    assert len(set(stats.NAMES)) == 27
