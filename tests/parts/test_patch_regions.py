"""Boxes from patches: the region around the peak, the way back through the crop, and both kinds of tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.parts.patch_regions import PatchRegions, patch_vectors, region, to_picture
from moviola.types import Recipe, Refusal, UsageError
from tests.verbs.colour_clip import TOKENIZER, colour_model


def small_clip(tower: str = "vit", layers: int = 2) -> CLIP:
    vision: VitConfig | ResNetConfig = VitConfig(
        image_size=32, patch_size=8, width=16, layers=layers, heads=2
    )
    if tower == "resnet":
        vision = ResNetConfig(image_size=64, width=8, layers=(1, 1, 1, 1), heads=4)
    text = TextConfig(context_length=32, vocab_size=TOKENIZER.size, width=16, layers=1, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return CLIP(ClipConfig(12, vision, text)).eval()


def test_the_region_is_what_hangs_on_the_peak() -> None:
    map_RC = np.zeros((5, 6))
    map_RC[1, 1:3] = 0.8
    map_RC[2, 2] = 1.0
    map_RC[3, 3] = 0.9  # touches the region by a corner only
    map_RC[4, 5] = 0.95
    assert region(map_RC, 0.5) == (1, 1, 2, 2)
    assert region(map_RC, 0.9) == (2, 2, 2, 2)


@pytest.mark.parametrize("value", [0.3, np.nan])
def test_a_map_without_a_peak_has_no_region(value: float) -> None:
    assert region(np.full((4, 4), value), 0.5) is None


def test_the_peak_lies_inside_for_any_map() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        map_RC = rng.random((7, 5))
        top, left, bottom, right = region(map_RC, rng.uniform(0.05, 0.95))
        row, column = divmod(int(map_RC.argmax()), 5)
        assert top <= row <= bottom
        assert left <= column <= right


def test_cells_go_back_through_the_crop() -> None:
    shortest = Recipe(size=(32, 32))
    # 64 x 128: the middle 64 x 64 is seen, a cell is 16 pixels
    assert to_picture((0, 0, 3, 3), (4, 4), (128, 64), shortest) == (32, 0, 95, 63)
    assert to_picture((1, 2, 1, 3), (4, 4), (128, 64), shortest) == (64, 16, 95, 31)
    squash = Recipe(size=(32, 32), resize="squash", crop="none")
    assert to_picture((0, 0, 3, 3), (4, 4), (128, 64), squash) == (0, 0, 127, 63)
    margin = Recipe(size=(24, 24), resize_size=(32, 32))
    assert to_picture((0, 0, 2, 2), (3, 3), (64, 64), margin) == (8, 8, 55, 55)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_values_are_the_last_attention_without_looking_around(layers: int) -> None:
    """Attention that sees only its own token gives its values; the block's two sums are left out."""
    model = small_clip(layers=layers)
    tower, pixels_NCHW = model.visual, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_NLD = tower.embed(pixels_NCHW)
        *before, last = tower.transformer.resblocks
        for block in before:
            x_NLD = block(x_NLD)
        own_LL = torch.eye(x_NLD.shape[1], dtype=torch.bool)
        alone_NLD = tower.ln_post(last.attn(last.ln_1(x_NLD), mask_LL=own_LL))
        wanted = torch.nn.functional.normalize(alone_NLD[:, 1:] @ tower.proj, dim=-1).unflatten(1, (4, 4))
        torch.testing.assert_close(patch_vectors(tower, pixels_NCHW), wanted)
        tokens = patch_vectors(tower, pixels_NCHW, "tokens")
        cls_NE = torch.nn.functional.normalize(tower(pixels_NCHW).tokens_BLD[:, 1] @ tower.proj, dim=-1)
    torch.testing.assert_close(tokens[:, 0, 0], cls_NE)


def test_a_residual_towers_patches_are_its_pools_values() -> None:
    """A pool whose query sees one cell only gives that cell's vector."""
    tower = small_clip("resnet").visual
    pixels_NCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = patch_vectors(tower, pixels_NCHW)
        tokens_NLD = tower(pixels_NCHW).tokens_BLD
        wanted = tower.attnpool.c_proj(tower.attnpool.v_proj(tokens_NLD[:, 2]))
    assert got.shape == (2, 2, 2, 12)
    torch.testing.assert_close(got[:, 0, 1], torch.nn.functional.normalize(wanted, dim=-1))


def loaded(tower: str = "vit") -> Model:
    return Model(
        clip := small_clip(tower),
        config=clip.config.to_json(),
        tokenizer=TOKENIZER,
        name="small",
        device="cpu",
    )


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_boxes_of_phrases_lie_in_the_picture(tower: str) -> None:
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 90), (70, 33))
    ]
    finder = PatchRegions(loaded(tower), batch_size=1)
    asked = [{"a": "red", "b": "green thing"}, {"c": "red"}]
    got = finder(pictures, asked)
    assert [set(one) for one in got] == [{"a", "b"}, {"c"}]
    for picture, one in zip(pictures, got, strict=True):
        for left, top, right, bottom in (box for boxes in one.values() for box in boxes if box is not None):
            assert 0 <= left <= right <= picture.width - 1
            assert 0 <= top <= bottom <= picture.height - 1
    together = PatchRegions(finder.model)(pictures, asked)
    assert got == together


def test_values_find_things_that_the_built_in_model_knows() -> None:
    import moviola
    from moviola.data import world

    model = moviola.load(device="cpu")
    pictures, asked, truth, index = [], [], [], 0
    while len(pictures) < 40:
        scene = world.picture(11, index)
        index += 1
        names = [f"{thing.colour} {thing.shape}" for thing in scene.things]
        if scene.same or len(set(names)) < 2 or len(set(names)) < len(names):
            continue
        pictures.append(Image.fromarray(scene.pixels_HWC))
        asked.append({name: name for name in names})
        truth.append([thing.box for thing in scene.things])

    def overlap(path: str) -> float:
        from moviola.parts.boxes import pairwise_iou

        found = PatchRegions(model, path=path)(pictures, asked)  # type: ignore[arg-type]
        return float(
            np.mean(
                [
                    pairwise_iou(torch.tensor([box]), torch.tensor([true])).item()
                    for boxes, things in zip(found, truth, strict=True)
                    for (box,), true in zip(boxes.values(), things, strict=True)
                ]
            )
        )

    assert overlap("values") > 0.15 > 2 * overlap("tokens")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PatchRegions(loaded(), threshold=1.0), "between 0 and 1"),
        (lambda: PatchRegions(loaded(), path="keys"), "keys"),  # type: ignore[arg-type]
        (lambda: PatchRegions(loaded())([], [{}]), "0 pictures and phrases for 1"),
    ],
)
def test_bad_input(call, said) -> None:
    with pytest.raises(UsageError, match=said):
        call()


def test_towers_without_patches_are_refused() -> None:
    with pytest.raises(Refusal, match="--regions"):
        PatchRegions(colour_model())
