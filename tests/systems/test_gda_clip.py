from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data.anisotropic import anisotropic_classes
from moviola.parts.discriminant import GaussianFitter
from moviola.parts.linear_head import HeadConfig, LinearHead
from moviola.systems.adaptation.gda_clip import (
    ADAPTATION,
    CLAIM,
    CONFIG,
    GdaClip,
    best_alpha,
    class_prior,
    ensemble,
    extend,
    fit,
    fit_unlabelled,
    right_by_alpha,
    run_claim,
)
from moviola.types import UsageError


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def made(counts=(6, 6, 6, 6), dim=12, seed=0, dtype=np.float64):
    """Unit vectors, labels in mixed order, and text vectors."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    mean = rng.standard_normal((len(counts), dim))
    scale = np.linspace(0.2, 2, dim)
    vectors = unit(mean[labels] + rng.standard_normal((len(labels), dim)) * scale)
    return vectors.astype(dtype), labels, unit(mean + rng.standard_normal(mean.shape)).astype(dtype)


def uniform(classes):
    return np.full(classes, 1 / classes)


def plain(vectors, labels, classes):
    """The formulas as released, in NumPy: a whole pseudo-inverse."""
    mean = np.stack([vectors[labels == c].mean(0) for c in range(classes)])
    cov = np.cov(vectors - mean[labels], rowvar=False)
    dim = vectors.shape[1]
    precision = dim * np.linalg.pinv((len(vectors) - 1) * cov + np.trace(cov) * np.eye(dim), hermitian=True)
    weight = precision @ mean.T
    return weight, -np.log(classes) - np.einsum("cd,de,ce->c", mean, precision, mean) / 2, precision


def accuracy(scores, labels):
    return float((scores.argmax(1) == labels).mean() * 100)


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


def test_parity_of_every_output(oracles_dir):
    folder = oracles_dir / "12-gda-clip"
    meta, data = json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")
    passes = unit(data["in/train_features"])
    vectors, labels = passes.reshape(-1, passes.shape[-1]), np.tile(data["in/train_labels"], len(passes))
    picture = np.tile(np.arange(passes.shape[1]), len(passes))
    text, new_text = data["in/clip_weights"].T, data["in/clip_weights_new"].T
    validation = data["in/val_features"], data["in/val_labels"]
    test, test_labels = data["in/test_features"], data["in/test_labels"]

    got = {}
    for name, covariance in (("fewshot", "shared"), ("base2new", "class")):
        head = fit(
            vectors,
            labels,
            text,
            logit_scale=100,
            covariance=covariance,
            validation=validation,
            picture_N=picture,
        )
        gaussians = head.gaussians
        weight, bias = ensemble(gaussians, text, alpha=head.alpha, logit_scale=100)
        held_weight = ensemble(gaussians, text, alpha=head.alpha, logit_scale=100)
        held = validation[0] @ held_weight[0] + held_weight[1]
        got |= {
            f"out/{name}/mus": gaussians.mean_CD,
            f"out/{name}/W": gaussians.weight_DC,
            f"out/{name}/b": gaussians.bias_C,
            f"out/{name}/best_alpha": head.alpha,
            f"out/{name}/best_val_acc": accuracy(held, validation[1]),
        }
        scores = test @ weight + bias
        if name == "fewshot":
            got |= {
                "out/fewshot/cov_inv": gaussians.precision.times(np.eye(text.shape[1])),
                "out/fewshot/test_logits": scores,
                "out/fewshot/notune_acc": accuracy(scores, test_labels),
            }
            continue
        new = extend(head, vectors, new_text, alone=True)
        weight, bias = ensemble(new.gaussians, new_text, alpha=new.alpha, logit_scale=100)
        new_scores = data["in/test_features_new"] @ weight + bias
        got |= {
            "out/base2new/mu_new": new.gaussians.mean_CD,
            "out/base2new/cov_inv_new": new.gaussians.precision.times(np.eye(text.shape[1])),
            "out/base2new/W_new": new.gaussians.weight_DC,
            "out/base2new/b_new": new.gaussians.bias_C,
            "out/base2new/test_logits_new": new_scores,
            "out/base2new/base_acc": accuracy(scores, test_labels),
            "out/base2new/new_acc": accuracy(new_scores, data["in/test_labels_new"]),
        }
    assert set(got) == {name for name in data if name.startswith(("out/", "grad/"))}
    for name, value in got.items():
        wanted = data[name]
        worst = np.abs(np.asarray(value) - wanted).max()
        assert worst <= meta["tolerance"] * np.abs(wanted).max() + 1e-7, f"{name}: {worst:.2e}"
    for name in ("W", "b"):
        for kind in ("fewshot", "base2new"):  # the absolute term of that rule hides nothing
            np.testing.assert_allclose(got[f"out/{kind}/{name}"], data[f"out/{kind}/{name}"], rtol=1e-8)


# --------------------------------------------------------------------------------------------------
# The closed form
# --------------------------------------------------------------------------------------------------


def repeated(vectors, labels, text):
    return np.repeat(vectors, 3, 0), np.repeat(labels, 3), text


def flattened(vectors, labels, text):
    """Four directions twice: the covariance is singular though there are many vectors."""
    return unit(np.hstack([vectors, vectors[:, :4]])), labels, unit(np.hstack([text, text[:, :4]]))


CASES = {
    "few": made((4, 5, 3), 40),
    "many": made((40, 60, 50), 12),
    "as many as wide": made((8, 8), 16),
    "few and repeated": repeated(*made((3, 3), 30)),
    "singular": flattened(*made((30, 30), 10)),
    "a class of one": made((9, 1, 7), 24),
}


@pytest.mark.parametrize("name", CASES)
def test_all_forms_agree_with_the_formula_as_released(name):
    vectors, labels, text = CASES[name]
    classes = len(text)
    weight, bias, precision = plain(vectors, labels, classes)
    for form in ("auto", "pinv", "cholesky", "woodbury"):
        got = GaussianFitter(vectors, labels, classes, form=form).fit(uniform(classes))
        for value, wanted in (
            (got.weight_DC, weight),
            (got.bias_C, bias),
            (got.precision.times(np.eye(vectors.shape[1])), precision),
        ):
            assert np.abs(value - wanted).max() <= 1e-8 * np.abs(wanted).max(), form


@pytest.mark.parametrize("shape", [((10, 8, 9), 30), ((50, 40, 60), 14)])
def test_without_a_fold_is_a_fit_of_the_others(shape):
    vectors, labels, _ = made(*shape)
    fold = np.arange(len(labels)) % 3
    fitter = GaussianFitter(vectors, labels, 3, fold_N=fold)
    assert bool(fitter.sums) == (len(labels) >= vectors.shape[1])
    for one in range(3):
        weight, bias, _ = plain(vectors[fold != one], labels[fold != one], 3)
        got = fitter.fit(uniform(3), without=one)
        np.testing.assert_allclose(got.weight_DC, weight, rtol=1e-8, atol=1e-8 * np.abs(weight).max())
        np.testing.assert_allclose(got.bias_C, bias, rtol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([5, 12, 40]))
def test_the_decision_is_the_nearest_mean_by_mahalanobis_distance(seed, dim):
    vectors, labels, _ = made((6, 6, 6), dim, seed)
    got = GaussianFitter(vectors, labels, 3).fit(uniform(3))
    new = unit(np.random.default_rng(seed + 1).standard_normal((50, dim)))
    precision = got.precision.times(np.eye(dim))
    apart = new[:, None] - got.mean_CD
    distance = np.einsum("ncd,de,nce->nc", apart, precision, apart)
    logits = got.logits(new)
    assert (logits.argmax(1) == distance.argmin(1)).all()
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], (distance[:, 0] - distance[:, 1]) / 2, atol=1e-8)


def test_as_n_grows_the_scale_is_d_over_n_not_that_of_the_inverse():
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((6, 6))
    for count, tolerance in ((2_000, 2e-2), (50_000, 1e-3)):
        vectors = unit(rng.standard_normal((count, 6)) @ mixed + 3)
        labels = np.arange(count) % 2
        got = GaussianFitter(vectors, labels, 2).fit(uniform(2)).precision.times(np.eye(6))
        centred = vectors - np.stack([vectors[labels == c].mean(0) for c in (0, 1)])[labels]
        limit = 6 / (count - 1) * np.linalg.inv(np.cov(centred, rowvar=False))
        assert np.abs(got - limit).max() < tolerance * np.abs(limit).max() * 30
        assert np.abs(got).max() < 0.5 * np.abs(limit * (count - 1) / 6).max()
    assert np.abs(got - limit).max() < 0.05 * np.abs(limit).max()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([8, 60]))
def test_the_order_of_rows_does_not_matter(seed, dim):
    vectors, labels, text = made(seed=seed, dim=dim)
    order = np.random.default_rng(seed).permutation(len(labels))
    one, other = (
        fit(v, y, text, logit_scale=50, alpha=1)
        for v, y in ((vectors, labels), (vectors[order], labels[order]))
    )
    np.testing.assert_allclose(one.weight_DC, other.weight_DC, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(one.bias_C, other.bias_C, rtol=1e-5, atol=1e-4)


def test_every_row_twice_changes_little():
    """S doubles and the ridge does not, which weighs little where N is well above D."""
    x, y, test, _, text = anisotropic_classes(0, classes=10, dim=32, shots=100)
    once = fit(x, y, text, logit_scale=100, alpha=1)
    twice = fit(np.repeat(x, 2, 0), np.repeat(y, 2), text, logit_scale=100, alpha=2)
    a, b = once.gaussians.weight_DC, 2 * twice.gaussians.weight_DC
    assert np.abs(a - b).max() < 0.1 * np.abs(a).max()
    assert (once.logits(test).argmax(1) == twice.logits(test).argmax(1)).mean() > 0.98


# --------------------------------------------------------------------------------------------------
# The ensemble
# --------------------------------------------------------------------------------------------------


def test_alpha_zero_is_zero_shot_exactly():
    vectors, labels, text = made(dtype=np.float32)
    head = fit(vectors, labels, text, logit_scale=37.5, alpha=0)
    assert np.array_equal(head.weight_DC, (37.5 * text.T).astype(np.float32))
    assert not head.bias_C.any()


def test_the_models_own_scale_keeps_the_authors_ratio():
    vectors, labels, text = made()
    official = fit(vectors, labels, text, logit_scale=100, alpha=0.1)
    own = fit(vectors, labels, text, logit_scale=14.0, alpha=0.1)
    np.testing.assert_allclose(own.logits(vectors), 0.14 * official.logits(vectors), rtol=1e-4, atol=1e-4)
    weight, bias, _ = plain(vectors, labels, len(text))
    wanted = 100 * vectors @ text.T + 0.1 * (vectors @ weight + bias)
    np.testing.assert_allclose(official.logits(vectors), wanted, rtol=1e-5, atol=1e-3)


def test_a_constant_in_the_bias_changes_no_decision():
    vectors, labels, _ = made()
    got = GaussianFitter(vectors, labels, 4).fit(uniform(4))
    shifted = GaussianFitter(vectors, labels, 4).fit(uniform(4) * 7)
    np.testing.assert_allclose(shifted.bias_C - got.bias_C, np.log(7))
    assert (got.logits(vectors).argmax(1) == shifted.logits(vectors).argmax(1)).all()


def best_of(*scores_and_labels):
    return best_alpha(right_by_alpha(*scores_and_labels))


def test_the_search_takes_the_smallest_of_equals_and_falls_back():
    labels = np.array([0, 1])
    even, good = np.zeros((2, 2)), np.eye(2)
    assert best_of(even, good, labels) == CONFIG.alphas[0]  # all of the grid are right
    assert best_of(np.array([[0, 0.5], [0.5, 0]]), good, labels) == 1.0
    assert best_of(np.array([[0, 1.0], [1.0, 0]]) * 1e6, good, labels) == CONFIG.default_alpha


def test_cross_validation_chooses_within_the_training_vectors():
    x, y, test, wanted, text = anisotropic_classes(0)
    head = fit(x, y, text, logit_scale=100)
    assert head.notes == (f"alpha {head.alpha:g}, chosen by cross-validation",)
    fixed = {
        a: accuracy(fit(x, y, text, logit_scale=100, alpha=a).logits(test), wanted) for a in CONFIG.alphas
    }
    assert fixed[head.alpha] > max(fixed.values()) - 2  # as good as if chosen on the test set
    assert fit(x, y, text, logit_scale=100, seed=0).alpha == head.alpha
    # useless words and useless pictures pull alpha apart
    rng = np.random.default_rng(0)
    assert fit(x, y, unit(rng.standard_normal(text.shape)), logit_scale=100).alpha == 100
    assert fit(x, rng.permutation(y), text, logit_scale=100, validation=(test, wanted)).alpha < 10


def test_crops_of_a_picture_stay_in_one_fold():
    """A crop is recognised by its twin: unless they share a fold, pictures that tell nothing look good."""
    rng = np.random.default_rng(0)
    vectors, labels, _ = made((8,) * 10, 60, 1)
    labels = rng.permutation(labels)
    text = unit(
        rng.standard_normal((10, 60)) + 2 * np.stack([vectors[labels == c].mean(0) for c in range(10)])
    )
    picture = np.tile(np.arange(80), 4)
    crops = unit(np.tile(vectors, (4, 1)) + 0.01 * rng.standard_normal((320, 60)))
    heads = [fit(crops, np.tile(labels, 4), text, logit_scale=100, picture_N=p) for p in (None, picture)]
    assert heads[0].alpha >= 1 > heads[1].alpha


def test_one_picture_of_each_class():
    vectors, labels, text = made((1, 1, 1), 20)
    head = fit(vectors, labels, text, logit_scale=100)
    assert head.alpha == 0.1
    assert any("identity" in note for note in head.notes)
    assert any("one picture" in note for note in head.notes)
    # P = D I: the nearest mean, on the scale the authors' formula has with a trace of 1
    np.testing.assert_allclose(head.gaussians.weight_DC, 20 * vectors[np.argsort(labels)].T)
    crops = unit(np.repeat(vectors, 10, 0) + 0.1 * np.random.default_rng(0).standard_normal((30, 20)))
    head = fit(crops, np.repeat(labels, 10), text, logit_scale=100, picture_N=np.repeat(np.arange(3), 10))
    assert head.alpha == 0.1
    assert not any("identity" in note for note in head.notes)
    same = fit(np.repeat(vectors, 4, 0), np.repeat(labels, 4), text, logit_scale=100, alpha=1)
    assert any("identity" in note for note in same.notes)


def test_classes_of_one_picture_beside_others_are_never_left_out():
    vectors, labels, text = made((1, 9, 7, 1), 12)
    head = fit(vectors, labels, text, logit_scale=100)
    assert np.isfinite(head.weight_DC).all()
    assert "cross-validation" in head.notes[-1]


# --------------------------------------------------------------------------------------------------
# Long-tailed, new classes, no labels
# --------------------------------------------------------------------------------------------------


def test_the_prior():
    vectors, labels, text = made((12, 3, 5))
    heads = {
        p: fit(vectors, labels, text, logit_scale=100, alpha=1, prior=p)
        for p in ("uniform", "counts", "0.6,0.15,0.25")
    }
    shift = heads["counts"].bias_C - heads["uniform"].bias_C
    np.testing.assert_allclose(shift, np.log(np.array([12, 3, 5]) / 20 * 3), atol=1e-4)
    np.testing.assert_allclose(heads["counts"].bias_C, heads["0.6,0.15,0.25"].bias_C)
    np.testing.assert_allclose(class_prior([0.5, 0.3, 0.2], np.ones(3)), [0.5, 0.3, 0.2])
    for wrong in ("rare", "0.5,0.5", "0.5,0.5,0", (0.5, 0.4, 0.4), [np.nan, 0.5, 0.5], "a,b,c"):
        with pytest.raises(UsageError, match="prior uniform, counts, or 3 positive shares"):
            fit(vectors, labels, text, logit_scale=100, prior=wrong)


def test_the_counts_as_prior_help_where_tests_are_as_uneven():
    gains = []
    for seed in range(3):
        x, y, test, wanted, text = anisotropic_classes(seed, shots=40, classes=20, dim=64, apart=0.15)
        keep = np.concatenate([np.flatnonzero(y == c)[: max(2, 40 // (1 + c))] for c in range(20)])
        rare = np.concatenate([np.flatnonzero(wanted == c)[: max(1, 50 // (1 + c))] for c in range(20)])
        by = [
            accuracy(
                fit(x[keep], y[keep], text, logit_scale=100, prior=p, alpha=10).gaussians.logits(test[rare]),
                wanted[rare],
            )
            for p in ("uniform", "counts")
        ]
        gains.append(by[1] - by[0])
    assert np.mean(gains) > 1


def test_new_classes_from_their_words():
    better = []
    for seed in range(3):
        x, y, test, wanted, text = anisotropic_classes(seed)
        old, new = y < 30, wanted >= 30
        head = fit(x[old], y[old], text[:30], logit_scale=100)
        zero = accuracy(test[new] @ text[30:].T, wanted[new] - 30)
        alone = extend(head, x[old], text[30:], alone=True)
        both = extend(head, x[old], text[30:])
        # the old classes' part is what it was
        np.testing.assert_allclose(both.weight_DC[:, :30], head.weight_DC, rtol=1e-4, atol=1e-3)
        assert both.logits(test).shape == (len(test), 40)
        better.append(
            [
                accuracy(alone.logits(test[new]), wanted[new] - 30) - zero,
                accuracy(both.logits(test[new])[:, 30:], wanted[new] - 30) - zero,
            ]
        )
        one_by_one = extend(extend(head, x[old], text[30:35]), x[old], text[35:])
        np.testing.assert_allclose(one_by_one.weight_DC, both.weight_DC, rtol=1e-4, atol=1e-3)
    assert (np.mean(better, 0) > 4).all()


def test_neighbours_are_those_there_are_unless_more_are_asked_for():
    vectors, labels, text = made((6, 6, 6))
    head = fit(vectors, labels, text, logit_scale=100, alpha=1)
    mean = extend(head, vectors, text[:1], alone=True, copies=0).gaussians.mean_CD
    np.testing.assert_allclose(mean[0], vectors.mean(0))
    for options in ({"neighbours": 19}, {"neighbours": 1}, {"copies": -1}):
        with pytest.raises(UsageError, match="neighbours must be 2 to 18"):
            extend(head, vectors, text, **options)
    with pytest.raises(UsageError, match="as `fit` returned it"):
        extend(from_folder(head), vectors, text)
    with pytest.raises(UsageError, match="as wide"):
        extend(head, vectors, unit(text[:, :5]))


def from_folder(head):
    """The same weights, as a folder gives them back."""
    return LinearHead(head.weight_DC, head.bias_C)


def test_em_never_lowers_its_objective_and_beats_zero_shot():
    for seed in range(2):
        x, _, test, wanted, text = anisotropic_classes(seed, shots=100)
        head = fit_unlabelled(x, text, logit_scale=100, tolerance=0, steps=40)
        assert len(head.objective) == 40
        assert (np.diff(head.objective) > -1e-9).all()
        assert head.objective[-1] > head.objective[0] + 0.5
        assert accuracy(head.logits(test), wanted) > accuracy(test @ text.T, wanted) + 10
        assert head.alpha == pytest.approx((len(x) - 1) / 128)
        halved = fit_unlabelled(x, text, logit_scale=50, steps=2)
        assert halved.alpha == pytest.approx(2 * head.alpha)  # beside half the zero-shot logits


def test_em_learns_the_shares_of_classes_that_lie_apart():
    x, y, *_, text = anisotropic_classes(0, classes=4, dim=24, shots=200, apart=1.0, spread=0.4)
    keep = np.concatenate([np.flatnonzero(y == c)[: 200 // (1 + c)] for c in range(4)])
    head = fit_unlabelled(x[keep], text, logit_scale=100, prior="counts", tolerance=0, steps=30)
    assert (np.diff(head.objective) > -1e-9).all()
    np.testing.assert_allclose(head.gaussians.p_C, np.bincount(y[keep]) / len(keep), atol=0.02)


def test_em_of_certain_words_is_the_labelled_fit():
    """Words that leave no doubt give the responsibilities that labels would."""
    x, y, *_ = anisotropic_classes(0, classes=4, dim=24, shots=50, apart=3, spread=0.3)
    text = unit(np.stack([x[y == c].mean(0) for c in range(4)]))
    head = fit_unlabelled(x, text, logit_scale=1e4, alpha=1)
    wanted = fit(x, y, text, logit_scale=1e4, alpha=1)
    np.testing.assert_allclose(head.gaussians.mean_CD, wanted.gaussians.mean_CD, atol=1e-6)
    np.testing.assert_allclose(head.gaussians.weight_DC, wanted.gaussians.weight_DC, rtol=1e-4, atol=1e-6)


def test_em_says_where_it_found_nothing_or_little():
    x, *_, text = anisotropic_classes(0, classes=3, dim=24, shots=50, apart=3, spread=0.3)
    three = np.concatenate([text, -unit(x.mean(0, keepdims=True)).astype(np.float32)])
    head = fit_unlabelled(x, three, logit_scale=100)
    assert np.isfinite(head.weight_DC).all()
    assert any("1 of 4 classes were found in no picture" in note for note in head.notes)
    assert any("few for EM" in note for note in head.notes)
    for wrong in ({"steps": 0}, {"prior": "0.5,0.5"}, {"alpha": -1}):
        with pytest.raises(UsageError):
            fit_unlabelled(x, text, logit_scale=100, **wrong)
    with pytest.raises(UsageError, match="a vector for each"):
        fit_unlabelled(x[:2], text, logit_scale=100)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def broken(change):
    vectors, labels, text = made()
    vectors, labels, text = vectors.copy(), labels.copy(), text.copy()
    return change(vectors, labels, text) or (vectors, labels, text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v, y, t: (v[y != 2], y[y != 2], t), "1 of 4 classes have no picture: numbers 2"),
        (lambda v, y, t: (v, y + 1, t), "class numbers in 0..3"),
        (lambda v, y, t: (v, y - 1, t), "class numbers in 0..3"),
        (lambda v, y, t: (v, y.astype(float), t), "class numbers"),
        (lambda v, y, t: (v, y[:-1], t), "one label for each"),
        (lambda v, y, t: (unit(v[:, :5]), y, t), "as wide as the text vectors, 12, got 5"),
        (lambda v, y, t: (v[:1], y[:1] * 0, t[:1]), "two classes or more"),
        (lambda v, y, t: (v[:0], y[:0], t), "at least one"),
        (lambda v, y, t: (v[0], y, t), "as rows"),
        (lambda v, y, t: v.__setitem__((3, 4), np.nan), "not finite"),
        (lambda v, y, t: t.__setitem__((1, 4), np.inf), "text vectors are not finite"),
        (lambda v, y, t: v.__setitem__(3, 0), "or zero"),
    ],
)
def test_bad_vectors_and_labels(change, says):
    with pytest.raises(UsageError, match=says):
        fit(*broken(change), logit_scale=100)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": -1}, "alpha must be a number of 0 or more"),
        ({"alpha": "much"}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"folds": 1}, "2 folds or more"),
        ({"covariance": "full"}, "covariance shared or class"),
        ({"validation": (np.empty((0, 12)), np.empty(0, int))}, "validation vectors"),
        ({"validation": (np.eye(12), np.arange(3))}, "labels of validation"),
        ({"picture_N": np.arange(3)}, "the picture of each"),
        ({"picture_N": np.zeros(24, int)}, "two classes"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(UsageError, match=says):
        fit(*made(), logit_scale=100, **options)


def test_options_may_be_words_and_numbers_from_a_command_line():
    head = fit(*made(), logit_scale=100, seed=3, alpha="0.5", prior="counts", covariance="class", folds=3)
    assert head.alpha == 0.5
    assert ADAPTATION.fit is fit


def test_vectors_of_other_lengths_are_scaled_with_a_warning():
    vectors, labels, text = made()
    with pytest.warns(UserWarning, match="do not have length 1"):
        scaled = fit(vectors * 3, labels, text, logit_scale=100, alpha=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = fit(vectors, labels, text, logit_scale=100, alpha=1)
    np.testing.assert_allclose(scaled.weight_DC, wanted.weight_DC, rtol=1e-5)


def test_half_precision_is_cast_up():
    vectors, labels, text = made(dim=40)
    half = fit(vectors.astype(np.float16), labels, text.astype(np.float16), logit_scale=100, alpha=1)
    assert half.gaussians.weight_DC.dtype == np.float64
    wanted = fit(vectors, labels, text, logit_scale=100, alpha=1).gaussians.weight_DC
    assert np.abs(half.gaussians.weight_DC - wanted).max() < 0.01 * np.abs(wanted).max()


def test_a_singular_mean_of_covariances_is_shrunk_and_said():
    vectors, labels, text = made((4, 4, 4), 30)
    head = fit(vectors, labels, text, logit_scale=100, alpha=1, covariance="class")
    assert any("singular" in note for note in head.notes)
    np.testing.assert_allclose(head.gaussians.weight_DC, plain(vectors, labels, 3)[0], rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# The model, the claim
# --------------------------------------------------------------------------------------------------


def test_the_model_classifies_as_the_head_and_survives_saving():
    torch.manual_seed(0)
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    base = CLIP(
        ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))
    )
    pixels = torch.randn(12, 3, 16, 16)
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(base.encode_image(pixels), dim=-1).numpy()
    labels = np.arange(12) % 3
    head = fit(vectors, labels, unit(np.eye(3, 16)), logit_scale=100, alpha=1)
    config = HeadConfig("gda-clip", 3)
    model = GdaClip(base, config, head)
    with torch.no_grad():
        torch.testing.assert_close(
            model.classify_image(pixels).numpy(), head.logits(vectors), rtol=1e-4, atol=1e-3
        )
        other = GdaClip(base, config)
        other.load_own(model.own_state(), source="here")
        assert torch.equal(other.classify_image(pixels), model.classify_image(pixels))
    assert set(model.own_state()) == {"weight_DC", "bias_C"}


def test_the_claim():
    by = {arm: np.mean([run_claim(arm, seed)["accuracy"] for seed in CLAIM.seeds]) for arm in CLAIM.arms}
    others = max(value for arm, value in by.items() if arm != CLAIM.ours)
    assert by[CLAIM.ours] > others + 3, by
