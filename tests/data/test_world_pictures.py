"""Still pictures of the made world: the same every time, and everything said about them is true."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moviola.data import world_text as text
from moviola.data.world import picture
from moviola.data.world_draw import Look, paint
from moviola.data.world_scene import Ground, Scene, Thing
from moviola.data.world_shapes import COLOURS, LARGEST_TURN, SHAPES, SIZES, Dice
from moviola.types import UsageError

NOUNS = {word: shape for shape in SHAPES for word in text.SHAPE_WORDS.get(shape, (shape,))}


def test_same_bytes_alone_or_in_any_order() -> None:
    forward = [picture(3, i) for i in range(12)]
    backward = [picture(3, i) for i in reversed(range(12))][::-1]
    for first, second in zip(forward, backward):
        assert first.pixels_HWC.tobytes() == second.pixels_HWC.tobytes()
        assert first.captions == second.captions
        assert first.held_out == second.held_out
    assert picture(4, 0).pixels_HWC.tobytes() != forward[0].pixels_HWC.tobytes()
    assert forward[1].pixels_HWC.tobytes() != forward[0].pixels_HWC.tobytes()


def test_numpy_integers_serve_as_seeds() -> None:
    assert picture(np.int64(3), 5).captions == picture(3, 5).captions  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**40), st.sampled_from([32, 64, 96, 128]))
def test_masks_boxes_and_words_agree_with_the_things(seed: int, index: int, size: int) -> None:
    scene = picture(seed, index, size=size, masks=True)
    assert scene.pixels_HWC.shape == (size, size, 3)
    assert scene.pixels_HWC.dtype == np.uint8
    assert np.array_equal(scene.pixels_HWC, picture(seed, index, size=size).pixels_HWC)
    masks = scene.masks_KHW
    assert masks is not None
    assert masks.shape == (len(scene.things), size, size)
    assert masks.sum(0).max(initial=0) <= 1  # visible pixels belong to one thing
    for thing, mask in zip(scene.things, masks):
        assert mask.any(), "every thing is visible"
        rows, columns = np.nonzero(mask)
        x0, y0, x1, y1 = thing.box
        assert x0 <= columns.min() <= columns.max() < x1
        assert y0 <= rows.min() <= rows.max() < y1
        assert abs((columns.min() + columns.max() + 1) / 2 - (x0 + x1) / 2) <= 1.5 + 0.05 * size
        low, high = SIZES[thing.size]
        assert low * size <= thing.radius <= high * size
    if scene.relation in ("left", "right", "above", "below"):
        first, second = scene.things
        across, along = first.x - second.x, first.y - second.y
        truth = {"left": across < 0, "right": across > 0, "above": along < 0, "below": along > 0}
        assert truth[scene.relation]
        wide, narrow = (across, along) if scene.relation in ("left", "right") else (along, across)
        assert abs(wide) > 2 * abs(narrow)
    if scene.relation == "inside":
        inner, outer = (thing.box for thing in scene.things)
        assert outer[0] < inner[0] < inner[2] < outer[2]
        assert outer[1] < inner[1] < inner[3] < outer[3]
    for caption in scene.captions + scene.held_out:
        check_words(scene, caption)


def check_words(scene: Scene, caption: str) -> None:
    """Every colour, shape and number in a caption is one that the scene has."""
    words = caption.replace(",", "").split()
    shapes = {NOUNS[w] for w in words if w in NOUNS} | {
        NOUNS[w.removesuffix("s")] for w in words if w.removesuffix("s") in NOUNS
    }
    assert shapes <= {thing.shape for thing in scene.things}, caption
    allowed = {thing.colour for thing in scene.things} | set(scene.ground.colours)
    if scene.ground.kind in text.GROUND_NAMES:
        allowed |= {
            c for phrase in text.GROUND_NAMES[scene.ground.kind] for c in phrase.split() if c in COLOURS
        }
    said = {"gray" if w == "grey" else w for w in words if w in COLOURS or w == "grey"}
    assert said <= allowed, caption
    numbers = {text.NUMBERS.index(w) for w in words if w in text.NUMBERS[2:]} | {
        int(w) for w in words if w.isdigit()
    }
    assert numbers <= {len(scene.things)}, caption


def test_the_pixels_of_a_thing_have_its_colour() -> None:
    """The median colour inside a plain thing's mask is nearest to the colour its caption names."""
    names = list(COLOURS)
    table = np.array([COLOURS[c] for c in names], dtype=float)
    votes: dict[str, list[bool]] = {name: [] for name in names}
    for index in range(500):
        scene = picture(11, index, masks=True)
        assert scene.masks_KHW is not None
        for thing, mask in zip(scene.things, scene.masks_KHW):
            if thing.texture == "plain" and mask.sum() > 40:
                middle = np.median(scene.pixels_HWC[mask].astype(float), axis=0)
                nearest = names[int(np.argmin(np.linalg.norm(table - middle, axis=1)))]
                votes[thing.colour].append(nearest == thing.colour)
    for name, right in votes.items():
        assert len(right) > 10, name
        assert np.mean(right) > 0.75, name


def test_every_shape_can_be_told_from_every_other() -> None:
    """Drawn without a turn, no two shapes cover nearly the same pixels."""
    drawn = {}
    for shape in SHAPES:
        canvas = Image.new("RGB", (64, 64))
        paint(canvas, Look(shape, (255, 255, 255), (0, 0, 0)), 32, 32, 24, 0)
        drawn[shape] = np.asarray(canvas)[:, :, 0] > 127
        assert drawn[shape].any()
        assert not drawn[shape][:7].any()  # nothing sticks out of the radius
    for first, second in itertools.combinations(SHAPES, 2):
        a, b = drawn[first], drawn[second]
        assert (a & b).sum() / (a | b).sum() < 0.92, (first, second)
    assert set(LARGEST_TURN) == set(SHAPES)


def test_drawing_is_smooth_and_in_place() -> None:
    """Coverage sums to the area, and the centroid follows the position below a pixel."""
    for x in (20.0, 20.25, 20.5, 31.9):
        canvas = Image.new("RGB", (64, 64))
        paint(canvas, Look("circle", (255, 255, 255), (0, 0, 0)), x, 30.5, 10, 0)
        level = np.asarray(canvas)[:, :, 0].astype(float) / 255
        assert level.sum() == pytest.approx(np.pi * 81, rel=0.03)
        assert (level.sum(0) @ (np.arange(64) + 0.5)) / level.sum() == pytest.approx(x, abs=0.15)


def test_an_object_half_outside_is_cut_not_refused() -> None:
    canvas = Image.new("RGB", (32, 32))
    paint(canvas, Look("square", (255, 255, 255), (0, 0, 0)), -2, 16, 10, 0)
    assert np.asarray(canvas)[16, 0, 0] == 255


def test_photos_become_objects_and_grounds() -> None:
    rng = np.random.default_rng(0)
    photos = [(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8), name) for name in ("goldfish", "teapot")]
    scenes = [picture(5, i, photos=photos) for i in range(200)]
    things = [thing.photo for scene in scenes for thing in scene.things if thing.photo]
    grounds = [scene.ground.photo for scene in scenes if scene.ground.photo]
    assert set(things) == set(grounds) == {"goldfish", "teapot"}
    for scene in scenes:
        if [t.photo for t in scene.things] == ["teapot"] and scene.ground.photo is None:
            assert all("teapot" in caption for caption in scene.captions)
    nameless = [Image.fromarray(photo) for photo, _ in photos]
    scenes = [picture(5, i, photos=nameless) for i in range(100)]
    assert any(scene.ground.kind == "photo" for scene in scenes)
    assert all(thing.photo is None for scene in scenes for thing in scene.things)


def test_counts_shapes_and_places_are_all_met() -> None:
    scenes = [picture(0, i) for i in range(1500)]
    counts = [len(scene.things) for scene in scenes if scene.same]
    assert min(np.bincount(counts, minlength=6)[2:]) > 40
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in scenes for thing in scene.things} == set(COLOURS)
    assert {s.things[0].place for s in scenes if len(s.things) == 1} == set(
        itertools.product(range(3), range(3))
    )


def test_splits_keep_colours_and_shapes_apart() -> None:
    for i in range(200):
        scene = picture(0, i, colours=("red", "blue", "white"), shapes=("star", "ring", "heart"))
        assert {t.shape for t in scene.things} <= {"star", "ring", "heart"}
        assert {t.colour for t in scene.things} | set(scene.ground.colours) <= {"red", "blue", "white"}


@pytest.mark.parametrize(
    ("colours", "shapes", "words"),
    [
        (("red", "blue"), SHAPES, "three colours"),
        (tuple(COLOURS), (), "a shape"),
        (("red", "blue", "mauve"), SHAPES, "mauve"),
        (tuple(COLOURS), ("blob",), "blob"),
    ],
)
def test_an_impossible_palette_is_an_error(
    colours: tuple[str, ...], shapes: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        picture(0, 0, colours=colours, shapes=shapes)


def test_object_and_ground_differ_in_colour() -> None:
    for i in range(300):
        scene = picture(8, i)
        assert not {t.colour for t in scene.things} & set(scene.ground.colours)


def test_held_out_words_are_all_known_and_sentences_all_new() -> None:
    scenes = [picture(0, i, captions=6) for i in range(1500)]
    train = {caption for scene in scenes for caption in scene.captions}
    held_out = {caption for scene in scenes for caption in scene.held_out}
    known = {word for caption in train for word in caption.replace(",", "").split()}
    assert {word for caption in held_out for word in caption.replace(",", "").split()} <= known
    assert not train & held_out
    for kind in text.TRAIN_TEMPLATES:
        assert not set(text.TRAIN_TEMPLATES[kind]) & set(text.HELD_OUT_TEMPLATES[kind])


def test_phrases_read_well() -> None:
    dice = Dice(0, 0)
    thing = Thing("oval", "orange", "medium", "plain", 1, 1, 1, 0, (1, 1), (0, 0, 1, 1))
    phrases = {text.noun_phrase(thing, dice) for _ in range(40)}
    assert phrases <= {"an orange oval", "an orange ellipse", "one orange oval", "one orange ellipse"}
    cross = Thing("cross", "red", "medium", "plain", 1, 1, 1, 0, (1, 1), (0, 0, 1, 1))
    assert text.plural("cross") == "crosses"
    assert {text.noun_phrase(cross, dice, count=3) for _ in range(40)} >= {
        "three red crosses",
        "3 red crosses",
    }
    assert text.ground_phrase(Ground("striped", ("orange",)), dice).split()[0] == "a"
