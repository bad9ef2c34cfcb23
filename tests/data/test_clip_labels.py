from __future__ import annotations

import numpy as np
import pytest
import torch

from moviola.data import clip_labels
from moviola.data.clip_labels import Labeller, described, statistics_of
from moviola.data.clip_statistics import NAMES, labels_of
from moviola.data.placed_clips import placed_clips
from moviola.media import write_video
from moviola.media.flow import optical_flow
from moviola.types import MediaError, UsageError

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def clips():
    return placed_clips(0, 4).frames_NTSSC


def square_that_moves(frames=20, size=(96, 128)):
    """A textured red square that runs to the right through the lower left of a grey frame."""
    made = np.full((frames, *size, 3), 110, np.uint8)
    grain = np.random.default_rng(0).integers(0, 60, (16, 16, 3), np.uint8)
    for t, frame in enumerate(made):
        frame[66:82, 20 + t : 36 + t] = grain + np.array([190, 20, 20], np.uint8)
    return made


def test_labels_of_whole_clips_and_the_cache(clips, monkeypatch):
    label = Labeller(40, flip=0.0, cache=3)
    rgb, labels = label(clips, [7, 8, 9, 10])
    assert (rgb == clips).all()
    assert (labels == labels_of(clips, np.stack([optical_flow(clip) for clip in clips]))).all()
    asked = []
    monkeypatch.setattr(
        clip_labels, "optical_flow", lambda clip, method: asked.append(1) or optical_flow(clip)
    )
    again = label(clips[[1, 0, 3]], [8, 7, 10])[1]
    assert (again == labels[[1, 0, 3]]).all()
    assert len(asked) == 1  # the fourth was one too many to keep
    Labeller(40)(clips, [7, 8, 9, 10])
    assert len(asked) == 5  # without a cache, each again


def test_a_mirrored_clip_has_the_flow_that_is_computed_of_it(clips):
    flow = optical_flow(clips[0])
    rgb, mirrored = Labeller(40).mirrored(clips[0], flow)
    wanted = optical_flow(np.ascontiguousarray(rgb))
    unsigned = Labeller(40, official_flip=True).mirrored(clips[0], flow)[1]
    moves = np.abs(wanted[:, 0]) > 0.5
    assert moves.any()
    assert np.corrcoef(mirrored[:, 0][moves], wanted[:, 0][moves])[0, 1] > 0.9
    assert (unsigned[:, 0] == -mirrored[:, 0]).all()
    assert (unsigned[:, 1] == mirrored[:, 1]).all()


def test_a_view_cuts_clip_and_flow_alike_and_is_seeded():
    clip = np.random.default_rng(0).integers(0, 256, (3, 40, 53, 3), np.uint8)
    flow = clip[:2, ..., :2].transpose(0, 3, 1, 2).astype(np.float32)
    label = Labeller(32, official_flip=True)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        rgb, cut = label.view(clip, flow)
        assert rgb.shape == (3, 32, 32, 3)
        assert (cut == rgb[:2, ..., :2].transpose(0, 3, 1, 2)).all()
        torch.manual_seed(seed)
        assert (label.view(clip, flow)[0] == rgb).all()
        seen.add(rgb.tobytes())
    assert len(seen) > 30
    with pytest.raises(UsageError, match="48 pixels cannot be cut"):
        Labeller(48).view(clip, flow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 100}, "divides by 8"),
        ({"flow": "tvl1"}, "dis or farneback"),
        ({"flip": 1.5}, "flip in"),
        ({"cache": -1}, "cache not negative"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        Labeller(**options)


def test_statistics_of_a_video_file(tmp_path):
    frames = square_that_moves()
    write_video(tmp_path / "a.mp4", frames, 10)
    for source in (frames, tmp_path / "a.mp4", str(tmp_path / "a.mp4")):
        found = statistics_of(source, side=56)
        assert tuple(found) == NAMES
        # the middle 96 of 128 columns are seen, so the square is in the third row's first cells
        assert found["cells, u motion: block"] in (9, 10, 13, 14)
        assert found["cells, diverse: block"] in (9, 10, 13, 14)
        assert found["triangles, u motion: block"] in (5, 6)
        assert found["colour"] == 5
    assert statistics_of(frames, side=56, flow="farneback")["triangles, u motion: block"] in (5, 6)
    assert statistics_of(frames[:8], side=56, frames=8)["colour"] == 5


def test_labels_in_words():
    lines = described(statistics_of(square_that_moves(), side=56)).splitlines()
    assert len(lines) == 27
    assert lines[0].startswith("cells, u motion: block:")
    assert "row " in lines[0]
    assert lines[-1].endswith("5, dark")
    still = described(statistics_of(np.full((16, 64, 64, 3), (0, 0, 250), np.uint8), side=56))
    assert "cells, u motion: block:         no motion" in still
    assert "triangles, u motion: block:     1, top left, by the left edge" in still
    assert "rings, consistent: block:       1 of 4 from the centre" in still
    assert still.endswith("1, blue")


def test_videos_that_do_not_do(tmp_path):
    frames = square_that_moves()
    write_video(tmp_path / "short.mp4", frames[:9], 10)
    with pytest.raises(MediaError, match="needs 16 frames"):
        statistics_of(tmp_path / "short.mp4")
    with pytest.raises(UsageError, match="needs 16 frames"):
        statistics_of(frames[:9])
    with pytest.raises(UsageError, match="uint8 RGB"):
        statistics_of(frames / 255)
    with pytest.raises(UsageError, match="divides by 8"):
        statistics_of(frames, side=100)
