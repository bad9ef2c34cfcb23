from __future__ import annotations

import numpy as np
import torch

from moviola.data import reworded as world


def test_base_and_new_things_share_every_colour_and_shape():
    assert len(world.BASE) == len(world.NEW) == 18
    assert not set(world.BASE) & set(world.NEW)
    plain, told = world.names(reworded=False), world.names(reworded=True)
    for half in (world.BASE, world.NEW):
        words = [plain[n].split() for n in half]
        assert len({colour for colour, _ in words}) == len({shape for _, shape in words}) == 6
    assert [" ".join(name.split()[::-1]) for name in told] == plain


def test_texts_begin_and_end_with_their_marks():
    tokens = world.prompts()
    assert (tokens[:, 0] == world.START).all()
    assert tokens.shape == (36, world.CONTEXT_LENGTH)
    assert ((tokens == world.END).sum(1) == 1).all()
    model = world.small_clip(0)
    assert torch.equal(model.eot_positions(tokens), torch.full((36,), 6))
    assert model.encode_text(tokens).shape == (36, 64)


def test_pictures_are_seeded_and_haze_only_pales_them():
    image, label = world.pictures(3, 2)
    again, _ = world.pictures(3, 2)
    hazy, same = world.pictures(3, 2, hazy=True)
    assert torch.equal(image, again)
    assert torch.equal(label, same)
    assert torch.equal(label, torch.arange(36).repeat_interleave(2))
    left, added = world.HAZE
    pixels = (image + 1) * 127.5
    assert torch.allclose((hazy + 1) * 127.5, left * pixels + added, atol=0.51)
    assert not torch.equal(image, world.pictures(4, 2)[0])


def test_the_task_numbers_its_classes_in_order():
    data = world.of_classes(*world.pictures(0, 2), world.NEW)
    assert len(data) == 36
    assert torch.equal(data.label_N, torch.arange(18).repeat_interleave(2))
    batch = data.batch(np.array([5, 0]), seed=0, epoch=0, step=0)
    assert batch["label"].tolist() == [2, 0]
    assert batch["image"].shape == (2, 3, world.SIDE, world.SIDE)


def test_figures_of_a_model_that_knows_nothing_are_about_chance():
    figures = world.measure(world.small_clip(0).eval(), 0, per_class=10)
    assert set(figures) == {"base", "new", "harmonic mean"}
    assert max(figures["base"], figures["new"]) < 25
    assert world.harmonic_mean(50, 100) == 2 * 50 * 100 / 150
    assert world.harmonic_mean(0, 0) == 0
