"""Augmentations that are drawn once, and the batches that are read of a reinforced set."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moviola.clip.preprocess import Preprocess
from moviola.data.augmentations import OPERATIONS
from moviola.data.reinforced import (
    AUGMENTATION_TYPE,
    METADATA,
    REINFORCED_COLUMNS,
    Augment,
    Augmentation,
    Teacher,
    apply,
    draw,
    pixel_door,
    read_manifest,
    reinforced_batch,
    shard_schema,
    vector_lists,
)
from moviola.types import MediaError, Recipe, UsageError

RECIPE = Recipe(size=(20, 24))
WHOLE = Augmentation(0.0, 0.0, 1.0, 1.0)


def noise(seed: int = 0, size: tuple[int, int] = (40, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# ------------------------------------------------------------------------------------ augmentations


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    id=st.text(max_size=8),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    area=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda a: (min(a), max(a))),
    operations=st.integers(0, 5),
)
def test_every_draw_lies_in_the_picture_and_survives_the_table(seed, id, height, width, area, operations):
    augment = Augment(area, operations=operations, mirror=0.5)
    drawn = draw(seed, id, (height, width), 5, augment)
    assert drawn == draw(seed, id, (height, width), 9, augment)[:5]  # more do not change the first
    for one in drawn:
        assert 0 <= one.left < one.right <= 1 + 1e-6
        assert 0 <= one.top < one.bottom <= 1 + 1e-6
        assert (one.right - one.left) * (one.bottom - one.top) <= area[1] + 1e-5
        assert len(one.operations) == operations
    stored = pa.array([one.to_json() for one in drawn], AUGMENTATION_TYPE).to_pylist()
    assert [Augmentation.from_json(row) for row in stored] == drawn


def test_draws_differ_by_seed_row_and_index_and_cover_every_operation():
    boxes = {draw(s, id, (50, 50), 3)[i].left for s in (0, 1) for id in ("a", "b") for i in range(3)}
    assert len(boxes) == 12
    drawn = [one for row in range(100) for one in draw(0, str(row), (90, 120), 10)]
    names = [name for one in drawn for name, _ in one.operations]
    assert set(names) == set(OPERATIONS)
    share = np.array([names.count(name) for name in OPERATIONS]) / len(names)
    assert np.abs(share - 1 / len(OPERATIONS)).max() < 0.03
    ratios = [(d.right - d.left) * 120 / ((d.bottom - d.top) * 90) for d in drawn]
    assert min(ratios) > 0.74
    assert max(ratios) < 1.35
    assert not any(one.mirror for one in drawn)
    turned = [
        one.mirror for row in range(100) for one in draw(0, str(row), (90, 120), 10, Augment(mirror=0.5))
    ]
    assert 0.4 < np.mean(turned) < 0.6


def test_the_parameters_of_a_row_never_change():
    """Sets on the disk hold these; a draw that changed would make a resumed run of two kinds."""
    one = draw(7, "row-1", (375, 500), 2)[1]
    assert [one.left, one.top, one.right, one.bottom] == [
        0.5195098519325256,
        0.14839178323745728,
        0.9516682624816895,
        0.6718114018440247,
    ]
    assert one.operations == (("colour", 1.2699999809265137), ("solarize", 179.0))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16"])
def test_applied_twice_gives_identical_pixels(mode):
    picture = noise().convert("L").convert("I;16") if mode == "I;16" else noise().convert(mode)
    for row in range(8):
        for one in draw(1, str(row), (40, 60), 4, Augment(operations=3, strength=0.8, mirror=0.5)):
            stored = pa.array([one.to_json()], AUGMENTATION_TYPE).to_pylist()[0]
            first, again = (
                apply(one, picture, (32, 48)),
                apply(Augmentation.from_json(stored), picture, (32, 48)),
            )
            assert (first.mode, first.size) == ("RGB", (48, 32))
            assert first.tobytes() == again.tobytes()


def test_the_box_is_cut_and_scaled():
    picture = noise(size=(40, 60))
    box = Augmentation(0.5, 0.25, 1.0, 0.75)
    assert apply(box, picture).tobytes() == picture.crop((30, 10, 60, 30)).tobytes()
    scaled = picture.crop((30, 10, 60, 30)).resize((24, 20), Image.Resampling.BICUBIC)
    assert apply(box, picture, (20, 24)).tobytes() == scaled.tobytes()
    tiny = apply(Augmentation(0.999, 0.999, 1.0, 1.0), noise(size=(3, 3)), (4, 4))
    assert tiny.size == (4, 4)


def test_operations_do_what_they_say():
    grey = Image.new("RGB", (41, 41), (100, 100, 100))
    spot = grey.copy()
    spot.putpixel((30, 20), (255, 255, 255))

    def brightest(*operations: tuple[str, float], mirror: bool = False) -> list[int]:
        out = pixels(apply(Augmentation(0, 0, 1, 1, mirror, operations), spot))[..., 0]
        row, column = divmod(int(out.argmax()), 41)
        return [row, column]

    assert brightest() == brightest(("identity", 0)) == [20, 30]
    assert brightest(mirror=True) == [20, 10]
    assert brightest(("rotate", 90)) == [10, 20]  # counter-clockwise: right goes up
    assert brightest(("translate_x", 5 / 41)) == [20, 35]
    assert brightest(("translate_y", -5 / 41)) == [15, 30]
    assert brightest(("shear_y", -0.5)) == [25, 30]
    assert brightest(("shear_x", 0.5)) == [20, 30]  # the middle row stays
    picture = noise()

    def after(name: str, value: float) -> np.ndarray:
        return pixels(apply(Augmentation(0, 0, 1, 1, False, ((name, value),)), picture))

    plain = pixels(picture)
    assert np.abs(after("brightness", 1.5) - np.minimum(plain * 1.5, 255)).max() <= 1
    assert after("contrast", 0.5).std() < 0.55 * plain.std()
    assert after("colour", 0.0).std(axis=2).max() == 0
    assert after("sharpness", 0.0).std() < plain.std()
    assert (after("posterize", 3) % 32 == 0).all()
    assert (after("solarize", 128) == np.where(plain < 128, plain, 255 - plain)).all()
    for name in ("brightness", "colour", "contrast", "sharpness"):
        assert (after(name, 1.0) == plain).all()
    low = picture.point(lambda v: 60 + v // 4)
    for name in ("autocontrast", "equalize"):
        out = pixels(apply(Augmentation(0, 0, 1, 1, False, ((name, 0.0),)), low))
        assert (out.min(), out.max()) == (0, 255)
    moved = pixels(apply(Augmentation(0, 0, 1, 1, False, (("translate_x", 0.5),)), grey))
    assert (moved[:, :18] == (122, 116, 104)).all()
    with pytest.raises(UsageError, match=r"does not know the augmentation 'swirl'.*Upgrade"):
        after("swirl", 1.0)


def test_an_augmentation_looks_alike_at_two_sizes():
    smooth = noise(size=(5, 6)).resize((240, 200), Image.Resampling.BICUBIC)
    for row in range(12):
        for one in draw(0, str(row), (200, 240), 3):
            names = {name for name, _ in one.operations}
            if names & {"sharpness", "equalize", "solarize"}:
                continue  # neighbours and histograms are of pixels
            small = apply(one, smooth, (32, 32))
            large = apply(one, smooth, (128, 128)).resize((32, 32), Image.Resampling.BOX)
            # the interior: the edge of what was moved in falls between pixels
            assert np.abs(pixels(small) - pixels(large)).mean() < 4, one


@pytest.mark.parametrize(
    "options",
    [
        {"area": (0.0, 1.0)},
        {"area": (0.6, 0.5)},
        {"area": (0.5, 1.1)},
        {"ratio": (0.0, 1.0)},
        {"operations": -1},
        {"operations": 99},
        {"strength": 1.1},
        {"mirror": -0.1},
    ],
)
def test_impossible_augmentations_are_refused(options):
    with pytest.raises(UsageError, match=r"got"):
        Augment(**options)


# ------------------------------------------------------------------------------------------ a batch

TEACHERS = (
    Teacher("a", "aa", 3, (20, 24), "r", "float32", 100.0),
    Teacher("b", "bb", 2, (32, 32), "r", "float32", 100.0),
)
A, D = 4, 5


def small_set(rows: int = 6, seed: int = 0) -> pa.Table:
    """Rows with one to three captions, and none to two synthetic ones; vectors say what they belong to."""
    captions = [[f"caption {r}.{i}" for i in range(1 + r % 3)] for r in range(rows)]
    synthetic = [[f"made {r}.{i}" for i in range(r % 3)] for r in range(rows)]

    def vectors(lists, mark):
        parts = [[r, i, mark, 0.5, 1] for r, items in enumerate(lists) for i in range(len(items))]
        return vector_lists([len(items) for items in lists], np.array(parts, np.float32).reshape(-1, D))

    drawn = [[one.to_json() for one in draw(seed, str(r), (40, 60), A)] for r in range(rows)]
    schema = shard_schema(TEACHERS, A)
    columns = [
        [str(r) for r in range(rows)],
        [png(noise(r)) for r in range(rows)],
        captions,
        synthetic,
        drawn,
        vectors(drawn, 0),
        vectors(captions, 1),
        vectors(synthetic, 2),
    ]
    arrays = [
        c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


SEEN: list[str] = []


def tokenize(texts):
    SEEN.extend(texts)
    return np.array([[hash_of(text), 1, 0] for text in texts], np.int64).reshape(-1, 3)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-10:], "big") % 10**15


def batch(table: pa.Table, rows=None, epoch: int = 0, **options):
    rows = np.arange(table.num_rows) if rows is None else rows
    return reinforced_batch(
        table, rows, **{"seed": 3, "epoch": epoch, "recipe": RECIPE, "tokenize": tokenize, **options}
    )


def test_the_vectors_belong_to_what_was_drawn():
    table = small_set(9)
    stored = table.to_pydict()
    drawn = set()
    for epoch in range(12):
        made = batch(table, epoch=epoch)
        assert {name: (tuple(v.shape), v.dtype) for name, v in made.items()} == {
            "image": ((9, 3, 20, 24), torch.float32),
            "text": ((9, 3), torch.int64),
            "synthetic": ((9, 3), torch.int64),
            "teacher_image": ((9, 5), torch.float32),
            "teacher_text": ((9, 5), torch.float32),
            "teacher_synthetic": ((9, 5), torch.float32),
        }
        for r in range(9):
            row, index, mark = made["teacher_image"][r, :3].int().tolist()
            assert (row, mark) == (r, 0)
            shown = apply(Augmentation.from_json(stored["augmentations"][r][index]), noise(r), RECIPE.size)
            assert torch.equal(made["image"][r], pixel_door(RECIPE).frames(np.asarray(shown)[None])[0])
            torch.testing.assert_close(made["image"][r], Preprocess(RECIPE).picture(shown), atol=1e-5, rtol=0)
            row, caption, mark = made["teacher_text"][r, :3].int().tolist()
            assert (row, mark) == (r, 1)
            assert made["text"][r, 0] == hash_of(stored["captions"][r][caption])
            row, other, mark = made["teacher_synthetic"][r, :3].int().tolist()
            assert row == r
            if stored["synthetic"][r]:
                assert mark == 2
                assert made["synthetic"][r, 0] == hash_of(stored["synthetic"][r][other])
            else:  # another caption of the row stands in for it, or the only one
                assert mark == 1
                assert made["synthetic"][r, 0] == hash_of(stored["captions"][r][other])
                assert (other == caption) == (len(stored["captions"][r]) == 1)
            drawn.add((r, index, caption, other))
    assert len(drawn) > 60  # epochs and rows draw anew


def test_rows_of_several_captions_without_synthetic_ones_draw_two_different_captions():
    table = small_set(9)
    empty = pa.array([[]] * 9, pa.list_(pa.string()))
    none = vector_lists([0] * 9, np.empty((0, D)))
    table = table.set_column(3, table.schema.field(3), empty).set_column(7, table.schema.field(7), none)
    pairs = set()
    for epoch in range(30):
        made = batch(table, epoch=epoch)
        for r in range(9):
            one, other = int(made["teacher_text"][r, 1]), int(made["teacher_synthetic"][r, 1])
            assert (one == other) == (r % 3 == 0)
            pairs.add((r % 3, one, other))
    assert {p for p in pairs if p[0] == 2} == {(2, i, j) for i in range(3) for j in range(3) if i != j}


def test_a_row_is_the_same_in_whatever_batch_it_comes():
    table = small_set(8)
    whole = batch(table, np.arange(100, 108), epoch=2)
    order = np.array([5, 0, 7])
    some = batch(table.take(pa.array(order)), order + 100, epoch=2)
    sliced = batch(table.slice(2, 3), np.arange(102, 105), epoch=2)
    chunked = batch(pa.concat_tables([table.slice(0, 3), table.slice(3)]), np.arange(100, 108), epoch=2)
    for name in whole:
        assert torch.equal(some[name], whole[name][order])
        assert torch.equal(sliced[name], whole[name][2:5])
        assert torch.equal(chunked[name], whole[name])
    other = batch(table, np.arange(100, 108), epoch=3)
    assert not torch.equal(other["teacher_image"], whole["teacher_image"])
    again = batch(table, np.arange(100, 108), epoch=2, seed=4)
    assert not torch.equal(again["teacher_image"], whole["teacher_image"])


def test_no_rows_make_an_empty_batch():
    made = batch(small_set(3).slice(0, 0), np.array([], int))
    assert made["image"].shape == (0, 3, 20, 24)
    assert made["teacher_text"].shape == (0, 5)


def test_without_the_schema_metadata_and_with_large_lists_too():
    table = small_set(5)
    plain = table.replace_schema_metadata(None)
    large = plain.set_column(2, "captions", plain["captions"].cast(pa.large_list(pa.string())))
    for name, value in batch(table).items():
        assert torch.equal(value, batch(large)[name])


# ---------------------------------------------------------------------------------------- bad input


def changed(table: pa.Table, name: str, value) -> pa.Table:
    at = table.schema.get_field_index(name)
    field = table.schema.field(name)
    array = value if isinstance(value, pa.Array) else pa.array(value, field.type)
    return table.set_column(at, field.with_type(array.type), array)


def test_too_few_vectors_or_augmentations_are_told():
    table = small_set(3)
    lists = table["teacher_text"].to_pylist()
    with pytest.raises(UsageError, match=r"Row 12 has 3 captions but 2 vectors in teacher_text"):
        batch(changed(table, "teacher_text", [*lists[:2], lists[2][:2]]), np.arange(10, 13))
    images = table["teacher_image"].to_pylist()
    with pytest.raises(UsageError, match=r"Row 0 has 4 augmentations but 3 vectors in teacher_image"):
        batch(changed(table, "teacher_image", [images[0][:3], *images[1:]]))
    made = table["teacher_synthetic"].to_pylist()
    with pytest.raises(UsageError, match=r"Row 1 has 1 synthetic but 0 vectors"):
        batch(changed(table, "teacher_synthetic", [[], None, made[2]]))
    drawn = table["augmentations"].to_pylist()
    fewer = changed(table, "augmentations", [row[:3] for row in drawn])
    with pytest.raises(UsageError, match=r"Row 0 has 3 augmentations, expected 4"):
        batch(fewer)
    fewer = changed(table, "augmentations", [[], *drawn[1:]]).replace_schema_metadata(None)
    with pytest.raises(UsageError, match=r"Row 0 has 0 augmentations, expected at least one"):
        batch(fewer)
    bare = changed(table, "captions", [["x"], [], ["y"]])
    with pytest.raises(UsageError, match=r"Row 1 has no captions"):
        batch(bare)


def test_vectors_of_another_width_are_told():
    table = small_set(3)
    narrow = vector_lists([4] * 3, np.zeros((12, 3)))
    with pytest.raises(UsageError, match=r"teacher_image has vectors of width 3, expected .* width 5"):
        batch(changed(table, "teacher_image", narrow))
    text = vector_lists([1, 2, 3], np.zeros((6, 3)))
    with pytest.raises(UsageError, match=r"teacher_text has vectors of width 3, expected .* width 5"):
        batch(changed(table, "teacher_text", text).replace_schema_metadata(None))
    flat = pa.array([[0.0] * 5] * 3, pa.list_(pa.float32()))
    with pytest.raises(UsageError, match=r"teacher_image has type list"):
        batch(changed(table, "teacher_image", flat))
    assert json.loads(table.schema.metadata[METADATA])["teachers"] == [["aa", 3], ["bb", 2]]


def test_missing_columns_rows_and_damaged_pictures_are_told():
    table = small_set(3)
    for name in REINFORCED_COLUMNS:
        with pytest.raises(UsageError, match=rf"no column '{name}': .* not reinforced"):
            batch(table.drop_columns([name]))
    with pytest.raises(UsageError, match=r"3 rows came with 2"):
        batch(table, np.arange(2))
    for broken in (b"", b"no picture", None):
        with pytest.raises(MediaError, match=r"row 21: "):
            batch(changed(table, "image", [png(noise()), broken, png(noise())]), np.arange(20, 23))


def test_what_is_no_set_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"no manifest.json.*moviola reinforce"):
        read_manifest(tmp_path)
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(UsageError, match=r"has not ended"):
        read_manifest(tmp_path / "x")
    for content, match in (
        ("{", "cannot be read"),
        ("[]", "not the manifest"),
        ('{"rows": 1}', "not the manifest"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UsageError, match=match):
            read_manifest(tmp_path)
