from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from moviola.data.corruptions import corruption_names
from moviola.data.hashing import permutation
from moviola.metrics.association import pearson, slope, spearman
from moviola.metrics.calibration import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    softmax,
)
from moviola.metrics.detection import auroc, fpr_at_tpr
from moviola.metrics.retrieval import retrieval_metrics
from moviola.metrics.robustness import EffectiveRobustness, effective_robustness, probit
from moviola.systems.evaluation.clip_robustness import (
    ALL,
    REST,
    ClipRobustness,
    Config,
    Conflict,
    Predictions,
    audit_accuracy,
    audit_calibration,
    audit_corruptions,
    audit_detection,
    audit_factors,
    audit_predictions,
    audit_prompts,
    audit_shape_bias,
    run_claim,
)
from moviola.types import CheckpointError, UsageError


def test_parity_with_independent_libraries(oracles_dir):
    folder = oracles_dir / "51-clip-robustness"
    meta, data = json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")
    got = {}

    def cases(part):
        return sorted({name.split("/")[2] for name in data if name.startswith(f"in/{part}/")})

    def given(part, case, *names):
        return (data[f"in/{part}/{case}/{name}"] for name in names)

    for case in cases("calibration"):
        logits, labels = given("calibration", case, "logits", "labels")
        temperature, found = fit_temperature(logits, labels), reliability(softmax(logits), labels)
        own = {
            "ece15": expected_calibration_error(softmax(logits), labels),
            "ece10": expected_calibration_error(softmax(logits), labels, bins=10),
            "nll": negative_log_likelihood(logits, labels),
            "temperature": temperature,
            "nll_scaled": negative_log_likelihood(logits, labels, temperature=temperature),
            "bin_accuracy": found.accuracy[found.count > 0],
            "bin_confidence": found.confidence[found.count > 0],
        }
        got |= {f"out/calibration/{case}/{name}": value for name, value in own.items()}
    for case in cases("detection"):
        scores = tuple(given("detection", case, "inside", "outside"))
        got[f"out/detection/{case}/auroc"] = auroc(*scores)
        got |= {f"out/detection/{case}/fpr{tpr}": fpr_at_tpr(*scores, tpr) for tpr in (95, 80)}
    for case in cases("association"):
        xy = tuple(given("association", case, "x", "y"))
        own = {"pearson": pearson(*xy), "spearman": spearman(*xy), "slope": slope(*xy)}
        got |= {f"out/association/{case}/{name}": value for name, value in own.items()}
    for case in cases("retrieval"):
        (sims,) = given("retrieval", case, "sims")
        ranks = retrieval_metrics(sims, range(len(sims)))["t2v"]
        got |= {f"out/retrieval/{case}/R{k}": ranks[f"R{k}"] for k in (1, 5, 10)}
    n = meta["config"]["n"]
    got["out/probit/value"] = [probit(percent, n) for percent in data["in/probit/percent"].tolist()]
    x_B, y_B, x, y = (data[f"in/line/{name}"] for name in ("baselines_x", "baselines_y", "x", "y"))
    line = EffectiveRobustness.fit(x_B, y_B, 10**9)
    got |= {"out/line/slope": line.slope, "out/line/intercept": line.intercept}
    got["out/line/effective"] = [effective_robustness(x_B, y_B, *xy, 10**9) for xy in zip(x, y, strict=True)]

    assert set(got) == {name for name in data if name.startswith("out/")}
    for name, value in got.items():
        kind = name.rpartition("/")[2]
        tolerance = meta["tolerance_ece"] if kind in ("ece15", "ece10") else meta["tolerance"]
        tolerance = meta["tolerance_temperature"] if kind == "temperature" else tolerance
        assert np.shape(value) == data[name].shape, name
        assert (np.abs(value - data[name]) <= tolerance * (1 + np.abs(data[name]))).all(), name


def predictions(count=600, classes=6, seed=0, signal=1.5, scale=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    logits = rng.standard_normal((count, classes))
    logits[np.arange(count), labels] += signal
    return Predictions(scale * logits, labels)


# --------------------------------------------------------------------------------------------------
# Known answers
# --------------------------------------------------------------------------------------------------


def test_accuracy():
    right = Predictions(np.eye(6)[np.arange(60) % 6], np.arange(60) % 6)
    assert audit_accuracy(right) == {"n": 60, "top1": 100.0, "top5": 100.0, "mean_per_class": 100.0}
    uneven = Predictions(np.eye(2)[[0] * 10], np.array([0] * 9 + [1]))
    assert audit_accuracy(uneven)["top1"] == pytest.approx(90)
    assert audit_accuracy(uneven)["mean_per_class"] == pytest.approx(50)


def test_calibration_of_an_inflated_model():
    plain, inflated = predictions(count=4000), predictions(count=4000, scale=7)
    figures = audit_calibration(inflated, {"shifted": predictions(seed=1, signal=0.5, scale=7)})
    rest, shifted = figures["suites"][REST], figures["suites"]["shifted"]
    assert figures["temperature"] == pytest.approx(7 * audit_calibration(plain)["temperature"])
    assert (figures["fitted_on"], rest["n"], shifted["n"]) == (2000, 2000, 600)
    assert rest["ece"] > 15
    assert rest["ece_scaled"] < 4
    assert rest["nll_scaled"] < rest["nll"]
    assert shifted["ece_scaled"] > rest["ece_scaled"]  # a temperature of the clean set is not the shift's
    assert shifted["ece_scaled"] < shifted["ece"]


def test_the_part_that_is_fitted_on_is_not_measured():
    """Labels of the other part say nothing about T, and those of the fitted part nothing about the ECE."""
    clean, config = predictions(), Config(fit_share=0.25, seed=3)
    figures = audit_calibration(clean, config=config)
    assert (figures["fitted_on"], figures["suites"][REST]["n"]) == (150, 450)
    rest = permutation(3, 0, 600)[150:]
    labels = clean.labels_N.copy()
    labels[rest] = (labels[rest] + 1) % 6
    other = audit_calibration(Predictions(clean.logits_NC, labels), config=config)
    assert other["temperature"] == figures["temperature"]
    assert other["suites"][REST]["top1"] < figures["suites"][REST]["top1"] - 30


def test_detection_by_probability_and_by_logit():
    """Outside logits are all low but one-sided: the probability is fooled, the logit is not."""
    inside = np.array([[9.0, 8.5, 0.0]] * 20)
    fooling, flat = np.array([[3.0, -9.0, -9.0]] * 10), np.zeros((10, 3))
    table = audit_detection(inside, {"fooling": fooling, "flat": flat})
    assert table["fooling"]["max_probability"] == {"n": 10, "auroc": 0.0, "fpr": 100.0}
    assert table["fooling"]["max_logit"] == {"n": 10, "auroc": 100.0, "fpr": 0.0}
    assert table["flat"]["max_probability"]["auroc"] == 100
    assert audit_detection(inside, {"itself": inside})["itself"]["max_logit"] == {
        "n": 20,
        "auroc": 50.0,
        "fpr": 100.0,
    }
    mixed = np.concatenate([inside[:1], flat])  # one in eleven passes whatever share must
    assert audit_detection(inside, {"m": mixed})["m"]["max_logit"]["fpr"] == pytest.approx(100 / 11)


def factored(seed, raised=None, skill=1.2):
    """A model whose accuracy on the factor `raised` is better than the others'."""
    rng = np.random.default_rng(seed)
    labels, tags = np.arange(3000) % 5, np.array(["pose", "texture", "", "smaller"])[np.arange(3000) % 4]
    logits = rng.standard_normal((3000, 5))
    boost = skill - 0.4 * (tags == "pose") + 1.5 * (tags == raised)
    logits[np.arange(3000), labels] += boost
    return Predictions(logits, labels), tags.tolist()


def test_a_raised_factor_is_effectively_robust_and_no_other():
    others = [audit_factors(*factored(seed, skill=0.6 + 0.2 * seed)) for seed in range(8)]
    plain = audit_factors(*factored(20), others)
    raised = audit_factors(*factored(20, "texture"), others)
    assert set(raised["factors"]) == {"pose", "smaller", "texture"}  # untagged pictures are none
    assert raised["factors"]["texture"]["n"] == 750
    assert raised["factors"]["texture"]["effective"] > 8
    assert raised["factors"]["pose"]["effective"] < 0
    assert raised["factors"]["smaller"]["effective"] < 0
    assert all(abs(found["effective"]) < 4 for found in plain["factors"].values())
    assert others[0]["factors"]["pose"]["effective"] is None
    of_baselines = [audit_factors(*factored(s, skill=0.6 + 0.2 * s), others) for s in range(8)]
    for factor in raised["factors"]:
        mean = np.mean([one["factors"][factor]["effective"] for one in of_baselines])
        assert mean == pytest.approx(0, abs=0.2)


def test_corruptions_by_group():
    measured = {("fog", 2): 40.0, ("fog", 1): 60.0, ("jpeg", 1): 80.0, ("jpeg", 2): 60.0}
    measured |= {("night", 1): 20.0, ("night", 2): 20.0}  # one of the user's own
    table = audit_corruptions(80.0, measured)
    assert table["rows"]["fog"]["severity"] == {1: 60.0, 2: 40.0}
    assert table["groups"]["weather"]["mean"] == 50
    assert table["groups"]["digital"] == {"mean": 70.0, "relative_drop": pytest.approx(12.5)}
    assert table["groups"][ALL]["mean"] == pytest.approx((50 + 70 + 20) / 3)
    assert set(table["groups"]) == {ALL, "weather", "digital"}
    every = audit_corruptions(80.0, {(name, 1): 80.0 for name in corruption_names()})
    assert all(row["relative_drop"] == 0 for row in every["rows"].values())


def test_shape_bias_of_logits():
    shape, texture = np.arange(40) % 4, (np.arange(40) + 1) % 4
    logits = np.eye(4)[np.where(np.arange(40) < 30, shape, texture)]
    assert audit_shape_bias(logits, shape, texture) == {
        "bias": 75.0,
        "shape": 30,
        "texture": 10,
        "neither": 0,
        "used": 40,
    }
    neither = audit_shape_bias(np.eye(4)[(shape + 2) % 4], shape, texture)
    assert neither["bias"] is None
    assert neither["neither"] == 40
    # eight fine classes, two to a coarse one; two of none. One fine class must not win by itself
    groups = [0, 0, 1, 1, 2, 2, 3, 3, -1, -1]
    fine = np.zeros((40, 10))
    fine[np.arange(40), 2 * shape] = fine[np.arange(40), 2 * shape + 1] = 1.2
    fine[np.arange(40), 2 * texture] = 1.5
    fine[:, 9] = 5
    assert audit_shape_bias(fine, shape, texture)["bias"] is None
    assert audit_shape_bias(fine, shape, texture, groups)["bias"] == 100


def test_prompts():
    labels = np.arange(8) % 2
    good, bad = np.eye(2)[labels], np.eye(2)[1 - labels]
    half = np.where(np.arange(8)[:, None] < 4, good, bad)
    figures = audit_prompts(labels, {"a {}.": good, "the {}.": half})
    assert figures["templates"] == {"a {}.": 100.0, "the {}.": 50.0}
    assert (figures["mean"], figures["std"], figures["range"]) == (75, 25, 50)
    assert figures["agreement"] == 50
    assert audit_prompts(labels, {"a": good, "b": 3 * good})["range"] == 0


def test_all_of_it_is_json_and_only_what_was_given():
    clean = predictions()
    audit = ClipRobustness(Config(bins=10, seed=2))
    assert set(audit(clean)) == {"accuracy", "calibration"}
    report = audit(
        clean,
        shifts={"sketch": predictions(seed=1)},
        outside={"noise": np.zeros((50, 6))},
        factor_N=["pose", None] * 300,
        corrupted={("fog", s): predictions(signal=1.5 / s) for s in (2, 1)},
        conflict=Conflict(np.eye(6), np.arange(6), np.roll(np.arange(6), 1)),
        prompts={"a": clean.logits_NC, "b": clean.logits_NC[:, ::-1]},
    )
    parts = {"accuracy", "calibration", "detection", "factors", "corruptions", "shape_bias", "prompts"}
    assert set(report) == parts
    assert json.loads(json.dumps(report))["shape_bias"]["bias"] == 100
    assert list(report["corruptions"]["rows"]["fog"]["severity"]) == [1, 2]
    assert audit.config == Config.from_json(audit.config.to_json())
    ten = expected_calibration_error(softmax(clean.logits_NC), clean.labels_N, bins=10)
    assert report["calibration"]["suites"][REST]["ece"] != ten  # of the rest, not of all
    assert report == audit_predictions(
        clean,
        shifts={"sketch": predictions(seed=1)},
        outside={"noise": np.zeros((50, 6))},
        factor_N=["pose", None] * 300,
        corrupted={("fog", s): predictions(signal=1.5 / s) for s in (2, 1)},
        conflict=Conflict(np.eye(6), np.arange(6), np.roll(np.arange(6), 1)),
        prompts={"a": clean.logits_NC, "b": clean.logits_NC[:, ::-1]},
        config=audit.config,
    )


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_bad_predictions():
    for logits, labels, message in (
        (np.full((2, 3), np.nan), [0, 1], "NaN or infinite"),
        (np.zeros((2, 3)), [0, 3], "class numbers"),
        (np.zeros((2, 3)), [0], "one label per item"),
        (np.zeros(3), [0, 1, 2], "items, classes"),
    ):
        with pytest.raises(UsageError, match=message):
            Predictions(logits, np.array(labels))


def test_bad_suites():
    clean = predictions(count=40)
    for outside, message in (
        ({}, "no pictures outside"),
        ({"x": np.zeros((5, 4))}, "x has the scores of 4 classes, the clean set of 6"),
        ({"x": np.zeros((0, 6))}, "items, classes"),
        ({"x": np.full((5, 6), np.nan)}, "NaN"),
    ):
        with pytest.raises(UsageError, match=message):
            audit_detection(clean.logits_NC, outside)
    with pytest.raises(UsageError, match="39 factors for 40"):
        audit_factors(clean, ["pose"] * 39)
    with pytest.raises(UsageError, match="none is tagged"):
        audit_factors(clean, [None] * 40)
    with pytest.raises(UsageError, match="no picture with the factor larger"):
        audit_factors(clean, ["pose"] * 40, factors=["pose", "larger"])
    lonely = audit_factors(clean, ["pose"] * 40)
    with pytest.raises(UsageError, match="3 baselines or more"):
        audit_factors(clean, ["pose"] * 40, [lonely, lonely])
    with pytest.raises(UsageError, match="figure for the factor larger"):
        audit_factors(clean, ["larger"] * 40, [lonely] * 3)
    with pytest.raises(UsageError, match=r"of the 6 classes, got numbers 0\.\.16"):
        audit_shape_bias(clean.logits_NC[:2], [0, 1], [16, 2])
    with pytest.raises(UsageError, match="two templates"):
        audit_prompts(clean.labels_N, {"a": clean.logits_NC})
    with pytest.raises(UsageError, match="to fit on and others"):
        audit_calibration(predictions(count=1))


def test_bad_configurations():
    for wrong in ({"bins": 0}, {"tpr": 0.0}, {"tpr": 101.0}, {"fit_share": 0.0}, {"fit_share": 1.0}):
        with pytest.raises(UsageError, match="An audit needs"):
            Config(**wrong)
    with pytest.raises(CheckpointError, match="colour"):
        Config.from_json({"colour": 1})


def test_the_claim_runs_in_little():
    for arm in ("zero-shot", "fine-tuned on labels", "fine-tuned, textures dealt"):
        figures = run_claim(arm, 0, start=4, steps=4, pairs=200, tests=100)
        assert set(figures) == {"shape bias", "neither, %", "top-1", "ECE"}
        assert all(0 <= value <= 100 for value in figures.values())
