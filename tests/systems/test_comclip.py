from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from moviola.metrics.compositional import winoground_scores
from moviola.parts.regions import box_mask, by_table, by_words, grey, keep, overlay
from moviola.parts.sentence_parser import Entity, Parse, Relation
from moviola.systems.retrieval.comclip import (
    ComClip,
    ComClipConfig,
    Pair,
    blend,
    comvg,
    run_claim,
    sub_images,
    weigh,
    winoground,
)
from moviola.types import Refusal, UsageError
from tests.verbs.colour_clip import COLOURS, colour_model


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "24-comclip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def pixels_of(tensor_CHW):
    return tensor_CHW.permute(1, 2, 0).numpy().astype(np.uint8)


class Stub:
    """The oracle's encoder: a linear map of the pixels, a table of texts."""

    def __init__(self, meta, data):
        self.phrases = meta["config"]["phrases"]
        self.data = data

    def image(self, pixels_HW3):
        flat = torch.from_numpy(pixels_HW3.transpose(2, 0, 1).copy()).float().flatten() / 255
        return self.data["param/image_proj"] @ flat + self.data["param/image_bias"]

    def text(self, words):
        return self.data["param/text_table"][self.phrases.index(words)]

    def blend(self, pixels_HW3, parse, regions, config):
        subs = sub_images(pixels_HW3, parse, regions, config)
        made = blend(
            self.text(parse.sentence),
            self.image(pixels_HW3),
            torch.stack([self.text(sub.key) for sub in subs]),
            torch.stack([self.image(sub.of(pixels_HW3)) for sub in subs]),
            config,
            logit_scale=float(self.data["param/logit_scale"].exp()),
        )
        return subs, made


def test_parity_of_every_output(oracle):
    meta, data = oracle
    config, stub, got = meta["config"], Stub(meta, data), {}
    images = [pixels_of(data[f"in/image_{n}"]) for n in range(2)]
    size = images[0].shape[:2]

    def put(name, pixels):
        got[name] = torch.from_numpy(np.asarray(pixels).astype(np.int64)).movedim(-1, -3)

    first = keep(images[0], box_mask(config["helper_box"], size))
    put("out/helper/black_outside", first)
    put("out/helper/overlay", overlay([first, keep(images[1], box_mask(config["helper_box2"], size))]))
    got["out/helper/weights"], _ = weigh(data["in/helper_scores"], comvg())

    for n, pixels in enumerate(images):
        parse = Parse.from_triplet(config["triplet"], config["sentence"])
        subs, made = stub.blend(pixels, parse, by_table(config["match"][n], config["dense"][n]), comvg())
        assert [sub.key for sub in subs] == meta["sub_keys"][f"comvg_{n}"]
        put(f"out/comvg/sub_images_{n}", np.stack([sub.of(pixels) for sub in subs]))
        got |= {f"out/comvg/score_{n}": made.score, f"out/comvg/plain_clip_{n}": made.plain}
        got |= {f"out/comvg/sub_scores_{n}": made.fit_K, f"out/comvg/sub_weights_{n}": made.weight_K}

    wino = config["wino"]
    for c, caption in enumerate(wino["captions"]):
        parse = Parse.from_json(wino["parse"][c], caption)
        for n, pixels in enumerate(images):
            regions = by_table(wino["match"][c][n], config["dense"][n])
            subs, made = stub.blend(pixels, parse, regions, winoground())
            where = f"c{c}_i{n}"
            assert [sub.key for sub in subs] == meta["sub_keys"][f"wino_{where}"]
            got |= {f"out/wino/score_{where}": made.score, f"out/wino/sub_scores_{where}": made.fit_K}
            got[f"out/wino/sub_weights_{where}"] = made.weight_K
            if where == "c1_i0":
                put(f"out/wino/sub_images_{where}", np.stack([sub.of(pixels) for sub in subs]))

    scores_R22 = data["in/metric_scores"].reshape(-1, 2, 2).numpy()
    right_R3 = torch.from_numpy(winoground_scores(scores_R22).right_R3.astype(np.int64))
    for n, name in enumerate(("text", "image", "group")):
        got[f"out/metric/{name}_correct"] = right_R3[:, n]

    assert set(got) == {name for name in data if name.startswith("out/")}
    for name, value in got.items():
        wanted = data[name]
        assert value.shape == wanted.shape, name
        if wanted.dtype == torch.int64:
            assert torch.equal(value, wanted), name
            continue
        worst = (value.double() - wanted.double()).abs().max()
        assert worst <= meta["tolerance"] * wanted.abs().max() + 1e-7, f"{name}: {worst:.2e}"


# --------------------------------------------------------------------------------------------------
# Sub-images
# --------------------------------------------------------------------------------------------------

SIZE = (20, 24)
PARSE = Parse(
    "a red dog chasing a cat",
    (Entity("dog", ("red",)), Entity("cat")),
    (Relation("dog", "chasing", "cat"),),
)
BOXES = {"dog": [(2, 3, 10, 12)], "cat": [(8, 6, 20, 18), (0, 0, 4, 4)]}


def noise(seed=0, dark=False):
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    if dark:
        pixels[::3] = 0
        pixels[1::3] = (0, 0, 3)  # its grey is 0
    return pixels


@pytest.mark.parametrize("seed", range(3))
def test_pasting_one_by_one_and_uniting_masks_agree(seed):
    """The official way, sub-image over sub-image, in any order."""
    pixels = noise(seed, dark=True)
    subs = sub_images(pixels, PARSE, BOXES, ComClipConfig(overlay="grey"))
    cut = {name: [keep(pixels, box_mask(box, SIZE)) for box in boxes] for name, boxes in BOXES.items()}
    things = {name: overlay(parts) for name, parts in cut.items()}
    for order in (("cat", "dog"), ("dog", "cat")):
        both = overlay([things[name] for name in order])
        for sub, wanted in zip(subs, (things["dog"], things["cat"], both), strict=True):
            np.testing.assert_array_equal(sub.of(pixels), wanted)
    np.testing.assert_array_equal(things["cat"], overlay(cut["cat"][::-1]))


def test_true_masks_keep_dark_colours():
    pixels = noise(dark=True)
    (mask, *_), (lost, *_) = (
        [sub.of(pixels) for sub in sub_images(pixels, PARSE, BOXES, ComClipConfig(overlay=overlay_))]
        for overlay_ in ("mask", "grey")
    )
    inside = box_mask(BOXES["dog"][0], SIZE)
    np.testing.assert_array_equal(mask[inside], pixels[inside])
    assert (mask != lost).any(-1).sum() == (inside & (grey(pixels) == 0) & pixels.any(-1)).sum() > 0
    assert not mask[~inside].any()


def test_what_was_not_found_has_the_whole_picture():
    pixels = noise()
    regions = {"dog": [], "cat": [None]}
    parsed = sub_images(pixels, PARSE, regions)
    assert [sub.key for sub in parsed] == ["red dog", "cat", "chasing"]
    assert all((sub.of(pixels) == pixels).all() for sub in parsed)
    half = {"dog": [], "cat": BOXES["cat"]}
    by_match = sub_images(pixels, PARSE, half, ComClipConfig(relation="matched"))
    assert by_match[2].mask_HW is None
    assert sub_images(pixels, PARSE, BOXES, ComClipConfig(relation="matched"))[2].mask_HW is not None
    alone = Parse("a dog running", (Entity("dog"),), (Relation("dog", "running"),))
    assert sub_images(pixels, alone, BOXES)[1].mask_HW is None


def test_equal_keys_stay_or_merge():
    parse = Parse(
        "a dog chasing a cat chasing a dog",
        (Entity("dog"), Entity("cat")),
        (Relation("dog", "chasing", "cat"), Relation("cat", "chasing")),
    )
    pixels = noise()
    assert [s.key for s in sub_images(pixels, parse, BOXES)] == ["dog", "cat", "chasing", "chasing"]
    merged = sub_images(pixels, parse, BOXES, ComClipConfig(repeats="merge"))
    assert [s.key for s in merged] == ["dog", "cat", "chasing"]
    assert merged[2].mask_HW is None  # the later one stays


def test_relations_without_words_are_passed_over():
    parse = Parse("a dog", (Entity("dog"),), (Relation("dog", " "),))
    assert [sub.key for sub in sub_images(noise(), parse, BOXES)] == ["dog"]


# --------------------------------------------------------------------------------------------------
# The score
# --------------------------------------------------------------------------------------------------


def vectors(count=3, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((dim,), (dim,), (count, dim), (count, dim))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("scores", ["cosine", "dot"])
def test_the_score_is_the_formula(scores):
    text, image, keys, subs = vectors()
    keys = subs + 0.3 * keys  # fits are positive
    got = blend(text, image, keys, subs, ComClipConfig(scores=scores), logit_scale=7.0)
    if scores == "cosine":
        image, keys, subs = (x / x.norm(dim=-1, keepdim=True) for x in (image, keys, subs))
    fit = [float(k @ s) for k, s in zip(keys, subs, strict=True)]
    whole = image + sum(f / sum(fit) * s for f, s in zip(fit, subs, strict=True))
    assert float(got.score) == pytest.approx(float(text @ whole / text.norm() / whole.norm()))
    assert float(got.weight_K.sum()) == pytest.approx(1)
    assert got.note is None


@pytest.mark.parametrize("scores", ["cosine", "dot"])
def test_whole_pictures_and_no_sub_images_give_the_plain_cosine(scores):
    text, image, keys, _ = vectors()
    keys = keys + 3 * image
    config = ComClipConfig(scores=scores)
    plain = float(F.cosine_similarity(text, image, dim=0))
    assert float(blend(text, image, keys, image.expand(3, -1), config).score) == pytest.approx(plain)
    none = blend(text, image, keys[:0], keys[:0], config)
    assert float(none.score) == pytest.approx(plain) == pytest.approx(float(none.plain))
    assert "no sub-images" in none.note


def test_guarded_weights():
    weights, note = weigh(torch.tensor([3.0, -1.0, 1.0]))
    assert weights.tolist() == [0.75, 0, 0.25]
    assert note.startswith("1 of 3")
    weights, note = weigh(torch.tensor([-3.0, -1.0, 0.0]))
    assert weights.tolist() == [0, 0, 0]
    assert "No sub-image fits" in note
    fit = torch.tensor([0.4, 0.1, 0.2])
    torch.testing.assert_close(weigh(fit)[0], weigh(fit, ComClipConfig(weights="ratio"))[0])
    assert weigh(torch.tensor([3.0, -1.0]), ComClipConfig(weights="ratio"))[0].tolist() == [1.5, -0.5]
    softmax = ComClipConfig(weights="softmax", temperature=2.0)
    torch.testing.assert_close(weigh(fit, softmax)[0], (fit / 2).softmax(0))
    for fit in (torch.tensor([1.0, -1.0]), torch.zeros(2)):
        weights, note = weigh(fit, ComClipConfig(weights="ratio"))
        assert weights.isnan().all()
        assert "add up to 0" in note


# --------------------------------------------------------------------------------------------------
# Over a model
# --------------------------------------------------------------------------------------------------


def stripes(*colours, side=24):
    pixels = np.zeros((side, side, 3), np.uint8)
    for name, columns in zip(colours, np.array_split(np.arange(side), len(colours)), strict=True):
        pixels[:, columns] = COLOURS[name]
    return Image.fromarray(pixels)


COLOURED = Parse(
    "red then green",
    (Entity("thing", ("red",)), Entity("green")),
    (Relation("thing", "then", "green"),),
)
HALVES = {"thing": [(0, 0, 11, 23)], "green": [(12, 0, 23, 23)]}


def pairs():
    """Some with the same picture, equal masks and whole pictures."""
    first, second = stripes("red", "green"), stripes("blue", "green", "red")
    other = Parse("green", (Entity("green"),))
    return [
        Pair(COLOURED, first, HALVES),
        Pair(COLOURED, second, {"thing": [], "green": [None]}),
        Pair(other, first, {"green": [(0, 0, 23, 23)]}),
        Pair(other, second, HALVES),
    ]


@pytest.mark.parametrize("scores", ["cosine", "dot"])
def test_encoding_equal_sub_images_once_changes_nothing(scores):
    config = ComClipConfig(scores=scores)
    shared, single = colour_model(), colour_model()
    ours = ComClip(shared, config).match(pairs())
    plain = ComClip(single, config, share=False).match(pairs())
    for a, b in zip(ours, plain, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-6)
        assert [p.weight for p in a.parts] == pytest.approx([p.weight for p in b.parts], abs=1e-6)
    assert single.module.seen == 4 + 4 + 2 + 2
    # first: itself, both halves (all of it is both of them); second: itself, and a half
    assert shared.module.seen == 3 + 2
    one_by_one = [ComClip(colour_model(), config).score(*pair).score for pair in pairs()]
    assert one_by_one == pytest.approx([one.score for one in ours], abs=1e-6)


def test_each_text_is_encoded_once(monkeypatch):
    model, seen = colour_model(), []
    encode = model.embed_texts
    monkeypatch.setattr(model, "embed_texts", lambda texts, **kw: seen.extend(texts) or encode(texts, **kw))
    matcher = ComClip(model)
    matcher.match(pairs())
    matcher.match(pairs())
    assert sorted(seen) == sorted({"red then green", "red thing", "green", "then"})


def test_the_parts_say_what_was_weighed():
    (got,) = ComClip(colour_model()).match([Pair(COLOURED, stripes("red", "green"), HALVES)])
    assert [(p.key, p.kind) for p in got.parts] == [
        ("red thing", "entity"),
        ("green", "entity"),
        ("then", "relation"),
    ]
    assert got.parts[0].boxes == ((0, 0, 11, 23),)
    assert set(got.parts[2].boxes) == {(0, 0, 11, 23), (12, 0, 23, 23)}
    assert sum(p.weight for p in got.parts) == pytest.approx(1)


def test_regions_are_asked_for_where_none_are_given():
    asked = []

    def finder(pictures, phrases):
        asked.extend(phrases)
        return [HALVES for _ in pictures]

    picture = stripes("red", "green")
    matcher = ComClip(colour_model(), finder=finder)
    found, given = matcher.match([Pair(COLOURED, picture), Pair(COLOURED, picture, HALVES)])
    assert asked == [{"thing": "red thing", "green": "green"}]
    assert found == given


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "I;16", "LA"])
def test_pictures_of_every_mode(mode):
    picture = stripes("red", "green").convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.full((24, 24), 40_000, np.uint16))
    got = ComClip(colour_model()).score(COLOURED, picture, HALVES)
    assert math.isfinite(got.score)


@pytest.mark.parametrize("overlay_", ["mask", "grey"])
def test_an_all_black_picture_has_a_score(overlay_):
    got = ComClip(colour_model(), ComClipConfig(overlay=overlay_)).score(COLOURED, stripes("black"), HALVES)
    assert math.isfinite(got.score)


def test_no_entity_is_the_plain_cosine():
    got = ComClip(colour_model()).score(Parse("red then green"), stripes("red", "green"), {})
    assert got.score == pytest.approx(got.plain)
    assert "no sub-images" in got.note


def one_box(*box):
    return lambda: sub_images(noise(), PARSE, {"dog": [box], "cat": []})


BAD = {
    "an entity that is not in the match table": (
        lambda: sub_images(noise(), PARSE, {"dog": []}),
        "no entity 'cat'",
    ),
    "right of left": (one_box(9, 2, 3, 8), "left top to its right bottom"),
    "below above": (one_box(2, 9, 3, 8), "left top to its right bottom"),
    "outside": (one_box(30, 2, 40, 8), "outside the picture of 24 x 20"),
    "above the picture": (one_box(2, -9, 4, -1), "outside"),
    "not a number": (one_box(2, math.nan, 4, 5), "in pixels"),
    "three numbers": (one_box(2, 3, 4), "left, top, right, bottom"),
    "scores": (lambda: ComClipConfig(scores="euclid"), "cosine, dot"),
    "weights": (lambda: ComClipConfig(weights="even"), "guarded"),
    "overlay": (lambda: ComClipConfig(overlay="none"), "mask"),
    "relation": (lambda: ComClipConfig(relation="all"), "parsed"),
    "repeats": (lambda: ComClipConfig(repeats="drop"), "keep"),
    "temperature": (lambda: ComClipConfig(temperature=0.0), "positive"),
    "a sentence that is too long": (
        lambda: ComClip(colour_model()).score(Parse("red then " * 40), stripes("red"), {}),
        "context",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()


def test_a_long_sentence_may_be_cut():
    with pytest.warns(UserWarning, match="cut"):
        got = ComClip(colour_model(), truncate=True).score(Parse("red then " * 40), stripes("red"), {})
    assert math.isfinite(got.score)


@pytest.mark.parametrize("options", [{"separable": False}, {"has_text": False}, {"adaptation": "classifier"}])
def test_models_it_cannot_work_on(options):
    with pytest.raises(Refusal, match="single vectors"):
        ComClip(colour_model(**options))


def test_phrases_by_words():
    dense = {
        "two red dogs": [[0, 0, 1, 1], [9, 9, 9, 9]],
        "a dog": [[1, 1, 2, 2]],
        "a catalogue": [[3, 3, 4, 4]],
    }
    got = by_words(PARSE, dense)
    assert got == {"dog": [(0, 0, 1, 1)], "cat": []}  # the one that is red, too
    brown = Parse("a brown dog", (Entity("dog", ("brown",)),))
    assert by_words(brown, dense) == {"dog": [(0, 0, 1, 1), (1, 1, 2, 2)]}
    assert by_table({"dog": ["a dog", "a wolf"]}, dense) == {"dog": [(1, 1, 2, 2), None]}


@pytest.mark.slow
def test_the_claim_runs_and_the_encoder_has_learned():
    """Who is better on swapped pairs is the claim's to say: three seeds, in docs/reproduction.md."""
    figures = {arm: run_claim(arm, 7, steps=500, count=100) for arm in ("whole image", "comclip")}
    assert figures["whole image"]["other relation, %"] > 90
    assert figures["whole image"]["other object, %"] > 60
    assert figures["whole image"] != figures["comclip"]
