from __future__ import annotations

import torch

from moviola.data.order_clips import order_clips
from moviola.systems.video.tiktok_videomae import small_model
from moviola.training.few_labels import few_label_accuracy, small_pixels, unlabelled


def test_clips_are_halved():
    clips = order_clips(0, 4)
    frames = small_pixels(clips)
    assert frames.shape == (4, 8, 3, 16, 16)
    torch.testing.assert_close(frames[1, 2, :, 3, 4], clips.pixels()[1, 2, :, 6:8, 8:10].mean((-1, -2)))


def test_unlabelled_clips_are_of_both_splits_and_may_be_shuffled():
    plain, mixed = unlabelled(0, 16), unlabelled(0, 16, shuffled=True)
    assert plain.shape == mixed.shape == (16, 8, 3, 16, 16)
    assert torch.equal(plain[:8], small_pixels(order_clips(1000, 8)))
    assert torch.equal(plain[8:], small_pixels(order_clips(1000, 8, split="test")))
    assert not torch.equal(plain, mixed)
    torch.testing.assert_close(plain.sum(1), mixed.sum(1), atol=1e-3, rtol=1e-3)


def test_the_model_that_is_measured_stays_as_it_was():
    model = small_model(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    figures = few_label_accuracy(model, 0, labelled=16, steps=12, test=16)
    assert all(0 <= value <= 100 for value in figures.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
