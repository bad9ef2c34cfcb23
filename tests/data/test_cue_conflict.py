from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moviola.data import cue_conflict as cues
from moviola.data.cue_conflict import cue_pairs, mix_spectra, read_cue_conflict
from moviola.types import UsageError


def picture(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


# --------------------------------------------------------------------------------------------------
# The published layout
# --------------------------------------------------------------------------------------------------


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(len(name), (8, 8)).save(path)


def test_reads_shapes_and_textures_from_names(tmp_path):
    write(tmp_path, "cat/cat3-elephant1.png", "cat/cat1-cat2.png", "truck/truck10-bottle2.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    found = read_cue_conflict(tmp_path)
    assert [found.classes[c] for c in found.shape_N] == ["cat", "cat", "truck"]
    assert [found.classes[c] for c in found.texture_N] == ["cat", "elephant", "bottle"]
    assert len(found.classes) == 16
    assert len(found) == 3
    rows = list(found.stream([1]))
    assert [(row, name.endswith("cat3-elephant1.png")) for row, name, _ in rows] == [(1, True)]


def test_other_classes(tmp_path):
    write(tmp_path, "star/star-dots4.png")
    found = read_cue_conflict(tmp_path, classes=("dots", "star"))
    assert (found.shape_N.tolist(), found.texture_N.tolist()) == ([1], [0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat/cat3.png", "does not tell shape and texture"),
        ("cat/cat3-zebra1.png", "'zebra' is none of the 16 classes"),
        ("zebra/zebra1-cat1.png", "'zebra' is none of the 16 classes"),
        ("dog/cat3-elephant1.png", "its name says 'cat'"),
    ],
)
def test_names_that_cannot_be_read(tmp_path, name, message):
    write(tmp_path, "cat/cat3-elephant1.png", name)
    with pytest.raises(UsageError, match=message):
        read_cue_conflict(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="no folder with pictures"):
        read_cue_conflict(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        read_cue_conflict(tmp_path / "absent")


# --------------------------------------------------------------------------------------------------
# From pictures of one's own
# --------------------------------------------------------------------------------------------------


def test_phase_of_one_and_amplitude_of_the_other():
    rng = np.random.default_rng(0)
    for side in (16, 17):
        shape, texture = rng.random((2, side, side, 3))
        mixed = mix_spectra(shape, texture)
        assert mixed.shape == shape.shape
        of = [np.fft.fft2(x, axes=(0, 1)) for x in (mixed, shape, texture)]
        np.testing.assert_allclose(np.abs(of[0]), np.abs(of[2]), atol=1e-9)
        np.testing.assert_allclose(of[0] / np.abs(of[0]), of[1] / np.abs(of[1]), atol=1e-9)
        np.testing.assert_allclose(mix_spectra(shape, shape), shape, atol=1e-12)


def test_outlines_are_of_the_shape_and_colours_of_the_texture():
    disc = np.zeros((64, 64, 3), np.uint8)
    y, x = np.mgrid[:64, :64]
    disc[np.hypot(y - 24, x - 36) < 14] = 255
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[(x // 4) % 2 == 0] = (220, 40, 60)
    mixed = np.asarray(cues.cue_conflict(Image.fromarray(disc), Image.fromarray(stripes), 64), float)
    assert mixed.shape == (64, 64, 3)
    red, green, _ = mixed.mean((0, 1))
    assert red > 1.5 * green  # the channels' means are the texture's
    same = cues.cue_conflict(Image.fromarray(disc), Image.fromarray(disc), 64)
    assert np.abs(np.asarray(same, float) - disc).max() <= 1


def test_any_size_and_mode():
    for mode in ("L", "RGBA", "P", "RGB"):
        made = cues.cue_conflict(picture(0).convert(mode), picture(1, (21, 80)), 24)
        assert (made.size, made.mode) == ((24, 24), "RGB")
    black = Image.new("RGB", (9, 9))
    assert np.asarray(cues.cue_conflict(black, picture(1), 16)).std() >= 0  # no phase where nothing is
    with pytest.raises(UsageError, match="2 pixels or more"):
        cues.cue_conflict(black, black, 1)


def test_pairs_are_always_of_two_classes_and_use_every_shape():
    labels = np.array([0] * 5 + [2] * 20 + [7] * 3)[np.random.default_rng(0).permutation(28)]
    shape, texture = cue_pairs(labels, 56 * 40, seed=3)
    assert (labels[shape] != labels[texture]).all()
    assert (np.bincount(shape, minlength=28) == 80).all()
    # of a picture of class 0, every picture of another class is as likely: 23 of them
    of_zero = np.bincount(texture[labels[shape] == 0], minlength=28)[labels != 0]
    assert of_zero.min() > 0.4 * of_zero.mean()
    again, fewer = cue_pairs(labels, 56 * 40, seed=3), cue_pairs(labels, 10, seed=3)
    for a, b, c in zip((shape, texture), again, fewer, strict=True):
        assert (a == b).all()
        assert (a[:10] == c).all()
    assert (cue_pairs(labels, 50, seed=4)[1] != texture[:50]).any()


def test_pairs_that_cannot_be():
    with pytest.raises(UsageError, match="two classes or more, got 1"):
        cue_pairs([3, 3, 3], 2, 0)
    with pytest.raises(UsageError, match="got 0"):
        cue_pairs([], 2, 0)
    with pytest.raises(UsageError, match="one pair or more"):
        cue_pairs([0, 1], 0, 0)


# --------------------------------------------------------------------------------------------------
# Made cues
# --------------------------------------------------------------------------------------------------


def test_made_cues_agree_as_often_as_asked():
    for agree in (0.0, 0.5, 1.0):
        made = cues.made_cues(0, 600, agree=agree)
        assert (made.shape_N == made.texture_N).mean() == pytest.approx(agree, abs=0.06)
        assert set(made.shape_N) == set(made.texture_N) == set(range(8))
    a, b = cues.made_cues(5, 20, agree=0.5), cues.made_cues(5, 20, agree=0.5)
    assert (a.pixels_NSS3 == b.pixels_NSS3).all()
    assert (a.pixels_NSS3 != cues.made_cues(5, 20, agree=0.5, split=1).pixels_NSS3).any()
    assert a.images_NCSS.shape == (20, 3, cues.SIDE, cues.SIDE)
    with pytest.raises(UsageError, match="chance from 0 to 1"):
        cues.made_cues(0, 5, agree=1.5)


def test_made_captions_name_the_shape_and_sometimes_the_texture():
    made = cues.made_cues(0, 400, agree=0.3)
    plain, told = cues.made_captions(made, 0, textured=0), cues.made_captions(made, 0, textured=1)
    prompts_CL = cues.made_prompts()
    assert prompts_CL.shape == (8, cues.CONTEXT_LENGTH)
    assert (plain == prompts_CL[made.shape_N]).all()
    assert ((told > 0).sum(1) == 5).all()
    half = (cues.made_captions(made, 0, textured=0.5) > 0).sum(1)
    assert 0.4 < (half == 5).double().mean() < 0.6
