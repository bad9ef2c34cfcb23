from __future__ import annotations

import sys

import numpy as np
import pytest

from moviola.media.flow import optical_flow
from moviola.types import MissingExtra, UsageError


def texture(seed=0, side=64):
    """A smooth random picture, 24 pixels larger each way, to cut windows from."""
    picture = np.random.default_rng(seed).normal(size=(side + 24, side + 24))
    waves = np.fft.fftfreq(side + 24)
    smooth = np.fft.ifft2(np.fft.fft2(picture) * np.exp(-((waves[:, None] ** 2 + waves**2) * 300))).real
    grey = np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def moving(right, down, frames=4, side=64):
    """What a window sees of a picture that moves by so many pixels a frame."""
    whole = texture(side=side)
    starts = [(12 - down * t, 12 - right * t) for t in range(frames)]
    return np.stack([whole[top : top + side, left : left + side] for top, left in starts])


@pytest.mark.parametrize("method", ["dis", "farneback"])
@pytest.mark.parametrize(("right", "down"), [(2, 0), (-3, 0), (0, 2), (1, -2)])
def test_a_picture_that_moves(method, right, down):
    pytest.importorskip("cv2")
    flow_T2HW = optical_flow(moving(right, down), method)
    assert (flow_T2HW.shape, flow_T2HW.dtype) == ((3, 2, 64, 64), np.float32)
    middle = np.median(flow_T2HW[..., 12:-12, 12:-12], axis=(0, 2, 3))
    assert np.abs(middle - [right, down]).max() < 0.3


@pytest.mark.parametrize("method", ["dis", "farneback"])
def test_frames_that_are_equal_do_not_move(method):
    pytest.importorskip("cv2")
    frames = moving(2, 1)
    frames[2] = frames[1]
    flow = optical_flow(frames, method)
    assert (flow[1] == 0).all()
    assert (flow[0] != 0).any()


def test_a_clip_has_the_same_flow_again_and_from_any_memory_order():
    pytest.importorskip("cv2")
    frames = moving(1, 2)
    wanted = optical_flow(frames)
    assert (optical_flow(frames) == wanted).all()
    turned = np.ascontiguousarray(frames[:, ::-1])[:, ::-1]
    assert (optical_flow(turned) == wanted).all()


def test_bad_input():
    frames = moving(1, 0)
    with pytest.raises(UsageError, match="dis or farneback, got 'tvl1'"):
        optical_flow(frames, "tvl1")
    with pytest.raises(UsageError, match="uint8 RGB"):
        optical_flow(frames / 255)
    with pytest.raises(UsageError, match="uint8 RGB"):
        optical_flow(frames[..., 0])
    with pytest.raises(UsageError, match="two frames or more"):
        optical_flow(frames[:1])
    with pytest.raises(UsageError, match="16 x 16"):
        optical_flow(frames[:, :8])


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtra, match=r"moviola\[flow\]"):
        optical_flow(moving(1, 0))
