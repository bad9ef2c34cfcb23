from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moviola.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_names
from moviola.types import UsageError

SPATIAL = (
    "defocus blur",
    "glass blur",
    "motion blur",
    "zoom blur",
    "elastic",
    "fog",
    "contrast",
    "brightness",
)


def scene(width=96, height=64, seed=0):
    """A picture with flat parts, edges, fine structure and all colours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / min(height, width)
    pixels = np.stack([0.5 + 0.4 * np.sin(9 * x + seed), 0.3 + 0.3 * y, 0.5 + 0.4 * np.cos(7 * (x + y))], -1)
    for _ in range(4):
        (top, low), (left, right) = (np.sort(rng.integers(side + 1, size=2)) for side in (height, width))
        pixels[top:low, left:right] = rng.uniform(0, 1, 3)
    pixels[height // 2 :] *= 0.4 + 0.6 * rng.random((height, width, 1))[height // 2 :]
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def distance(a, b):
    return float(np.sqrt(((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean()))


def test_names_groups_and_parameters():
    assert len(corruption_names()) == 15
    groups = [corruption_names(group) for group in ("noise", "blur", "weather", "digital")]
    assert sorted(sum(groups, ())) == sorted(corruption_names())
    assert [len(group) for group in groups] == [3, 4, 3, 5]
    for made in CORRUPTIONS.values():
        assert len(made.parameters) == len(SEVERITIES)
        assert all(len(values) == len(made.named) for values in made.parameters)


@pytest.mark.parametrize("name", corruption_names())
def test_worse_with_severity_at_any_size(name):
    for width, height, count in ((96, 64, 12), (26, 24, 40), (200, 150, 4)):
        pictures = [scene(width, height, seed) for seed in range(count)]
        found = [
            np.mean([distance(p, corrupt(p, name, severity, id=str(n))) for n, p in enumerate(pictures)])
            for severity in SEVERITIES
        ]
        assert found[0] > 1, (width, found)
        assert (np.diff(found) > 0).all(), (width, found)


@pytest.mark.parametrize("name", corruption_names())
def test_same_size_rgb_whatever_the_size_and_mode(name):
    for size in ((1, 1), (1, 40), (33, 2), (17, 50)):
        made = corrupt(Image.new("RGB", size, (90, 140, 200)), name, 5)
        assert (made.size, made.mode) == (size, "RGB")
    picture = scene(40, 30)
    for mode in ("L", "1", "P", "RGBA", "CMYK", "LA", "I;16"):
        of_mode = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
        before = np.asarray(of_mode).copy()
        made = corrupt(of_mode, name, 3)
        assert (made.size, made.mode) == ((40, 30), "RGB")
        assert (np.asarray(of_mode) == before).all()


@pytest.mark.parametrize("name", corruption_names())
def test_seeded_by_all_that_names_it(name):
    picture, state = scene(), np.random.get_state()[1].copy()  # noqa: NPY002
    made = corrupt(picture, name, 3, seed=1, id="a")
    assert made == corrupt(picture, name, 3, seed=1, id="a")
    random = made != corrupt(picture, name, 3, seed=1, id="b")
    assert random == (made != corrupt(picture, name, 3, seed=2, id="a"))
    plain = {"defocus blur", "zoom blur", "brightness", "contrast", "saturation", "pixelate", "jpeg"}
    assert random == (name not in plain)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_other_severities_have_other_noise():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    first, second = (np.asarray(corrupt(grey, "gaussian noise", s), float) - 128 for s in (1, 2))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_known_statistics():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    for severity, (deviation,) in zip((1, 2), CORRUPTIONS["gaussian noise"].parameters, strict=False):
        noise = np.asarray(corrupt(grey, "gaussian noise", severity), float) / 255 - 128 / 255
        assert noise.std() == pytest.approx(deviation, rel=0.02)
        assert abs(noise.mean()) < 0.003
    shot = np.asarray(corrupt(grey, "shot noise", 1), float) / 255
    assert shot.std() == pytest.approx(np.sqrt(0.5 / 60), rel=0.03)
    salt = np.asarray(corrupt(grey, "impulse noise", 3))
    assert ((salt == 0) | (salt == 255)).mean() == pytest.approx(0.09, abs=0.005)
    assert set(np.unique(salt)) == {0, 128, 255}
    assert np.asarray(corrupt(grey, "brightness", 1))[0, 0, 0] == round(128 + 25.5)
    assert (np.asarray(corrupt(grey, "saturation", 5)) == 128).all()


def test_blurs_keep_what_is_flat_and_the_mean():
    flat = Image.new("RGB", (50, 40), (200, 90, 30))
    for name in corruption_names("blur"):
        assert distance(corrupt(flat, name, 5), flat) <= 1
    point = np.zeros((65, 65, 3), np.uint8)
    point[32, 32] = 255
    # a disc of radius 10 * 65 / 224 = 2.9 pixels
    blurred = np.asarray(corrupt(Image.fromarray(point), "defocus blur", 5), float)[..., 0]
    assert blurred[32, 32] == pytest.approx(255 / (np.pi * (10 * 65 / 224) ** 2), rel=0.15)
    assert (blurred[32, 28:37] > 0).sum() in (5, 7)
    assert blurred[:28].max() == blurred[:, :28].max() == 0


@pytest.mark.parametrize("name", SPATIAL)
def test_looks_alike_at_every_size(name):
    """Made twice as large, spoilt and made small again: about what the small one becomes."""
    small = scene(112, 112).resize((112, 112))
    large = small.resize((224, 224), Image.Resampling.BICUBIC)
    size = [distance(p, corrupt(p, name, 4, id="x")) for p in (small, large)]
    assert size[0] == pytest.approx(size[1], rel=0.35)


def test_bad_names_and_severities():
    picture = scene()
    with pytest.raises(UsageError, match="no corruption 'rain'"):
        corrupt(picture, "rain", 1)
    for severity in (0, 6, 2.5):
        with pytest.raises(UsageError, match="severity is 1, 2, 3, 4 or 5"):
            corrupt(picture, "fog", severity)
    with pytest.raises(UsageError, match="no group"):
        corruption_names("heat")
