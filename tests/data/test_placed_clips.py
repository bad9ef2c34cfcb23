from __future__ import annotations

import numpy as np

from moviola.data import placed_clips as world


def test_clips_are_seeded_and_every_action_comes_as_often():
    clips = world.placed_clips(3, 32)
    again = world.placed_clips.__wrapped__(3, 32)
    assert (again.frames_NTSSC == clips.frames_NTSSC).all()
    assert np.bincount(clips.label_N).tolist() == [2] * len(world.ACTIONS)
    assert clips.frames_NTSSC.shape == (32, world.FRAMES, world.SIDE, world.SIDE, 3)
    assert not (world.placed_clips(4, 32).frames_NTSSC == clips.frames_NTSSC).all()
    assert (world.placed_clips(3, 32, split="test").frames_NTSSC != clips.frames_NTSSC).any()


def test_what_changes_is_in_the_actions_quarter_and_runs_its_way():
    clips = world.placed_clips(0, 64)
    frames = clips.frames_NTSSC.astype(np.float32)
    change_NSS = np.abs(frames - frames.mean(axis=1, keepdims=True)).sum(axis=(1, 4))
    half = world.SIDE // 2
    quarters = change_NSS.reshape(64, 2, half, 2, half).sum(axis=(2, 4)).reshape(64, 4)
    assert (quarters.argmax(axis=1) == clips.label_N // 4).mean() > 0.95
    # the centre of what differs from the clip's mean moves the action's way
    excess = np.abs(frames - np.median(frames, axis=1, keepdims=True)).sum(axis=4)
    excess = np.where(excess > 60, excess, 0)[:, [0, -1]]
    place = np.indices((world.SIDE, world.SIDE))
    centre = (excess[:, :, None] * place).sum(axis=(3, 4)) / excess.sum(axis=(2, 3))[..., None].clip(1)
    moved_N2 = (centre[:, 1] - centre[:, 0])[:, ::-1]
    way_N2 = np.array(list(world.WAYS.values()))[clips.label_N % 4]
    assert ((moved_N2 * way_N2).sum(axis=1) > 1).mean() > 0.9


def test_shuffled_clips_have_the_same_frames():
    clips = world.placed_clips(1, 16)
    mixed = clips.shuffled(5)
    assert (mixed.label_N == clips.label_N).all()
    assert (mixed.frames_NTSSC != clips.frames_NTSSC).any()
    for a, b in zip(mixed.frames_NTSSC, clips.frames_NTSSC):
        assert sorted(f.tobytes() for f in a) == sorted(f.tobytes() for f in b)
    assert clips.pixels().shape == (16, world.FRAMES, 3, world.SIDE, world.SIDE)
    assert clips.pixels().max() <= 255
