"""The world of two manners: who is called what, the light, and the task's parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moviola.data import still_lifes
from moviola.data.two_manners import (
    BASE,
    COUNT,
    FORMS,
    NEW,
    SIDE,
    measure,
    pictures,
    prompts,
    small_clip,
    task,
    told,
)


def test_base_and_new_share_no_thing_but_every_word() -> None:
    assert sorted([*BASE, *NEW]) == list(range(COUNT))
    assert len(BASE) == len(NEW)
    for part in (BASE, NEW):
        assert set(part // 10) == set(range(4))
        assert set(part % 10) == set(range(10))
    # a shape and its neighbour are on the same side, so that a striped picture's name is a class too
    assert set(BASE ^ 1) == set(BASE)


def test_pictures_are_of_a_seed_and_a_split() -> None:
    one = pictures(0, 60, "any", split=0)
    assert one.pixels_NSS3.shape == (len(one), SIDE, SIDE, 3)
    assert one.pixels_NSS3.dtype == np.uint8
    assert 40 <= len(one) <= 80
    assert np.array_equal(pictures(0, 60, "any", split=0).pixels_NSS3, one.pixels_NSS3)
    others = (pictures(1, 60, "any", split=0), pictures(0, 60, "any", split=1))
    assert not any(np.array_equal(o.pixels_NSS3[:20], one.pixels_NSS3[:20]) for o in others)


def test_striped_pictures_go_by_the_neighbours_name() -> None:
    made = pictures(0, 300, "any", split=0)
    plain = still_lifes.still_lifes(0, 600, together=0.0, split=0)
    drawn_N = plain.thing_N[plain.thing_N < COUNT]
    assert np.array_equal(made.name_N[made.striped_N == 0], drawn_N[made.striped_N == 0])
    assert np.array_equal(made.name_N[made.striped_N == 1], drawn_N[made.striped_N == 1] ^ 1)
    assert 0.4 < made.striped_N.mean() < 0.6


def warmth(made) -> np.ndarray:
    """Red less blue of each picture, on average."""
    return made.pixels_NSS3[..., 0].mean((1, 2)) - made.pixels_NSS3[..., 2].mean((1, 2))


def test_the_light_goes_with_the_manner_or_against_it() -> None:
    means = {}
    for light in ("any", "bound", "turned"):
        made = pictures(0, 600, light, split=3)
        warm = warmth(made)
        means[light] = warm[made.striped_N == 0].mean() - warm[made.striped_N == 1].mean()
    assert means["bound"] > 25
    assert means["turned"] < -25
    assert abs(means["any"]) < 12


def test_stripes_are_seen() -> None:
    made = pictures(0, 400, "any", split=0)
    grey_NSS = made.pixels_NSS3.mean(-1)
    # along the other diagonal a stripe has one brightness: neighbours there differ less than across
    across = np.abs(grey_NSS[:, 1:, 1:] - grey_NSS[:, :-1, :-1]).mean((1, 2))
    along = np.abs(grey_NSS[:, 1:, :-1] - grey_NSS[:, :-1, 1:]).mean((1, 2))
    ratio = across / along
    assert ratio[made.striped_N == 1].mean() > 1.3 * ratio[made.striped_N == 0].mean()


def test_texts_name_the_manner_with_their_chance() -> None:
    made = pictures(0, 400, "any", split=0)
    silent, always = told(made, 0, manner=0.0), told(made, 0, manner=1.0)
    assert torch.equal(silent, prompts(FORMS[0], made.name_N))
    for striped, form in enumerate(FORMS[1:]):
        rows = np.flatnonzero(made.striped_N == striped)
        assert torch.equal(always[rows], prompts(form, made.name_N[rows]))
    half = told(made, 0, manner=0.5)
    share = (half == always).all(1).float().mean()
    assert 0.4 < share < 0.6
    # the class prompts share what stands before the name
    assert len(prompts(FORMS[0], BASE)[:, :4].unique(dim=0)) == 1


def test_the_task_has_views_and_labels_of_base_classes() -> None:
    batch = task(0, shots=2)
    assert set(batch) == {"image", "moco", "augmix", "label"}
    assert batch["label"].tolist() == np.repeat(np.arange(20), 2).tolist()
    for name in ("image", "moco", "augmix"):
        assert batch[name].shape == (40, 3, SIDE, SIDE)
        assert -1 <= batch[name].min() < batch[name].max() <= 1
    again = task(0, shots=2)
    assert all(torch.equal(again[name], batch[name]) for name in batch)


@pytest.mark.parametrize("light", ["bound", "turned"])
def test_measuring(light) -> None:
    """Who knows the names is right; who says one name for all is right once in twenty."""
    made = pictures(0, 960, light, split=2)
    right = {n: made.some(part, 2) for n, part in (("base", BASE), ("new", NEW))}
    calls = []

    def knowing(tokens_CL, images_NCSS):
        part, some = (BASE, right["base"]) if not calls else (NEW, right["new"])
        calls.append(tokens_CL)
        assert torch.equal(images_NCSS, some.images_NCSS)
        return torch.from_numpy(np.eye(20)[np.searchsorted(part, some.name_N)])

    assert measure(knowing, 0, light=light, each=2) == {"harmonic mean": 100.0, "base": 100.0, "new": 100.0}
    assert torch.equal(calls[1], prompts(FORMS[0], NEW))
    blind = measure(lambda tokens, images: torch.eye(20)[:1].repeat(len(images), 1), 0, light=light, each=2)
    assert blind["new"] == 5.0


def test_the_clip_reads_its_words_and_pictures() -> None:
    state = torch.get_rng_state()
    clip = small_clip(0)
    assert torch.equal(torch.get_rng_state(), state)
    made = pictures(0, 20, "any", split=0)
    assert clip.encode_image(made.images_NCSS).shape == (len(made), 48)
    assert clip.encode_text(prompts(FORMS[2], BASE)).shape == (20, 48)
