from __future__ import annotations

import pytest
import torch

from moviola.data.order_clips import OrderClips
from moviola.data.stray_frames import OWN, STRAY, stray_clips
from moviola.types import UsageError


def test_own_frames_lie_between_stray_ones():
    made = stray_clips(3, 60)
    assert made.own_NTCSS.shape == (60, OWN, 3, 32, 32)
    assert made.mixed_NRCSS.shape == (60, OWN + STRAY, 3, 32, 32)
    assert torch.equal(made.mixed_NRCSS[:, STRAY // 2 : STRAY // 2 + OWN], made.own_NTCSS)
    for row in range(60):
        stray = torch.cat([made.mixed_NRCSS[row, : STRAY // 2], made.mixed_NRCSS[row, -STRAY // 2 :]])
        assert not any(torch.equal(frame, own) for frame in stray for own in made.own_NTCSS[row])


def test_every_caption_has_one_clip():
    made = stray_clips(0, 200)
    assert len(set(made.captions)) == len(made.tokens_NL) == 200


def test_seeds_decide():
    a, b, c = (stray_clips(seed, 20) for seed in (1, 1, 2))
    assert a.captions == b.captions
    assert torch.equal(a.mixed_NRCSS, b.mixed_NRCSS)
    assert not torch.equal(a.mixed_NRCSS, c.mixed_NRCSS)


def test_what_cannot_be_meant_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="one clip or more"):
        stray_clips(0, 0)
    with pytest.raises(UsageError, match="0 stray frames or more, got 5 and -1"):
        stray_clips(0, 5, stray=-1)
    monkeypatch.setattr(OrderClips, "frame_caption", lambda *_: "a red ring")
    with pytest.raises(UsageError, match="Among 8 clips are 1 captions, fewer than 2"):
        stray_clips(0, 2)
