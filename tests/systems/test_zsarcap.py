"""ZSARCap: parity with the authors' pipeline, its invariants, and the claim's parts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moviola.data.reworded import harmonic_mean
from moviola.systems.video import zsarcap
from moviola.systems.video.zsarcap import (
    Prototypes,
    ZsarCap,
    ZsarCapConfig,
    class_distances,
    clean,
    closeness,
    distances,
    document_sentences,
    neighbour_hits,
    squeeze,
    substring_classes,
)
from moviola.types import UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "18-zsarcap"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


class StubEncoder:
    """The oracle's: the mean of the known words' vectors, zeros where none is known."""

    def __init__(self, words, vector_WD):
        self.row = {word: n for n, word in enumerate(words)}
        self.vector_WD = np.asarray(vector_WD)
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        found = [[self.row[w] for w in text.lower().split() if w in self.row] for text in texts]
        width = self.vector_WD.shape[1]
        return np.stack([self.vector_WD[rows].mean(0) if rows else np.zeros(width) for rows in found])


WORDS = ["horse", "man", "rides", "sits", "bow", "arrow", "shoots", "water", "swims", "pool", "runs", "ball"]


def stub(dim=16, seed=0):
    return StubEncoder(WORDS, np.random.default_rng(seed).normal(size=(len(WORDS), dim)))


# ------------------------------------------------------------------------------------------ parity


def released(meta, **changes):
    config = meta["config"]
    return ZsarCapConfig(
        min_words=config["min_words"],
        max_sentences=config["max_sentences"],
        metric=config["metric"],
        drop_last=True,
        **changes,
    )


def test_parity_of_words(oracle):
    """Cleaning, labels, sentences of classes in their order, samples and their classes."""
    meta, data = oracle
    config, wanted = meta["config"], meta["expected"]
    for text, padded, plain in wanted["cleaned_examples"]:
        assert (clean(text), clean(text, pad=False)) == (padded, plain)
    for name, label in wanted["label_examples"]:
        assert squeeze(name) == label
    names = [clean(line) for line in config["class_list_file"].splitlines()]
    assert names == wanted["class_names"]
    assert [squeeze(name) for name in names] == wanted["class_labels"]
    encoder = StubEncoder(config["vocabulary"], data["in/word_vectors"])
    cap = ZsarCap(encoder, released(meta))
    documents = {squeeze(name): text for name, text in config["documents"].items()}
    texts = {name: documents[squeeze(name)] for name in names}
    selected = {name.replace(" ", "_"): list(some) for name, some in cap.select(texts).items()}
    assert selected == wanted["selected_sentences"]
    made = {squeeze(name): list(some) for name, some in cap.class_sentences(texts).items()}
    assert made == wanted["class_sentences"]
    for part, split in (("training_set", "training"), ("testing_set", "testing")):
        assert [squeeze(name) for name in config["splits"][split]] == wanted[part]
    got = [[f, squeeze(names[c]), t] for f, c, t in samples(meta, cap, names)]
    assert got == wanted["samples"]


def samples(meta, cap, names):
    """(file, class number, text) of every file that fits a class, in the order of the files."""
    observers = meta["config"]["observers"]
    files = list(dict.fromkeys(file for one in observers for file in one))
    fitting = substring_classes(files, names)
    told = {file: cap.told([one[file] for one in observers if file in one]) for file in files}
    return [(file, names.index(fitting[file][0]), told[file]) for file in files if file in fitting]


def test_parity_of_every_output(oracle):
    meta, data = oracle
    config, got = meta["config"], {}
    names = meta["expected"]["class_names"]
    encoder = StubEncoder(config["vocabulary"], data["in/word_vectors"])
    documents = {squeeze(name): text for name, text in config["documents"].items()}
    texts = {name: documents[squeeze(name)] for name in names}
    seen, unseen = config["splits"]["training"], config["splits"]["testing"]
    caps = {
        kind: ZsarCap(encoder, released(meta, prototypes=kind)) for kind in ("sentence", "mean", "document")
    }
    found = samples(meta, caps["sentence"], names)
    labels = np.array([label for _, label, _ in found])
    tested = np.isin(labels, [names.index(name) for name in unseen])
    texts_of = [text for _, _, text in found]
    got["out/test_embeddings"] = encoder([text for text, keep in zip(texts_of, tested) if keep])
    got["out/test_labels"] = labels[tested]
    for kind, cap in caps.items():
        whole = cap.build_prototypes(texts)
        made = whole.among(unseen)
        distance_NP = cap.distances(texts_of, made)[tested]
        nearest_N = distance_NP.argmin(1)
        got[f"out/prototypes_{kind}"] = made.vector_PD
        got[f"out/prototype_labels_{kind}"] = made.owner_P
        got[f"out/nearest_label_{kind}"] = made.owner_P[nearest_N]
        got[f"out/nearest_distance_{kind}"] = distance_NP.min(1)
        ks = data[f"out/top_k_{kind}"][:, 0].tolist()
        hits = [neighbour_hits(distance_NP, made.owner_P, labels[tested], k) for k in ks]
        got[f"out/top_k_{kind}"] = np.array(list(zip(ks, hits)))
        if kind == "sentence":
            key_CD = encoder(names)
            got["out/sentence_distance_weights"] = np.concatenate(
                [closeness(made.among([name]).vector_PD, key_CD[names.index(name)]) for name in unseen]
            )
            both = whole.among([*seen, *unseen])
            distance_NP = cap.distances(texts_of, both)
            rows = []
            for k in config["top_k"]:
                parts = [
                    neighbour_hits(distance_NP[some], both.owner_P, labels[some], k) / some.sum() * 100
                    for some in (~tested, tested)
                ]
                rows.append([k, *parts, harmonic_mean(*parts)])
            got["out/gzsl_k_seen_unseen_harmonic"] = np.array(rows)
    wanted = {name: value for name, value in data.items() if name.startswith(("out/", "grad/"))}
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        reference = value.numpy()
        assert got[name].shape == reference.shape, name
        assert (np.abs(got[name] - reference) <= meta["tolerance"] * (1 + np.abs(reference))).all(), name


# -------------------------------------------------------------------------------------- invariants


DOCUMENTS = {
    "ride horse": "A man sits on a horse and rides it. The horse runs and jumps over the water. Short one.",
    "shoot bow": "The man shoots an arrow with his bow now. A bow and an arrow are held by a man.",
    "swim": "A man swims in the water of a pool. The pool is full of water and nobody runs.",
}
SMALL = ZsarCapConfig(min_words=6)


def test_the_order_of_classes_changes_nothing():
    cap = ZsarCap(stub(), SMALL)
    said = ["a man rides a horse", "he swims in the pool"]
    forward = cap.build_prototypes(DOCUMENTS)
    backward = cap.build_prototypes(dict(reversed(DOCUMENTS.items())))
    for text in said:
        here, there = cap.classify([text], forward), cap.classify([text], backward)
        assert [name for name, _ in here] == [name for name, _ in there]
        np.testing.assert_allclose([d for _, d in here], [d for _, d in there], atol=1e-12)


def test_an_observer_only_adds_to_the_text():
    cap = ZsarCap(stub(), SMALL)
    assert cap.told([["A Man runs", "never read"], [], ["He jumps"]]) == "a man runs he jumps"
    everything = ZsarCap(stub(), ZsarCapConfig(observations="all"))
    assert everything.told([["One", "two"], ["Three"]]) == "one two three"
    assert cap.told([[], [" "]]) == ""


def test_a_class_with_the_videos_own_sentence_is_chosen():
    cap = ZsarCap(stub(), SMALL)
    prototypes = cap.build_prototypes(DOCUMENTS)
    for name, sentences in prototypes.sentences.items():
        best, distance = cap.classify([sentences[0]], prototypes)[0]
        assert (best, pytest.approx(0, abs=1e-9)) == (name, distance)


def test_the_least_length_counts_words_before_cleaning():
    text = "One 2 3 4 5 6. It's 2 3 4 5. one two three four."
    assert document_sentences(text, ZsarCapConfig(min_words=6)) == ["one .", "it is ."]
    assert document_sentences(text, ZsarCapConfig(min_words=7)) == []


def test_the_last_letter_is_lost_only_when_asked():
    text = "a man rides a brown horse\nthe man runs to his horse"
    whole = document_sentences(text, ZsarCapConfig(min_words=3))
    assert whole == ["a man rides a brown horse", "the man runs to his horse"]
    cut = document_sentences(text, ZsarCapConfig(min_words=3, drop_last=True))
    assert cut == ["a man rides a brown horse", "the man runs to his hors"]
    assert document_sentences(text + "\n", ZsarCapConfig(min_words=3, drop_last=True)) == whole


def test_selection_keeps_the_sentences_nearest_the_name():
    encoder = stub()
    cap = ZsarCap(encoder, ZsarCapConfig(min_words=3, max_sentences=2))
    text = "the ball runs fast. the man rides a horse. a guitar plays loudly. he rides his horse."
    kept = cap.select({"horse rides": text})["horse rides"]
    cosine = 1 - distances(encoder(["horse rides"]), encoder(document_sentences(text, cap.config)))[0]
    best = np.argsort(-cosine, kind="stable")[:2]
    assert list(kept) == [document_sentences(text, cap.config)[n] for n in best]
    other = ZsarCap(encoder, cap.config, selector=stub(seed=5))
    other.select({"horse rides": text})
    assert encoder.calls[-1] != ["horse rides", *document_sentences(text, cap.config)]


def test_definitions_follow_the_documents():
    cap = ZsarCap(stub(), SMALL)
    made = cap.class_sentences({"swim": DOCUMENTS["swim"]}, {"swim": "to swim is to move through water."})
    assert made["swim"][-1] == "to swim is to move through water. swim"
    glued = ZsarCap(stub(), ZsarCapConfig(min_words=6, definition_gap=""))
    made = glued.class_sentences({"swim": ""}, {"swim": "to swim is to move through water."})
    assert made["swim"] == ("to swim is to move through water.swim",)


def test_neighbours_and_classes_are_counted_apart():
    """Two sentences of the wrong class are nearest: among two neighbours no hit, among two classes one."""
    distance_NP, owner_P, label_N = np.array([[0.1, 0.2, 0.3]]), np.array([0, 0, 1]), np.array([1])
    assert [neighbour_hits(distance_NP, owner_P, label_N, k) for k in (1, 2, 3)] == [0, 0, 1]
    assert class_distances(distance_NP, owner_P, 3).tolist() == [[0.1, 0.3, np.inf]]


def test_distances():
    generator = np.random.default_rng(0)
    a_ND, b_PD = generator.normal(size=(3, 5)), generator.normal(size=(4, 5))
    plain = np.linalg.norm(a_ND[:, None] - b_PD, axis=-1)
    np.testing.assert_allclose(distances(a_ND, b_PD, "euclidean"), plain, atol=1e-12)
    assert distances(np.zeros((1, 5)), b_PD).tolist() == [[1, 1, 1, 1]]


def test_equal_texts_are_embedded_once():
    encoder = stub()
    cap = ZsarCap(encoder, SMALL)
    prototypes = cap.build_prototypes(DOCUMENTS)
    distance_NP = cap.distances(["a man runs", "a horse", "a man runs"], prototypes)
    assert encoder.calls[-1] == ["a man runs", "a horse"]
    assert (distance_NP[0] == distance_NP[2]).all()


def test_substrings_mistake_names_within_names():
    fitting = substring_classes(
        ["v_ClimbStairs_g01", "v_Swim_g02", "v_other"], ["climb", "climb stairs", "swim"]
    )
    assert fitting == {"v_ClimbStairs_g01": ("climb", "climb stairs"), "v_Swim_g02": ("swim",)}


# --------------------------------------------------------------------------------------- bad input


def test_a_class_without_a_sentence_is_named():
    with pytest.raises(UsageError, match=r"1 of 2 classes .* 6 words or more .*: swim\..*lower min_words"):
        ZsarCap(stub(), SMALL).build_prototypes({"ride horse": DOCUMENTS["ride horse"], "swim": "It is wet."})


def test_more_neighbours_than_prototypes():
    with pytest.raises(UsageError, match="4 nearest neighbours cannot be taken of 3 prototypes"):
        neighbour_hits(np.zeros((1, 3)), np.arange(3), np.array([0]), 4)


@pytest.mark.parametrize(
    "changes",
    [{"metric": "dot"}, {"prototypes": "all"}, {"min_words": 0}, {"scale": 0}, {"max_sentences": 0}],
)
def test_settings_are_checked(changes):
    with pytest.raises(UsageError):
        ZsarCapConfig(**changes)


def test_other_bad_input():
    cap = ZsarCap(stub(), SMALL)
    prototypes = cap.build_prototypes(DOCUMENTS)
    with pytest.raises(UsageError, match="No observer said anything"):
        cap.classify(["", " "], prototypes)
    with pytest.raises(UsageError, match="no prototypes of fly"):
        prototypes.among(["swim", "fly"])
    with pytest.raises(UsageError, match="expected a vector for each"):
        ZsarCap(lambda texts: np.zeros((1, 3)), SMALL).build_prototypes(DOCUMENTS)
    with pytest.raises(UsageError, match="not finite"):
        ZsarCap(lambda texts: np.full((len(texts), 3), np.nan), SMALL).build_prototypes(DOCUMENTS)


# ------------------------------------------------------------------------------------------- claim


def test_the_claims_arms_run():
    figures = [zsarcap.run_claim(arm, 0, steps=2, scenes=20, batch=4, count=24) for arm in zsarcap.CLAIM.arms]
    assert len(figures) == 5
    assert all(set(one) == {"top-1, %", "actions without order, %"} for one in figures)
    assert figures[0] == zsarcap.run_claim("class names", 0, steps=2, scenes=20, batch=4, count=24)


def test_prototypes_are_plain_data():
    made = ZsarCap(stub(), SMALL).build_prototypes(DOCUMENTS)
    assert isinstance(made, Prototypes)
    assert torch.equal(torch.from_numpy(made.owner_P), torch.tensor([0, 0, 1, 1, 2, 2]))
