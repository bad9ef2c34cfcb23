from __future__ import annotations

import numpy as np
import pytest
import torch

from moviola.data import described as world
from moviola.data.descriptors import class_vectors, sentences
from moviola.types import UsageError


def test_scenes_are_seeded_and_their_truth_shows():
    a, b = world.described(3, 200), world.described(3, 200)
    assert (a.pixels_NSS3 == b.pixels_NSS3).all()
    assert a.captions == b.captions
    assert not (a.pixels_NSS3 == world.described(4, 200).pixels_NSS3).all()
    assert (a.boxes_NM4[..., 2:] > a.boxes_NM4[..., :2]).all()
    colours = np.array([world.world_shapes.COLOURS[name] for name in world.COLOURS])
    for n in range(200):  # the middle of a square or a circle has the colour that is named
        for m in (1, 2):
            if a.regions[n][m].endswith("square"):
                x0, y0, x1, y1 = a.boxes_NM4[n, m]
                middle = a.pixels_NSS3[n, int((y0 + y1) / 2), int((x0 + x1) / 2)].astype(float)
                nearest = world.COLOURS[int(np.abs(colours - middle).sum(1).argmin())]
                assert a.regions[n][m] == f"a {nearest} square"


def test_unseen_combinations_are_kept_out_of_training_only():
    made, later = world.described(0, 2000), world.described(0, 2000, split=1)
    assert not made.unseen_N.any()
    assert 0.1 < later.unseen_N.mean() < 0.3
    badges = world.badges()
    shown = {badges[n] for n in world.badge_class(made)}
    assert shown == set(badges)  # every word and look is met
    assert all(
        badges[n] == text[1][2:] for n, text in zip(world.badge_class(made), made.regions, strict=True)
    )
    named = np.mean([" with a " in caption for caption in made.captions])
    assert 0.2 < named < 0.3


def test_questions_have_the_right_answer_among_the_choices():
    made = world.described(1, 100, split=1)
    asked = world.questions(made)
    told = asked["text"][asked["choices"]]
    assert told.shape[:2] == (100, (len(world.COLOURS) - 1) * len(world.BADGES))
    for n in range(100):
        wanted = f"{made.regions[n][0]} with {made.regions[n][1]}"
        assert torch.equal(told[n, asked["badge"][n]], world.tokens([wanted])[0])
    knows = torch.randn(len(asked["text"]), 16)
    exact = knows[asked["choices"][torch.arange(100), asked["badge"]]]
    assert world.answers(3 * exact, knows, asked).all()
    assert world.answers(torch.randn(100, 16), knows, asked).float().mean() < 0.4
    assert world.batch(made)["region_text"].shape == (100, 3, world.CONTEXT_LENGTH)


def test_words_that_are_not_known_and_no_scenes():
    with pytest.raises(UsageError, match="zebra"):
        world.tokens(["a zebra"])
    with pytest.raises(UsageError, match="at least 1"):
        world.described(0, 0)


def test_sentences_begin_by_their_descriptors_first_word():
    templates = ("a {}.", "one {}")
    assert sentences("lynx", ["tufted ears", " "], templates) == [
        "a lynx. which has tufted ears",
        "one lynx which has tufted ears",
    ]
    starts = [
        "a cat",
        "An animal",
        "antlers",
        "used for hunting",
        "often seen at night",
        "has a tail",
        "may climb",
    ]
    verbs = [
        text.removeprefix("x which ").removesuffix(d) for d in starts for text in sentences("x", [d], ["{}"])
    ]
    assert verbs == ["is ", "is ", "has ", "is ", "", "", ""]
    assert sentences("lynx", [], templates) == ["a lynx.", "one lynx"]


def test_class_vectors_are_plain_means():
    table = {}

    def embed(texts):
        rows = [table.setdefault(text, np.eye(16)[len(table)]) for text in texts]
        return np.stack(rows)

    made = class_vectors(embed, {"lynx": ["ears", "a tail"], "fox": []}, ("a {}.", "one {}."))
    assert made.shape == (2, 16)
    assert sorted(made[0])[-4:] == [0.25] * 4  # not normalised again
    assert np.linalg.norm(made[0]) == pytest.approx(0.5)
    assert sorted(made[1])[-2:] == [0.5] * 2
    with pytest.raises(UsageError, match="a class"):
        class_vectors(embed, {})
    with pytest.raises(UsageError, match="templates"):
        class_vectors(embed, {"a": []}, ("no place",))
