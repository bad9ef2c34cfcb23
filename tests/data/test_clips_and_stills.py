from __future__ import annotations

import torch

from moviola.data import clips_and_stills as joint
from moviola.data import order_clips as world


def test_held_things_are_in_pictures_alone():
    clips, pictures = joint.clip_rows(0, 200, frames=3), joint.picture_rows(0, 200, frames=3)
    for thing in joint.HELD:
        ids = [n for n in world.tokens([thing])[0].tolist() if n > world.END_OF_TEXT]

        def named(rows, ids=ids):
            return sum(all(n in row for n in ids) for row in rows["text"].tolist())

        assert named(clips) == 0
        assert named(pictures) > 0
    assert clips["mask"].all()
    assert 100 < len(clips["text"]) < 200
    assert pictures["mask"].sum(1).tolist() == [1] * 200
    assert not pictures["frames"][:, 1:].any()


def test_rows_are_seeded_and_shuffling_moves_frames_alone():
    plain, again = joint.clip_rows(3, 40, frames=4), joint.clip_rows(3, 40, frames=4)
    mixed = joint.clip_rows(3, 40, frames=4, shuffled=True)
    assert torch.equal(plain["frames"], again["frames"])
    assert torch.equal(plain["text"], mixed["text"])
    assert not torch.equal(plain["frames"], mixed["frames"])
    torch.testing.assert_close(plain["frames"].sum(1), mixed["frames"].sum(1), rtol=1e-4, atol=1e-4)
    both = joint.rows(3, 40, 10, frames=4)
    assert len(both["text"]) == len(plain["text"]) + 10
    assert len(joint.rows(3, 40, 0, frames=4)["text"]) == len(plain["text"])


def test_appearance_accuracy_of_perfect_and_useless_vectors():
    frames, label, thing = joint.held_clips(0, 100, frames=2)
    assert len(frames) == len(label) == len(thing) > 0
    assert {joint.THINGS[n] for n in thing.tolist()} <= set(joint.HELD)

    def encode(tokens):
        return torch.eye(len(tokens))  # a direction for each of 8 x 16 captions

    own = torch.eye(128)[label * 16 + thing]
    assert joint.appearance_accuracy(own, label, thing, encode) == 100
    assert joint.appearance_accuracy(own.roll(1, 1), label, thing, encode) == 0
