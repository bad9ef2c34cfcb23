"""MetaCLIP against what the authors' code computes, and what must hold for any pool."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moviola.data.hashing import hash_uniform
from moviola.data.matching import Matcher, Matches, spaced_entry, spacing
from moviola.systems.curation.metaclip import (
    MetaClip,
    MetaClipConfig,
    choose_texts,
    count,
    keep,
    keep_by_match,
    keep_probability,
    metaclip_2_5b,
    probabilities,
    tail_share,
    threshold_of_share,
    thresholds,
)
from moviola.types import UsageError

THRESHOLDS = (5, 20, 60)


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "01-metaclip"
    meta = json.loads((folder / "a.json").read_text())
    return meta, json.loads((folder / "a_strings.json").read_text()), load_file(folder / "a.safetensors")


@pytest.fixture(scope="module")
def matches(oracle):
    _, strings, _ = oracle
    return Matcher(strings["entries"])(strings["texts"])


class Seen(dict):
    """The oracle's tensors, remembering which were compared."""

    def __init__(self, data):
        super().__init__(data)
        self.left = {name for name in data if name.startswith("out/")}

    def __getitem__(self, name):
        self.left.discard(name)
        return super().__getitem__(name)


def keep_one_after_another(matches, prob_E, uniforms):
    """The authors' first loop: texts in order, matches in order, on to the next text at a success."""
    stream, kept = iter(uniforms), []
    for text, entries in enumerate(np.split(matches.entry_M, matches.offsets()[1:-1])):
        if any(next(stream) < prob_E[e] for e in entries):
            kept.append(text)
    return kept


def test_parity_of_every_output(oracle, matches):
    _, strings, tensors = oracle
    data, entries = Seen(tensors), len(strings["entries"])
    np.testing.assert_array_equal(matches.pairs(), data["out/inverted_index"])
    count_E = count(matches, entries)
    np.testing.assert_array_equal(count_E, data["out/entry_count"])
    np.testing.assert_array_equal(np.unique(matches.text_M), data["out/kept_numpy_inf"])
    uniforms = data["in/uniform_rows"]
    for t in THRESHOLDS:
        prob_E = probabilities(count_E, t)
        np.testing.assert_array_equal(prob_E, data[f"out/entry_prob_t{t}"])
        np.testing.assert_array_equal(keep_by_match(matches, prob_E, uniforms), data[f"out/kept_numpy_t{t}"])
        np.testing.assert_array_equal(
            keep_one_after_another(matches, prob_E, uniforms), data[f"out/kept_python_t{t}"]
        )
        np.testing.assert_allclose(
            keep_probability(matches, prob_E), data[f"out/keep_prob_t{t}"], rtol=0, atol=1e-12
        )
    for t in (20_000, 170_000):
        np.testing.assert_array_equal(probabilities(data["in/big_count"], t), data[f"out/big_prob_t{t}"])
    inside = Matcher(strings["entries"], languages=True)(strings["texts"])
    np.testing.assert_array_equal(inside.pairs(), data["out/multilingual_inverted_index"])
    assert not data.left


def test_parity_of_spacing_and_shares(oracle):
    meta, strings, data = oracle
    assert [spacing(t) for t in strings["texts"][:60]] == strings["spaced_first_60"]
    different = {
        e: spaced_entry(e, languages=True)
        for e in strings["entries"]
        if spaced_entry(e, languages=True) != f" {e} "
    }
    assert different == strings["multilingual_spaced_entries"]
    expected, counts = meta["expected_scalars"], data["out/entry_count"]
    for name, array in (("", counts), ("_big", data["in/big_count"])):
        for t, share in expected[f"t_to_p{name}"].items():
            assert tail_share(array, int(t)) == share
        for share, t in expected[f"p_to_t{name}"].items():
            assert threshold_of_share(array, float(share)) == t


# ------------------------------------------------------------------------------------ invariants

counts_of = st.lists(st.integers(0, 500), min_size=1, max_size=30).filter(any)


@given(counts_of, st.floats(0.5, 1000), st.floats(1, 10))
def test_a_higher_threshold_never_lowers_a_probability(counts, threshold, factor):
    low, high = probabilities(counts, threshold), probabilities(counts, threshold * factor)
    assert (high >= low).all()
    assert (low[np.array(counts) <= threshold] == 1).all()


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4, unique=True).map(sorted), min_size=1), st.integers(0, 5)
)
def test_tail_texts_stay_and_nothing_that_matched_goes_at_the_highest_count(texts, seed):
    found = Matches(
        np.repeat(np.arange(len(texts)), [len(t) for t in texts]),
        np.array([e for t in texts for e in t], np.uint32),
        len(texts),
    )
    count_E, ids = count(found, 10), np.arange(len(texts))
    kept = keep(keep_probability(found, probabilities(count_E, 2)), ids, seed=seed)
    for text, entries in enumerate(texts):
        assert kept[text] or not any(count_E[e] <= 2 for e in entries)
        assert not kept[text] or entries
    top = max(int(count_E.max()), 1)
    everything = keep(keep_probability(found, probabilities(count_E, top)), ids, seed=seed)
    np.testing.assert_array_equal(everything, found.per_text() > 0)
    assert (everything | ~kept).all()  # sets of rising thresholds are nested


def test_keep_rates_over_many_seeds(matches, oracle):
    """Both draws keep a text at the rate 1 - prod(1 - p), with the binomial's own spread around it."""
    count_E = count(matches, len(oracle[1]["entries"]))
    prob_E, seeds = probabilities(count_E, 20), 400
    keep_U = keep_probability(matches, prob_E)
    ids_M = np.arange(len(matches))
    ours, by_match = np.zeros(matches.texts), np.zeros(matches.texts)
    for seed in range(seeds):
        ours += keep(keep_U, np.arange(matches.texts), seed=seed)
        by_match[keep_by_match(matches, prob_E, hash_uniform(seed, ids_M, 9))] += 1
    error_U = np.sqrt(keep_U * (1 - keep_U) / seeds)
    usual = (keep_U > 0.05) & (keep_U < 0.95)  # where a binomial of 400 draws is near normal
    assert usual.sum() > 300
    for kept in (ours / seeds, by_match / seeds):
        z = (kept - keep_U)[usual] / error_U[usual]
        assert np.abs(z).max() < 5
        assert 0.8 < np.square(z).mean() < 1.2
        np.testing.assert_array_equal(kept[keep_U == 1], 1)
        np.testing.assert_array_equal(kept[keep_U == 0], 0)
    # draws of different texts are independent in our form, so the overall rate is sharp
    assert abs(ours.sum() / seeds - keep_U.sum()) < 5 * np.sqrt((error_U**2).sum())


def test_one_matched_text_per_row_is_drawn_evenly():
    row_U, matched_U = np.array([0, 0, 0, 1, 2, 2]), np.array([True, False, True, False, True, True])
    drawn = np.zeros(6)
    for seed in range(2000):
        chosen = choose_texts(row_U, matched_U, row_U.astype(np.uint64) + 7, seed=seed)
        assert row_U[chosen].tolist() == [0, 2]
        drawn[chosen] += 1
    assert drawn[[1, 3]].tolist() == [0, 0]
    assert (np.abs(drawn[[0, 2, 4, 5]] / 2000 - 0.5) < 0.06).all()


def test_languages_follow_the_tail_share_of_the_reference():
    english, thai = np.array([1, 2, 3, 50, 200]), np.array([2, 1, 9, 40, 0, 11])
    found = thresholds({"en": english, "th": thai}, MetaClipConfig(threshold=50))
    assert found == {"en": 50, "th": threshold_of_share(thai, tail_share(english, 50))}
    both = thresholds({"en": english, "th": thai}, MetaClipConfig(tail_share=0.2))
    assert both == {"en": threshold_of_share(english, 0.2), "th": threshold_of_share(thai, 0.2)}
    assert thresholds({"th": thai}, MetaClipConfig(threshold=7)) == {"th": 7}
    assert thresholds({"en": english, "xx": np.zeros(3)}, MetaClipConfig(threshold=50))["xx"] == np.inf
    with pytest.raises(UsageError, match="follow 'en'"):
        thresholds({"th": thai, "zh": thai}, MetaClipConfig())


def test_balancing_on_the_fly_is_what_the_functions_draw():
    texts = [f"{'red ' if n % 3 else ''}{'dog' if n % 50 else 'heron'} {n}" for n in range(1000)]
    balancer = MetaClip(["red", "dog", "heron"], MetaClipConfig(threshold=30, seed=3)).fit(
        [texts[:500], texts[500:]]
    )
    rows = list(enumerate(texts))
    stream = list(balancer.balance(rows, text=lambda r: r[1], id=lambda r: r[0], batch=64))
    kept = keep(balancer.keep_probability(texts), np.arange(1000), seed=3)
    assert stream == [row for row, stays in zip(rows, kept, strict=True) if stays]
    assert set(range(0, 1000, 50)) <= {n for n, _ in stream}  # the tail is all there
    other = list(balancer.balance(rows, text=lambda r: r[1], id=lambda r: r[0], epoch=1))
    assert other != stream
    with pytest.raises(UsageError, match="No entry was ever matched"):
        next(MetaClip(["x"]).balance(rows, text=lambda r: r[1], id=lambda r: r[0]))


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("threshold", [0, -3, float("nan")])
def test_thresholds_that_mean_nothing(threshold):
    for refused in (
        lambda: probabilities(np.ones(2), threshold),
        lambda: MetaClipConfig(threshold=threshold),
    ):
        with pytest.raises(UsageError, match="above 0"):
            refused()


def test_other_bad_input():
    with pytest.raises(UsageError, match="between 0 and 1"):
        threshold_of_share(np.ones(3), 1.5)
    with pytest.raises(UsageError, match="No entry was ever matched"):
        tail_share(np.zeros(4), 3)
    with pytest.raises(UsageError, match="'one' or 'all'"):
        MetaClipConfig(texts="some")
    three = Matcher(["a", "b", "c"])(["c"])
    with pytest.raises(UsageError, match="names entry 2, but there are 2"):
        keep_probability(three, np.ones(2))
    with pytest.raises(UsageError, match="names entry 2"):
        count(three, 2)


def test_presets_and_an_infinite_threshold():
    assert metaclip_2_5b().threshold == 170_000
    assert MetaClipConfig.from_json(MetaClipConfig(tail_share=0.1).to_json()).tail_share == 0.1
    assert probabilities(np.array([0, 10**9]), np.inf).tolist() == [1, 1]
