"""`classify_through_sentences` and its figures: the right class, and every bad input said clearly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moviola
from moviola.systems.video.zsarcap import ZsarCapConfig
from moviola.types import Refusal, UsageError
from moviola.verbs.classify import NothingClassified
from moviola.verbs.through_sentences import classify_through_sentences, sentence_encoder
from moviola.verbs.through_sentences_measure import evaluate_through_sentences, random_splits
from tests.verbs.colour_clip import picture, video

WORDS = ["horse", "rides", "bow", "arrow", "shoots", "water", "swims", "pool", "ball", "kicks"]
CLASSES = ["ride horse", "shoot bow", "swim"]
DOCUMENTS = {
    "ride horse": "One rides a horse by sitting on it. A horse is a large animal.",
    "shoot bow": "One shoots an arrow with a bow. A bow is made of wood mostly.",
    "swim": "One swims in the water of a pool. The pool is full of water.",
}
SAID = {
    "v_horse_1": [{"sentence": "A horse rides off .", "timestamp": [0, 1]}],
    "v_arrow_1": [
        {"sentence": "She shoots .", "timestamp": [0, 1]},
        {"sentence": "A horse .", "timestamp": [1, 2]},
    ],
    "v_pool_1": [{"sentence": "The pool and the water .", "timestamp": [0, 1]}],
}
SHORT = ZsarCapConfig(min_words=5)


def by_words(texts):
    """How often each word is in a text, the rest in one more column."""
    return np.array([[t.split().count(w) for w in WORDS] + [0.1] for t in texts], np.float32)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name in ("horse_1", "arrow_1", "pool_1"):
        video(folder / f"{name}.mp4", ("red", 1))
    picture(folder / "still.png", "red")
    return folder


@pytest.fixture
def captions(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"version": "1", "results": SAID}))
    return tmp_path / "one.json"


def best(got):
    return {Path(one.file).name: one.best.name for one in got.results}


def test_the_nearest_sentence_names_the_class(media, captions, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in DOCUMENTS.items():
        (texts / f"{name.replace(' ', '_')}.txt").write_text(text)
    got = classify_through_sentences(
        media, ", ".join(CLASSES), captions=captions, documents=texts, encoder=by_words, config=SHORT
    )
    assert best(got) == {"horse_1.mp4": "ride horse", "arrow_1.mp4": "shoot bow", "pool_1.mp4": "swim"}
    assert sum(label.probability for label in got.results[0].labels) == pytest.approx(1)
    assert got.classes == tuple(CLASSES)
    assert got.model == "by_words"
    assert [(Path(one.path).name, one.reason) for one in got.failed] == [
        ("still.png", "no observer says anything about it")
    ]
    assert "3 classes have fewer than 10 sentences" in got.notes[0]
    json.dumps(got.to_json())


def test_probabilities_are_the_softmax_of_distances(media):
    said = {"horse_1.mp4": ["horse bow"]}
    got = classify_through_sentences(
        media / "horse_1.mp4", ["horse", "bow", "swim"], captions=said, encoder=by_words, k=2
    )
    cosine = (1 + 0.01) / np.sqrt(2.01 * 1.01)
    logits = 20 * np.array([cosine, cosine, 0.01 / np.sqrt(2.01 * 0.01)])
    wanted = np.exp(logits) / np.exp(logits).sum()
    assert [label.name for label in got.results[0].labels] == ["horse", "bow"]
    assert [label.probability for label in got.results[0].labels] == pytest.approx(wanted[:2], rel=1e-4)


def test_observers_add_up(media, captions):
    """Files, mappings and captioners together; who says nothing of a video is left out, and that is noted."""

    def captioner(path):
        return ["he swims in water in a pool"] if path.stem == "arrow_1" else []

    got = classify_through_sentences(
        media,
        CLASSES,
        captions=[captions, {"still": "an arrow"}, captioner],
        documents=DOCUMENTS,
        encoder=by_words,
        config=SHORT,
    )
    assert best(got)["arrow_1.mp4"] == "swim"
    assert best(got)["still.png"] == "shoot bow"
    assert "4 of 4 videos are told by some of the 3 observers." in got.notes


def test_only_the_first_sentence_of_an_observer_counts(media, captions):
    options = {"captions": captions, "documents": DOCUMENTS, "encoder": by_words}
    everything = ZsarCapConfig(min_words=5, observations="all")
    said = {"arrow_1": ["she shoots", "horse rides horse rides horse rides"]}
    for config, wanted in ((SHORT, "shoot bow"), (everything, "ride horse")):
        got = classify_through_sentences(
            media / "arrow_1.mp4", CLASSES, **{**options, "captions": said}, config=config
        )
        assert got.results[0].best.name == wanted


def test_moviolas_own_text_tower(media, captions):
    """The built-in model by name and loaded; a long text is cut and that is noted."""
    model = moviola.load("builtin", device="cpu")
    long = {name: f"{text} {'word ' * 90}." for name, text in DOCUMENTS.items()}
    got = classify_through_sentences(media, CLASSES, captions=captions, documents=long, encoder=model)
    assert len(got.results) == 3
    assert any("were cut to the model's context" in note for note in got.notes)
    embed, name = sentence_encoder("builtin", device="cpu")
    assert name == model.name
    np.testing.assert_allclose(embed(["a dog"]), model.embed_texts(["a dog"], normalize=False), atol=1e-6)


def test_a_model_without_words(monkeypatch):
    model = moviola.load("builtin", device="cpu")
    monkeypatch.setattr(type(model), "has_text", False)
    with pytest.raises(Refusal, match="has no text tower"):
        sentence_encoder(model)


def test_a_folder_of_a_text_model(media, captions, tmp_path):
    pytest.importorskip("transformers")
    from tests.parts.test_sentence_encoder import tiny_bert

    folder = tiny_bert(tmp_path / "bert", ["horse", "rides", "bow", "arrow", "shoots", "pool", "water"])
    got = classify_through_sentences(media, CLASSES, captions=captions, encoder=folder)
    assert got.model == "bert"
    assert len(got.results) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"classes": "swim, Swim"}, "differ in spaces, case or brackets alone: swim"),
        ({"classes": ["\u5f13"]}, "no letter from a to z"),
        ({"captions": []}, "There are no observers"),
        ({"classes": ["swim", "fly"]}, "no document for 1 of 2 classes: fly"),
        ({"config": None}, "no sentence of 15 words or more in their documents: ride horse, shoot bow, swim"),
    ],
)  # fmt: skip
def test_bad_input(media, captions, changes, said):
    options = {
        "classes": CLASSES,
        "captions": captions,
        "documents": DOCUMENTS,
        "encoder": by_words,
        "config": SHORT,
    }
    with pytest.raises(UsageError, match=said):
        classify_through_sentences(media, **{**options, **changes})


def test_documents_that_are_not_utf8(media, captions, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in DOCUMENTS.items():
        (folder / f"{name}.txt").write_bytes(f"{text} Caf\u00e9.".encode("cp1252"))
    options = {"captions": captions, "documents": folder, "encoder": by_words, "config": SHORT}
    with pytest.raises(UsageError, match="is not utf-8 text"):
        classify_through_sentences(media, CLASSES, **options)
    assert classify_through_sentences(media, CLASSES, **options, encoding="cp1252").results


def test_unread_documents_are_noted(media, captions):
    got = classify_through_sentences(
        media, CLASSES[:2], captions=captions, documents=DOCUMENTS, encoder=by_words, config=SHORT
    )
    assert "1 documents are of no class named: swim." in got.notes


def test_nothing_to_classify(media, captions, tmp_path):
    with pytest.raises(NothingClassified, match="of the 1 files none has a caption"):
        classify_through_sentences(media / "still.png", CLASSES, captions=captions, encoder=by_words)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingClassified, match="no pictures or videos"):
        classify_through_sentences(tmp_path / "empty", CLASSES, captions=captions, encoder=by_words)


def test_the_documents_name_the_classes(media, captions):
    documents = {name.replace(" ", "_"): text for name, text in DOCUMENTS.items()}
    got = classify_through_sentences(
        media, captions=captions, documents=documents, encoder=by_words, config=SHORT
    )
    assert got.classes == tuple(CLASSES)
    with pytest.raises(UsageError, match="no class names"):
        classify_through_sentences(media, captions=captions, encoder=by_words)


def test_definitions_alone_or_beside_documents(media, captions):
    options = {"captions": captions, "encoder": by_words, "config": SHORT}
    known = {"swim": "To swim is to move in water."}
    got = classify_through_sentences(media, CLASSES, documents=DOCUMENTS, definitions=known, **options)
    assert len(got.results) == 3
    with pytest.raises(UsageError, match="2 of 3 classes have no sentence of 5 words"):
        classify_through_sentences(media, CLASSES, definitions=known, **options)


def test_an_observer_of_other_videos_is_said(media, captions):
    got = classify_through_sentences(
        media, CLASSES, captions=[captions, {"elsewhere": "a horse"}], encoder=by_words
    )
    assert "Observer 2 says nothing about any of the 4 videos." in got.notes


# ----------------------------------------------------------------------------------------- figures


TRUTH = {"v_horse_1": "ride horse", "v_arrow_1": "shoot bow", "v_pool_1": "swim"}
SPLIT = {"training": ["Ride_Horse"], "testing": ["shoot bow", "swim"]}


def evaluate(truth=TRUTH, classes=CLASSES, **options):
    given = {"captions": SAID_PLAIN, "documents": DOCUMENTS, "encoder": by_words, "config": SHORT}
    return evaluate_through_sentences(truth, classes, **{**given, **options})


SAID_PLAIN = {name: [one["sentence"] for one in some] for name, some in SAID.items()}


def test_figures_of_a_split():
    wrong = {**SAID_PLAIN, "v_pool_1": ["A horse rides, the water"]}
    got = evaluate(captions=wrong, split=SPLIT)
    assert got.videos == 3
    assert got.prototypes == 6
    figures = got.figures
    assert figures["top-1"] == 100  # without the horse to choose from
    assert figures["seen, top-1"] == 100
    assert figures["unseen, top-1"] == 50
    assert figures["harmonic mean, top-1"] == pytest.approx(200 / 3)
    assert "2 classes" not in figures
    assert "harmonic mean, top-1" in str(got)
    json.dumps(got.to_json())


def test_neighbours_and_classes_apart():
    """The horse's two sentences are nearest to the pool's video: two classes hit, two neighbours do not."""
    wrong = {**SAID_PLAIN, "v_pool_1": ["A horse rides . horse horse a water"]}
    got = evaluate(captions=wrong, ks=(1, 2, 3)).figures
    assert got["top-1"] == pytest.approx(200 / 3)
    assert got["2 neighbours"] == pytest.approx(200 / 3)
    assert got["2 classes"] == 100


def test_several_splits_give_mean_and_spread(tmp_path):
    splits = random_splits(CLASSES, 2, runs=4, seed=1)
    assert all(sorted([*one["training"], *one["testing"]]) == CLASSES for one in splits)
    assert splits == random_splits(CLASSES, 2, runs=4, seed=1)
    got = evaluate(split=splits)
    assert got.splits == 4
    assert got.figures["top-1"] == 100
    assert got.spread["top-1"] == 0
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    assert evaluate(split=tmp_path / "split.json").figures == evaluate(split=SPLIT).figures
    with pytest.raises(UsageError, match="Of 3 classes 4"):
        random_splits(CLASSES, 4)


def test_truth_of_folders_and_files(media, tmp_path):
    for name, label in (("horse_1", "ride_horse"), ("pool_1", "swim")):
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / f"{name}.mp4").write_bytes((media / f"{name}.mp4").read_bytes())
    got = evaluate(tmp_path / "set", None)
    assert (got.videos, got.classes, got.figures["top-1"]) == (2, 2, 100)
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    assert evaluate(tmp_path / "truth.json", None).videos == 3


def test_substrings_only_when_asked():
    classes = ["pool", "pool ball", "horse"]
    said = {"v_PoolBall_1": ["kicks ball"], "v_Horse_1": ["a horse"], "v_x": ["nothing"]}
    got = evaluate_through_sentences(
        classes=classes, captions=said, ground_truth="substring", encoder=by_words
    )
    assert got.videos == 2
    assert "The names of 1 videos fit several classes" in got.notes[0]
    assert "v_PoolBall_1 fits pool, pool ball" in got.notes[0]
    assert "1 videos fit no class" in got.notes[1]
    assert got.figures["top-1"] == 50  # of the wrong name that the rule gives
    with pytest.raises(UsageError, match=r"Nothing says which class.*substring"):
        evaluate_through_sentences(classes=classes, captions=said, encoder=by_words)
    with pytest.raises(UsageError, match="not both"):
        evaluate(ground_truth="substring")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": {"training": [], "testing": ["fly"]}}, r"testing classes are not all in the list.*fly"),
        ({"split": {"training": ["swim"], "testing": ["swim"]}}, "both seen and unseen"),
        ({"split": {"training": ["swim"], "testing": []}}, "no testing classes"),
        ({"split": {"train": [], "test": []}}, 'A split is {"training"'),
        ({"split": []}, "no split in the list"),
        ({"truth": {"v_pool_1": "fly"}}, "videos' classes are not all in the list of classes: fly"),
        ({"truth": {"v_other": "swim"}}, "None of the labelled videos has a caption"),
        ({"truth": {"v_horse_1": "ride horse"}, "split": SPLIT}, "No video is of"),
        ({"ks": (1, 99)}, "99 nearest neighbours cannot be taken of 6 prototypes"),
    ],
)  # fmt: skip
def test_bad_input_of_figures(changes, said):
    with pytest.raises(UsageError, match=said):
        evaluate(**changes)


def test_videos_without_captions_are_said():
    got = evaluate({**TRUTH, "v_silent": "swim"})
    assert got.videos == 3
    assert [(one.path, one.reason) for one in got.failed] == [
        ("v_silent", "no observer says anything about it")
    ]
    assert not got.ok
    assert "1 were left out" in str(got)
