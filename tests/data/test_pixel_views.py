"""MoCo's and AugMix's views: sizes, seeds, laws, and the picture they are of."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from moviola.data import pixel_views
from moviola.data.augmentations import OPERATIONS
from moviola.data.pixel_views import MIXED, VIEWS, augmix, moco
from moviola.types import UsageError


def picture(seed: int = 0, size: tuple[int, int] = (60, 90)) -> Image.Image:
    """A smooth picture: noise, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", [(32, 32), (24, 48), (224, 224)])
def test_shape_and_seed(name: str, size: tuple[int, int]) -> None:
    view = VIEWS[name]
    made = view(picture(), size, rng())
    assert made.shape == (*size, 3)
    assert made.dtype == np.uint8
    assert np.array_equal(made, view(picture(), size, rng()))
    assert not np.array_equal(made, view(picture(), size, rng(1)))
    assert not np.array_equal(made, view(picture(1), size, rng()))


@pytest.mark.parametrize("name", VIEWS)
def test_any_mode_is_laid_on_white_and_left_as_it_was(name: str) -> None:
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    before = clear.tobytes()
    white = VIEWS[name](Image.new("RGB", (40, 40), "white"), (16, 16), rng(3))
    assert np.array_equal(VIEWS[name](clear, (16, 16), rng(3)), white)
    assert clear.tobytes() == before
    grey = picture().convert("L")
    assert np.array_equal(
        VIEWS[name](grey, (16, 16), rng(5)), VIEWS[name](grey.convert("RGB"), (16, 16), rng(5))
    )


@pytest.mark.parametrize("name", VIEWS)
def test_the_callers_randomness_is_left_alone(name: str) -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    VIEWS[name](picture(), (16, 16), rng())
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002


STILL = {"area": (1.0, 1.0), "jitter_chance": 0.0, "grey_chance": 0.0, "blur": (0.0, 0.0)}


def test_moco_without_changes_is_the_crop() -> None:
    for seed in range(5):
        crop = pixel_views._crop(picture(), (32, 48), rng(seed), (1.0, 1.0))
        assert np.array_equal(moco(picture(), (32, 48), rng(seed), **STILL), np.asarray(crop))  # type: ignore[arg-type]


def test_half_of_the_crops_are_mirrored() -> None:
    """Of a picture that is dark on the left and light on the right."""
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:, 20:] = 255
    shown = Image.fromarray(halves)
    crops = [np.asarray(pixel_views._crop(shown, (8, 8), rng(seed), (1.0, 1.0)), int) for seed in range(200)]
    mirrored = np.mean([one[:, 0].mean() > one[:, -1].mean() for one in crops])
    assert 0.4 < mirrored < 0.6


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_each_part_of_moco_does_what_it_says() -> None:
    plain = moco(picture(), (48, 48), rng(2), **STILL)  # type: ignore[arg-type]
    grey = moco(picture(), (48, 48), rng(2), **{**STILL, "grey_chance": 1.0})  # type: ignore[arg-type]
    assert np.ptp(grey.astype(int), axis=2).max() == 0
    assert np.array_equal(grey, np.asarray(Image.fromarray(plain).convert("L").convert("RGB")))
    blurred = moco(picture(), (48, 48), rng(2), **{**STILL, "blur": (8.0, 8.0)})  # type: ignore[arg-type]
    # 8 pixels of 224 are 12 / 7 of 48
    wanted = Image.fromarray(plain).filter(ImageFilter.GaussianBlur(8 * 48 / 224))
    assert np.array_equal(blurred, np.asarray(wanted))
    still = {**STILL, "jitter_chance": 1.0, "jitter": (0.0, 0.0, 0.0, 0.0)}
    assert mean_difference(moco(picture(), (48, 48), rng(2), **still), plain) < 1.5  # type: ignore[arg-type]


def test_hue_turns_around_the_circle() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    third = np.asarray(pixel_views._turn_hue(red, 1 / 3))[0, 0]
    assert third[1] > 250 > 10 > third[2]
    back = np.asarray(pixel_views._turn_hue(red, -1 / 3))[0, 0]
    assert back[2] > 250 > 10 > back[1]
    assert np.asarray(pixel_views._turn_hue(red, 0.0))[0, 0].tolist() == [255, 0, 0]


def test_jitter_stays_in_its_range() -> None:
    """Brightness alone: the mean of a grey picture lies within 40 percent, and spreads over it."""
    grey = Image.new("RGB", (16, 16), (100, 100, 100))
    kept = {**STILL, "jitter_chance": 1.0, "jitter": (0.4, 0.0, 0.0, 0.0)}
    means = [moco(grey, (16, 16), rng(seed), **kept).mean() for seed in range(100)]  # type: ignore[arg-type]
    assert 59 <= min(means) < 65
    assert 135 < max(means) <= 141


def test_a_fifth_of_mocos_views_is_grey() -> None:
    views = [moco(picture(), (12, 12), rng(seed)) for seed in range(400)]
    share = np.mean([np.ptp(one.astype(int), axis=2).max() == 0 for one in views])
    assert 0.14 < share < 0.27


def test_crops_take_their_share() -> None:
    """Pixels that know their place: a crop of a quarter to a half of a ramp spans that share of it."""
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None], np.arange(100)[:, None]
    shares = []
    for seed in range(100):
        crop = np.asarray(pixel_views._crop(Image.fromarray(ramp), (50, 50), rng(seed), (0.25, 0.5)), int)
        shares.append((np.ptp(crop[..., 0]) + 1) * (np.ptp(crop[..., 1]) + 1) / 1e4)
    assert 0.22 < min(shares) < 0.3
    assert 0.45 < max(shares) < 0.54


# --------------------------------------------------------------------------------------------------
# AugMix
# --------------------------------------------------------------------------------------------------


def test_there_are_nine_operations_none_of_which_changes_colours_by_a_factor() -> None:
    assert len(set(MIXED)) == 9
    assert set(MIXED) < set(OPERATIONS)
    assert not {"brightness", "colour", "contrast", "sharpness"} & set(MIXED)


@pytest.mark.parametrize("name", MIXED)
def test_strengths(name: str) -> None:
    drawn = [
        pixel_views._strength(name, level, rng(seed)) for seed in range(50) for level in (0.01, 0.05, 0.1)
    ]
    most = {"rotate": 3.0, "shear_x": 0.03, "shear_y": 0.03, "translate_x": 1 / 30, "translate_y": 1 / 30}
    if name in most:
        assert max(drawn) == pytest.approx(most[name])
        assert min(drawn) == pytest.approx(-most[name])
    else:
        fixed = {"posterize": {4}, "solarize": {231, 244, 254}}.get(name, {0.0})
        assert set(drawn) == fixed


def test_a_mixture_lies_between_the_crop_and_the_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """With operations that blacken, every pixel is a share of the crop's, and the shares are Beta(1, 1)."""
    white = Image.new("RGB", (20, 20), "white")
    monkeypatch.setattr(pixel_views, "_operate", lambda view, name, value: Image.new("RGB", view.size))
    levels = [augmix(white, (8, 8), rng(seed)) for seed in range(300)]
    assert all(np.ptp(one) == 0 for one in levels)
    shares = np.array([one[0, 0, 0] for one in levels]) / 255
    assert abs(shares.mean() - 0.5) < 0.05
    assert abs(shares.std() - 12**-0.5) < 0.03


def test_chains_have_one_to_three_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    calls = [0]

    def spy(view: Image.Image, name: str, value: float) -> Image.Image:
        calls[0] += 1
        return view

    monkeypatch.setattr(pixel_views, "_operate", spy)
    for seed in range(200):
        calls[0] = 0
        augmix(picture(), (8, 8), rng(seed))
        counts.append(calls[0])
    assert (min(counts), max(counts)) == (3, 9)
    assert abs(np.mean(counts) - 6) < 0.3


def test_operations_that_change_nothing_give_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_views, "_operate", lambda view, name, value: view)
    for seed in range(5):
        crop = pixel_views._crop(picture(), (32, 32), rng(seed), (0.08, 1.0))
        assert np.array_equal(augmix(picture(), (32, 32), rng(seed)), np.asarray(crop))


@pytest.mark.parametrize("options", [{"severity": 0}, {"severity": 11}, {"chains": 0}, {"longest": 0}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="severity from 1 to 10"):
        augmix(picture(), (8, 8), rng(), **options)  # type: ignore[arg-type]
