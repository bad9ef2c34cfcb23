"""The long-tailed made web: its law, its noise, its words and its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moviola.data import long_tail as world
from moviola.data.long_tail import CLASSES, PairBatches, even_pictures, long_tail, metadata, prompts, tokens
from moviola.data.matching import Matcher
from moviola.types import UsageError


@pytest.fixture(scope="module")
def pool():
    return long_tail(3, 6000)


def test_equal_seeds_give_equal_pools_and_others_do_not():
    first, again, other = long_tail(1, 300), long_tail(1, 300), long_tail(2, 300)
    assert first.texts == again.texts
    assert np.array_equal(first.pixels_NSS3, again.pixels_NSS3)
    assert np.array_equal(first.order_C, again.order_C)
    assert first.texts != other.texts
    assert not np.array_equal(first.order_C, other.order_C)


def test_classes_follow_the_zipf_law(pool):
    assert sorted(pool.order_C.tolist()) == list(range(len(CLASSES)))
    count_C = np.bincount(pool.class_N[pool.class_N >= 0], minlength=len(CLASSES))[pool.order_C]
    share_C = 1 / np.arange(1, len(CLASSES) + 1)
    expected_C = count_C.sum() * share_C / share_C.sum()
    # chi-squared has 79 degrees of freedom: mean 79, standard deviation 12.6
    assert ((count_C - expected_C) ** 2 / expected_C).sum() < 79 + 5 * 12.6
    assert count_C[:8].sum() > 10 * count_C[-8:].sum()


def test_half_the_pool_is_noise_and_noise_alone_matches_nothing(pool):
    assert (pool.class_N < 0).sum() == 3000
    assert np.array_equal(Matcher(metadata())(pool.texts).per_text() == 0, pool.class_N < 0)
    assert (long_tail(0, 50, noise=0).class_N >= 0).all()
    assert (long_tail(0, 50, noise=1).class_N < 0).all()


def test_captions_say_what_the_picture_shows(pool):
    """The colours and shapes that match are the picture's own, and three captions in four name both."""
    entries = metadata()
    matches = Matcher(entries)(pool.texts)
    found: dict[int, set[str]] = {}
    for text, entry in zip(matches.text_M.tolist(), matches.entry_M.tolist(), strict=True):
        found.setdefault(text, set()).add(entries[entry])
    names, both = {*world.COLOURS, *world.SHAPES}, 0
    for text, matched in found.items():
        colour, shape = CLASSES[pool.class_N[text]]
        named = matched & names
        assert named
        assert named <= {colour, shape}
        assert (f"{colour} {shape}" in matched) == (len(named) == 2)
        both += len(named) == 2
    assert 0.72 < both / len(found) < 0.78


def test_metadata_is_a_sound_list_that_knows_every_class_and_more():
    entries = metadata()
    Matcher(entries)  # refuses empty and double entries
    assert {" ".join(pair) for pair in CLASSES} < set(entries)


def test_every_text_and_prompt_has_numbers_and_ends_with_the_largest(pool):
    for texts in (pool.texts, prompts()):
        made_NL = tokens(texts)
        assert made_NL.shape == (len(texts), world.CONTEXT_LENGTH)
        assert ((made_NL == world.vocabulary_size() - 1).sum(1) == 1).all()
    assert len(np.unique(tokens(prompts()), axis=0)) == len(CLASSES)
    assert len(np.unique(tokens(["IMG_0001.JPG", "IMG_0010.JPG"]), axis=0)) == 2
    with pytest.raises(UsageError, match="no word 'tortoise'"):
        tokens(["a red tortoise"])


def test_even_pictures_hold_every_class_alike_and_are_new(pool):
    pixels_NSS3, class_N = even_pictures(3, 2)
    assert np.bincount(class_N).tolist() == [2] * len(CLASSES)
    assert pixels_NSS3.shape == (160, world.SIDE, world.SIDE, 3)
    old = {picture.tobytes() for picture in pool.pixels_NSS3}
    assert not any(picture.tobytes() in old for picture in pixels_NSS3)


def test_pictures_show_their_colour_and_shape():
    """The mean over many pictures of a class: its colour in the middle, except where a shape is open."""
    pixels_NSS3, class_N = even_pictures(0, 60)
    mean_CSS3 = np.stack([pixels_NSS3[class_N == c].mean(0) for c in range(len(CLASSES))])
    middle = slice(world.SIDE // 2 - 2, world.SIDE // 2 + 2)
    table = np.array([world.world_shapes.COLOURS[name] for name in world.COLOURS])
    for c, (colour, shape) in enumerate(CLASSES):
        if shape in ("ring", "crescent", "arrow"):
            continue
        distance = np.linalg.norm(table - mean_CSS3[c, middle, middle].mean((0, 1)), axis=1)
        assert world.COLOURS[distance.argmin()] == colour, (colour, shape)
    filled, ring = (CLASSES.index(("black", shape)) for shape in ("circle", "ring"))
    assert mean_CSS3[ring, middle, middle].mean() > mean_CSS3[filled, middle, middle].mean() + 40


def test_batches_hold_the_rows_asked_for(pool):
    rows = np.array([5, 17, 4000])
    data = PairBatches(pool, rows)
    batch = data.batch(np.array([2, 0]), seed=0, epoch=0, step=0)
    assert len(data) == 3
    assert torch.equal(batch["image"], world.pixels(pool.pixels_NSS3[[4000, 5]]))
    assert batch["text"].tolist() == tokens([pool.texts[4000], pool.texts[5]]).tolist()
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1


@pytest.mark.parametrize(("count", "noise"), [(0, 0.5), (10, -0.1), (10, 1.5), (10, float("nan"))])
def test_refuses_what_is_no_pool(count, noise):
    with pytest.raises(UsageError, match="0 to 1"):
        long_tail(0, count, noise=noise)
