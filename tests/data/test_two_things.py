from __future__ import annotations

from dataclasses import replace

import numpy as np

from moviola.data import two_things as world
from moviola.parts.sentence_parser import RuleParser


def test_equal_arguments_give_equal_scenes() -> None:
    first, again, other = world.scenes(3, 40), world.scenes(3, 40), world.scenes(4, 40)
    assert first.captions() == again.captions() != other.captions()
    np.testing.assert_array_equal(first.draw(1), again.draw(1))


def test_each_contrast_changes_what_it_says() -> None:
    true, wrong = world.contrasts(0, 60)
    assert tuple(wrong) == world.CONTRASTS
    told = [sorted(caption.split()) for caption in true.captions()]
    for name, made in wrong.items():
        assert (made.ground_N == true.ground_N).all()
        assert all(a != b for a, b in zip(made.captions(), true.captions(), strict=True)), name
        same = [
            sorted(caption.split()) == words for caption, words in zip(made.captions(), told, strict=True)
        ]
        assert all(same) == any(same) == (name == "swapped attributes"), name
    roles = wrong["swapped roles"]
    for n in range(len(true)):
        assert roles.regions(n).keys() == true.regions(n).keys()
        assert sorted(roles.at_NT2[n].tolist()) == sorted(true.at_NT2[n].tolist())


def _retold(scenes: world.Scenes) -> world.Scenes:
    """The same scene with the relation that its places show."""
    step_N2 = scenes.at_NT2[:, 0] - scenes.at_NT2[:, 1]
    across_N = np.abs(step_N2[:, 0]) > np.abs(step_N2[:, 1])
    relation_N = np.where(across_N, (step_N2[:, 0] > 0).astype(int), 2 + (step_N2[:, 1] > 0))
    return replace(scenes, relation_N=relation_N)


def test_captions_say_where_the_things_are() -> None:
    true, wrong = world.contrasts(1, 60)
    for made in (true, *wrong.values()):
        assert _retold(made).captions() == made.captions()


def test_boxes_hold_the_things() -> None:
    scenes = world.scenes(2, 50, alone=0.5)
    pixels_NSS3 = scenes.draw(0).astype(int)
    for n in range(len(scenes)):
        regions = scenes.regions(n)
        assert len(regions) == (1 if scenes.alone_N[n] else 2)
        strange_SS = (np.abs(pixels_NSS3[n] - scenes.ground_N[n]) > 40).any(-1)
        for ((left, top, right, bottom),) in regions.values():
            box = np.s_[top : bottom + 1, left : right + 1]
            assert strange_SS[box].any()
            strange_SS[box] = False
        assert not strange_SS.any()


def test_every_word_is_one_token() -> None:
    scenes = world.scenes(0, 200)
    tokens_NL = world.tensors(scenes, 0)["text"]
    counts = [len(caption.split()) + 2 for caption in scenes.captions()]
    assert (tokens_NL != 0).sum(1).tolist() == counts


def test_the_rule_parser_agrees_with_the_true_parses() -> None:
    true, _ = world.contrasts(0, 30)
    for parse in true.parses():
        got = RuleParser().parse(parse.sentence)
        assert (got.entities, got.relations) == (parse.entities, parse.relations)
