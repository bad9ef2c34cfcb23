import pytest
import torch

from moviola.data import still_lifes as world
from moviola.types import UsageError


def test_seeded_and_split():
    a, b, other = world.still_lifes(3, 60), world.still_lifes(3, 60), world.still_lifes(3, 60, split=1)
    assert (a.pixels_NSS3 == b.pixels_NSS3).all()
    assert (a.faint_NF == b.faint_NF).all()
    assert (a.pixels_NSS3 != other.pixels_NSS3).any()
    assert a.images_NCSS.shape == (60, 3, world.SIDE, world.SIDE)
    assert a.images_NCSS.abs().max() <= 1


def test_faint_features_occur_together_and_the_thing_by_itself():
    tied, free = world.still_lifes(0, 3000), world.still_lifes(0, 3000, together=0.0)

    def agree(scenes):
        return (scenes.faint_NF[:, 0] == scenes.faint_NF[:, 1]).mean()

    assert agree(tied) > 0.6
    assert abs(agree(free) - 1 / 6) < 0.03
    assert abs((tied.thing_N % 6 == tied.faint_NF[:, 0]).mean() - 1 / 6) < 0.03


def test_one_of_each_has_a_caption_of_its_own():
    scenes = world.one_of_each(0)
    named = [True, False, False, False]
    rows = zip(scenes.thing_N.tolist(), scenes.faint_NF.tolist(), strict=True)
    assert len({world.caption(thing, faint, named) for thing, faint in rows}) == len(scenes) == 480


def test_words_and_tokens():
    assert world.caption(3, [0, 4, 2, 1], [True, True, True, True]) == (
        "a red star on gravel with ivory trim with a roof at noon"
    )
    ids_NL = world.tokens(["a red star", "a red star on gravel"])
    assert ids_NL.shape == (2, world.CONTEXT_LENGTH)
    assert (ids_NL == world.END_OF_TEXT).sum(1).tolist() == [1, 1]
    assert ids_NL.max() < world.vocabulary_size()
    assert torch.equal(ids_NL[0, :3], ids_NL[1, :3])
    for name, prompts in world.prompts().items():
        assert len(prompts) == (80 if name == "thing" else 6)
        world.tokens(prompts)
    with pytest.raises(UsageError, match="no word 'dragon'"):
        world.tokens(["a dragon"])


def test_captions_name_as_much_as_asked():
    scenes = world.still_lifes(0, 500)
    length = [(world.captions(scenes, 0, named=share) > 0).sum(1).float().mean() for share in (0, 0.5, 1)]
    assert length[0] == 4  # a, colour, shape, end of text
    assert length[0] < length[1] < length[2]


def test_triples_are_corrupted_as_said():
    scenes = world.still_lifes(3, 300)
    texts = world.triples(scenes, 0, shuffled=0.5, wrong=0.0)
    clean = world.triples(scenes, 0, shuffled=0.0, wrong=0.0)
    assert texts.shuffled_N.sum() == 150
    other_N = (texts.raw_NL != clean.raw_NL).any(1).numpy()
    assert not other_N[~texts.shuffled_N].any()
    assert other_N[texts.shuffled_N].mean() > 0.9
    wrong_N = (world.triples(scenes, 0, wrong=0.5).caption_NL != clean.caption_NL).any(1)
    assert 0.35 < wrong_N.float().mean() < 0.65


def test_a_small_clip_does_not_touch_the_callers_randomness():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = world.small_clip(1), world.small_clip(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    scenes = world.still_lifes(0, 2)
    with torch.no_grad():
        assert a.encode_image(scenes.images_NCSS).shape == a.encode_text(world.tokens(["a", "a red"])).shape


@pytest.mark.parametrize(("count", "together"), [(0, 0.5), (5, 1.5)])
def test_bad_input(count, together):
    with pytest.raises(UsageError, match="a chance from 0 to 1"):
        world.still_lifes(0, count, together=together)
