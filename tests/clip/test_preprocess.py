from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from moviola.clip.preprocess import Preprocess
from moviola.types import CheckpointError, Recipe, UsageError


def test_pictures_equal_the_oracle(oracles_dir: Path) -> None:
    folder = oracles_dir / "00-clip-preprocess"
    about, data = json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")
    size = about["config"]["resolution"]
    prepare = Preprocess(Recipe(size=(size, size)))
    names = [k.removeprefix("in/") for k in data if k.startswith("in/")]
    assert len(names) == 5
    for name in names:
        pixels_HWC = data[f"in/{name}"].numpy().astype(np.uint8).transpose(1, 2, 0)
        mode = name.split("_")[1]
        image = Image.fromarray(pixels_HWC[..., 0] if mode == "L" else pixels_HWC)
        assert image.mode == mode
        expected = data[f"out/{name}"]
        got = prepare.picture(image)
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() <= about["tolerance"] * expected.abs().max() + 1e-7, name


def grey_levels(prepare: Preprocess, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs() * torch.tensor(prepare.recipe.std).view(3, 1, 1) * 255


@pytest.mark.parametrize("size", [(720, 1280), (641, 360), (100, 333), (225, 224), (64, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_fast_path_stays_as_close_as_stated(size: tuple[int, int], interpolation: str) -> None:
    """The docstring's claim: at most 2 grey levels anywhere, on average 0.01 (bilinear 0.05)."""
    draw = np.random.default_rng(sum(size))
    noise = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
    small = Image.fromarray(noise).resize((size[1] // 8, size[0] // 8))
    smooth = np.asarray(small.resize((size[1], size[0])))
    frames = np.stack([noise, smooth])
    prepare = Preprocess(Recipe(interpolation=interpolation))  # type: ignore[arg-type]
    levels = grey_levels(
        prepare, prepare.frames(frames), prepare.pictures([Image.fromarray(f) for f in frames])
    )
    assert levels.max() <= 2.01
    assert levels.mean() <= (0.01 if interpolation == "bicubic" else 0.05)


def test_frames_at_the_final_size_are_only_normalised() -> None:
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 256, (2, 32, 57, 3), dtype=np.uint8)
    prepare = Preprocess(Recipe(size=(32, 32)))
    exact = prepare.pictures([Image.fromarray(f) for f in frames])
    torch.testing.assert_close(prepare.frames(frames), exact, rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), rows=st.integers(4, 40), columns=st.integers(4, 40))
def test_any_size_comes_out_as_the_recipe_says(h: int, w: int, rows: int, columns: int) -> None:
    frame = np.full((h, w, 3), 77, np.uint8)
    for recipe in (
        Recipe(size=(rows, rows)),
        Recipe(size=(rows, columns)),
        Recipe(size=(rows, columns), resize="squash", crop="none"),
        Recipe(size=(rows, columns), resize_size=(rows + 5, columns + 3)),
        Recipe(size=(rows, columns), resize="squash", resize_size=(rows + 3, columns)),
    ):
        prepare = Preprocess(recipe)
        grey = (77 / 255 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
        for pixels in (prepare.picture(Image.fromarray(frame)), prepare.frames(frame[None])[0]):
            assert pixels.shape == (3, *recipe.size)
            torch.testing.assert_close(pixels, grey.view(3, 1, 1).expand_as(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
)
def test_every_pillow_mode_is_read(mode: str) -> None:
    ramp = Image.linear_gradient("L").resize((48, 48))
    if mode == "I;16":
        image = Image.fromarray((np.asarray(ramp).astype(np.uint16)) * 257)
    elif mode == "PA":
        image = ramp.convert("P").convert("PA")
    else:
        image = ramp.convert("RGB").convert(mode) if mode not in ("I", "F", "LA") else ramp.convert(mode)
    assert image.mode == mode
    prepare = Preprocess(Recipe(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1)))
    pixels = prepare.picture(image)
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :4].mean() < 0.2
    assert pixels[:, -4:].mean() > 0.8


def test_a_palette_picture_is_scaled_with_the_filter() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    plain = Image.fromarray(stripes)
    prepare = Preprocess(Recipe(size=(32, 32)))
    torch.testing.assert_close(prepare.picture(plain.convert("P")), prepare.picture(plain))


def test_bad_frames_say_what_was_expected() -> None:
    prepare = Preprocess(Recipe(size=(32, 32)))
    for bad in (
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 4), np.uint8),
    ):
        with pytest.raises(UsageError, match=r"uint8 RGB of shape \(T, H, W, 3\)"):
            prepare.frames(bad)
    with pytest.raises(UsageError, match="at least one pixel"):
        prepare.frames(np.zeros((1, 0, 8, 3), np.uint8))
    assert prepare.frames(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 3, 32, 32)
    assert prepare.pictures([]).shape == (0, 3, 32, 32)


def test_reversed_and_read_only_frames_are_taken() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    prepare = Preprocess(Recipe(size=(32, 32)))
    expected = prepare.frames(frames)
    frozen = frames.copy()
    frozen.setflags(write=False)
    torch.testing.assert_close(prepare.frames(frozen), expected)
    torch.testing.assert_close(prepare.frames(frames[::-1]), expected.flip(0))


def test_a_recipe_without_one_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not crop"):
        Preprocess(Recipe(resize="shortest", crop="none"))
    assert Preprocess(Recipe(size=(224, 336))).decode_hint == 336
    assert Preprocess(Recipe(size=(224, 224), resize_size=(256, 256))).decode_hint == 256
    with pytest.raises(CheckpointError, match=r"scales to \(256, 256\) and does not crop"):
        Preprocess(Recipe(resize="squash", crop="none", resize_size=(256, 256)))
    with pytest.raises(CheckpointError, match=r"scales to \(224, 200\), which is too small"):
        Preprocess(Recipe(resize="squash", resize_size=(224, 200)))


def test_recipes_of_before_keep_their_hash() -> None:
    """Indexes carry these hashes: a new field must not change them."""
    assert Recipe().hash == "47703c637561ec51"
    assert Recipe(size=(32, 40), resize="squash", crop="none").hash == "e919b0980aa18fc3"
    wide = Recipe(resize_size=(256, 256))
    assert wide.hash != Recipe().hash
    assert Recipe.from_json(json.loads(json.dumps(wide.to_json()))) == wide
    assert Recipe.from_json(json.loads(json.dumps(Recipe().to_json()))) == Recipe()
