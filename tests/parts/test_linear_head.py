import numpy as np
import pytest
import torch

from moviola.clip.loaded import unit
from moviola.parts import linear_head
from moviola.parts.linear_head import folds_of, linear_probe, nearest_mean
from moviola.types import UsageError


def made(count=60, dim=12, classes=3, seed=0, spread=0.6):
    rng = np.random.default_rng(seed)
    mean_CD = rng.normal(size=(classes, dim))
    labels_N = np.arange(count) % classes
    vectors_ND = unit(mean_CD[labels_N] + spread * rng.normal(size=(count, dim)))
    return vectors_ND, labels_N, unit(mean_CD)


def test_nearest_mean_is_the_cosine_to_the_mean_of_each_class():
    vectors_ND, labels_N, text_CD = made()
    head = nearest_mean(vectors_ND, labels_N, text_CD, logit_scale=50.0)
    means = unit(np.stack([vectors_ND[labels_N == c].mean(0) for c in range(3)]))
    np.testing.assert_allclose(head.logits(vectors_ND), 50 * vectors_ND @ means.T, atol=1e-4)


@pytest.mark.parametrize("count", [9, 60])  # fewer and more pictures than numbers in a vector
def test_the_probe_stands_where_the_gradient_of_its_loss_is_zero(count):
    vectors_ND, labels_N, text_CD = made(count)
    head = linear_probe(vectors_ND, labels_N, text_CD, logit_scale=1.0, penalty=0.05)
    scale = vectors_ND.shape[1] ** 0.5
    weight = torch.tensor(head.weight_DC / scale, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(head.bias_C, dtype=torch.float64, requires_grad=True)
    logits = torch.from_numpy(vectors_ND.astype(np.float64) * scale) @ weight + bias
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels_N))
    (loss + 0.05 / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-5
    assert bias.grad.abs().max() < 1e-5


def test_the_penalty_is_chosen_within_the_training_pictures(monkeypatch):
    """On noise the strongest penalty loses least on pictures left out; on clear classes a weak one."""
    rng = np.random.default_rng(0)
    noise_ND, labels_N = unit(rng.normal(size=(60, 12))), np.arange(60) % 3
    text_CD = np.zeros((3, 12))
    assert "penalty 100" in linear_probe(noise_ND, labels_N, text_CD, logit_scale=1.0).notes[-1]
    clear_ND, labels_N, text_CD = made(spread=0.1)
    chosen = linear_probe(clear_ND, labels_N, text_CD, logit_scale=1.0).notes[-1]
    assert float(chosen.split()[1]) < 0.1
    one_each = linear_probe(clear_ND[:3], labels_N[:3], text_CD, logit_scale=1.0)
    assert "not chosen" in one_each.notes[0]
    monkeypatch.setattr(linear_head, "PENALTIES", (0.5,))
    assert linear_probe(clear_ND, labels_N, text_CD, logit_scale=1.0).notes == ("penalty 0.5",)


def test_folds_spread_every_class_evenly():
    labels_N = np.repeat([0, 1, 2], [10, 5, 7])
    fold_N = folds_of(labels_N, 5, seed=3)
    for label in range(3):
        counts = np.bincount(fold_N[labels_N == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (fold_N == folds_of(labels_N, 5, seed=3)).all()
    assert (fold_N != folds_of(labels_N, 5, seed=4)).any()


@pytest.mark.parametrize("fit", [nearest_mean, linear_probe])
def test_bad_vectors_and_labels(fit):
    vectors_ND, labels_N, text_CD = made(6)
    with pytest.raises(UsageError, match=r"1 of 3 classes have no picture: numbers 2"):
        fit(vectors_ND[:2], labels_N[:2], text_CD, logit_scale=1.0)
    with pytest.raises(UsageError, match=r"class numbers in 0\.\.2"):
        fit(vectors_ND, labels_N + 1, text_CD, logit_scale=1.0)
    with pytest.raises(UsageError, match="one label for each"):
        fit(vectors_ND, labels_N[:4], text_CD, logit_scale=1.0)
    broken = vectors_ND.copy()
    broken[0, 0] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        fit(broken, labels_N, text_CD, logit_scale=1.0)
    if fit is linear_probe:
        with pytest.raises(UsageError, match="must not be negative"):
            fit(vectors_ND, labels_N, text_CD, logit_scale=1.0, penalty=-1.0)
