"""The CLIP robustness audit: what one accuracy hides, measured on logits that are computed once.

A zero-shot CLIP, the same CLIP fine-tuned and a plain classifier can have one accuracy and differ in all
else: which visual factors they fail on, whether shape or texture decides, whether their confidence can be
believed, whether it tells pictures of no class, and how much corruptions and other prompts cost them. The
audit measures each by itself, from the class logits of every suite of pictures. Over the reports of many
models, `metrics.association.attribute_study` then asks which attribute of theirs goes with a figure.

Tu, Deng, Gedeon: "Toward a Holistic Evaluation of Robustness in CLIP Models", TPAMI 2025, arXiv 2410.01534.
No official code is known: figures are held to those of scikit-learn, torchmetrics and SciPy instead.

Symbols: T is the temperature of `fit_temperature`, ECE and NLL the errors of calibration; "inside" are
pictures of the classes (ID), "outside" of none of them (OOD); "points" are percent of accuracy.

Known differences
- 3D corruptions, 3D correspondence and the comparison with LLaVA (the paper's parts 6 and 7) are left out,
  and retrieval (part 5) is `moviola evaluate`. Corruptions are those of `data.corruptions`, or any measured.
- The part that T is fitted on is drawn by hash; ECE and NLL before and after are both of the other part.
- Effective robustness is in points of accuracy; the line through the baselines is fitted in probits.
- The mapping of ImageNet's 1000 classes to the 16 of the cue-conflict set is not included: give it as
  `groups`, or score the 16 names by prompt.
- Written from the abstract and general knowledge of the paper, so no equation numbers are cited.

Axis letters: N pictures, M others, C classes, D width, G groups of classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.clip.config import build_config
from moviola.clip.keys import Keys
from moviola.clip.model import CLIP
from moviola.data import cue_conflict as world
from moviola.data.corruptions import CORRUPTIONS
from moviola.data.hashing import permutation
from moviola.metrics.calibration import (
    checked_logits,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    softmax,
)
from moviola.metrics.classification import mean_class_accuracy, topk_accuracy
from moviola.metrics.detection import auroc, fpr_at_tpr
from moviola.metrics.robustness import EffectiveRobustness, corruption_table, group_probability, shape_bias
from moviola.training.brief import fit
from moviola.training.fine_tuning import FineTuning
from moviola.training.objectives import BasePairObjective, Contrastive
from moviola.types import Claim, Example, UsageError

Figures = dict[str, Any]
"""A part of the report as JSON takes it; a figure that is not defined is None."""
ALL, REST = "all corruptions", "rest of the clean set"


@dataclass(frozen=True)
class Config:
    """bins of the ECE, the TPR in percent at which the FPR is read, and the share that T is fitted on."""

    bins: int = 15
    tpr: float = 95.0
    fit_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bins < 1 or not 0 < self.tpr <= 100 or not 0 < self.fit_share < 1:
            raise UsageError(
                "An audit needs 1 bin or more, a TPR above 0 and at most 100 percent, and a share between 0 "
                f"and 1, got {self.bins}, {self.tpr} and {self.fit_share}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        config: Config = build_config(cls, data)
        return config


@dataclass(frozen=True)
class Predictions:
    """What a model said of a suite once: logits_NC, and labels_N, the true class numbers."""

    logits_NC: np.ndarray
    labels_N: np.ndarray

    def __post_init__(self) -> None:
        topk_accuracy(checked_logits(self.logits_NC), self.labels_N, (1,))  # raises for what does not fit

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, rows: np.ndarray) -> Predictions:
        return Predictions(self.logits_NC[rows], self.labels_N[rows])

    @property
    def accuracy(self) -> float:
        return topk_accuracy(self.logits_NC, self.labels_N, (1,))["top1"]


def audit_accuracy(clean: Predictions) -> Figures:
    """Top-1, top-5 and the mean over classes of top-1."""
    figures = topk_accuracy(clean.logits_NC, clean.labels_N)
    mean = mean_class_accuracy(clean.logits_NC, clean.labels_N)
    return {"n": len(clean), **figures, "mean_per_class": mean}


def audit_calibration(
    clean: Predictions, shifts: Mapping[str, Predictions] | None = None, config: Config | None = None
) -> Figures:
    """ECE and NLL as they are and at the T fitted on a part of `clean`: of the other part, and of shifts."""
    config = config or Config()
    if len(clean) < 2:
        raise UsageError(f"Calibration needs pictures to fit on and others, got {len(clean)} in all.")
    order = permutation(config.seed, 0, len(clean))
    cut = min(max(round(config.fit_share * len(clean)), 1), len(clean) - 1)
    temperature = fit_temperature(clean.logits_NC[order[:cut]], clean.labels_N[order[:cut]])
    suites = {REST: clean.take(np.sort(order[cut:])), **(shifts or {})}
    return {
        "temperature": temperature,
        "fitted_on": cut,
        "suites": {name: _calibration(suite, temperature, config) for name, suite in suites.items()},
    }


def _calibration(suite: Predictions, temperature: float, config: Config) -> Figures:
    logits, labels = suite.logits_NC, suite.labels_N
    figures: Figures = {"n": len(suite), "top1": suite.accuracy}
    for ending, value in (("", 1.0), ("_scaled", temperature)):
        probability_NC = softmax(logits, value)
        figures[f"ece{ending}"] = expected_calibration_error(probability_NC, labels, bins=config.bins)
        figures[f"nll{ending}"] = negative_log_likelihood(logits, labels, temperature=value)
    return figures


def audit_detection(
    inside_NC: npt.ArrayLike,
    outside: Mapping[str, npt.ArrayLike],
    config: Config | None = None,
    temperature: float = 1.0,
) -> Figures:
    """AUROC and FPR of pictures of no class, by the highest probability (at `temperature`) and logit.

    `outside` are logits by the name of their suite, over the same classes.
    """
    config = config or Config()
    inside = checked_logits(inside_NC)
    if not outside:
        raise UsageError("There are no pictures outside the classes, so the AUROC is not defined.")
    table: Figures = {}
    for name, logits_MC in outside.items():
        logits = checked_logits(logits_MC)
        if logits.shape[1] != inside.shape[1]:
            raise UsageError(
                f"{name} has the scores of {logits.shape[1]} classes, the clean set of {inside.shape[1]}."
            )
        scores = {
            "max_probability": [softmax(some, temperature).max(1) for some in (inside, logits)],
            "max_logit": [inside.max(1), logits.max(1)],
        }
        table[name] = {
            by: {"n": len(logits), "auroc": auroc(ins, outs), "fpr": fpr_at_tpr(ins, outs, config.tpr)}
            for by, (ins, outs) in scores.items()
        }
    return table


def audit_factors(
    predictions: Predictions,
    factor_N: Sequence[str | None],
    baselines: Sequence[Figures] = (),
    factors: Sequence[str] | None = None,
) -> Figures:
    """Accuracy over the pictures of each factor, and with baselines the effective robustness in points.

    `factor_N` names what is unusual about a picture, None or "" where nothing is. `baselines` are what this
    function gave for other models, three or more, on the same pictures. `factors` are those to report,
    by default all that occur.
    """
    if len(factor_N) != len(predictions):
        raise UsageError(f"There are {len(factor_N)} factors for {len(predictions)} pictures.")
    tags = np.array([factor or "" for factor in factor_N])
    names = sorted(set(tags.tolist()) - {""}) if factors is None else list(factors)
    empty = [name for name in names if not (tags == name).any()]
    if empty or not names:
        raise UsageError(f"There is no picture with the factor {', '.join(empty) or '(none is tagged)'}.")
    overall, count = predictions.accuracy, len(predictions)
    table: Figures = {}
    for name in names:
        part = predictions.take(np.flatnonzero(tags == name))
        table[name] = {"n": len(part), "accuracy": part.accuracy, "effective": None}
        if baselines:
            if any(name not in other["factors"] for other in baselines):
                raise UsageError(f"Not every baseline has a figure for the factor {name}.")
            y = [other["factors"][name]["accuracy"] for other in baselines]
            line = EffectiveRobustness.fit([other["accuracy"] for other in baselines], y, count, len(part))
            table[name]["effective"] = line(overall, part.accuracy, count)
    return {"n": count, "accuracy": overall, "factors": table}


def audit_corruptions(clean: float, corrupted: Mapping[tuple[str, int], float]) -> Figures:
    """`corruption_table`, with means over the groups of `data.corruptions` and over `ALL`.

    `corrupted` are accuracies in percent by (name, severity); `clean` is that on the same pictures.
    """
    groups = {ALL: [name for name, _ in corrupted]}
    for name, made in CORRUPTIONS.items():
        groups.setdefault(made.group, []).append(name)
    return corruption_table(clean, corrupted, groups)


def audit_shape_bias(
    logits_NC: npt.ArrayLike,
    shape_N: npt.ArrayLike,
    texture_N: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
) -> Figures:
    """Shape bias in percent, and how often shape, texture or neither was said.

    `groups` (C,) maps the classes of the logits to those of the cues, as `group_probability` takes it. None:
    the logits are of the cues' own classes.
    """
    scores_NG = checked_logits(logits_NC)
    if groups is not None:
        scores_NG = group_probability(softmax(scores_NG), groups)
    cue_M, count = np.append(shape_N, texture_N), scores_NG.shape[1]
    if len(cue_M) and not (cue_M.min() >= 0 and cue_M.max() < count):
        raise UsageError(f"Cues must be of the {count} classes, got numbers {cue_M.min()}..{cue_M.max()}.")
    figures = asdict(shape_bias(scores_NG.argmax(1), shape_N, texture_N))
    return figures | {"bias": None if math.isnan(figures["bias"]) else figures["bias"]}


def audit_prompts(labels_N: npt.ArrayLike, by_template: Mapping[str, npt.ArrayLike]) -> Figures:
    """How much the wording matters: top-1 by template, its spread, and how often all name the same class."""
    if len(by_template) < 2:
        raise UsageError(f"Prompt sensitivity needs two templates or more, got {len(by_template)}.")
    labels, logits = np.asarray(labels_N), {name: np.asarray(of) for name, of in by_template.items()}
    accuracy = {name: Predictions(of, labels).accuracy for name, of in logits.items()}
    named = np.stack([of.argmax(1) for of in logits.values()])
    values = np.array(list(accuracy.values()))
    return {
        "templates": accuracy,
        "mean": float(values.mean()),
        "std": float(values.std()),
        "range": float(values.max() - values.min()),
        "agreement": float((named == named[0]).all(0).mean() * 100),
    }


class Conflict(NamedTuple):
    """The arguments of `audit_shape_bias`."""

    logits_NC: np.ndarray
    shape_N: np.ndarray
    texture_N: np.ndarray
    groups_C: np.ndarray | None = None


def audit_predictions(
    clean: Predictions,
    *,
    shifts: Mapping[str, Predictions] | None = None,
    outside: Mapping[str, np.ndarray] | None = None,
    factor_N: Sequence[str | None] | None = None,
    baselines: Sequence[Figures] = (),
    corrupted: Mapping[tuple[str, int], Predictions] | None = None,
    conflict: Conflict | None = None,
    prompts: Mapping[str, np.ndarray] | None = None,
    config: Config | None = None,
) -> Figures:
    """Every part of the audit that there are predictions for, by its name; see the functions above.

    `corrupted` are of the pictures of `clean`, whole or a part: the drop is against all of `clean`.
    """
    config, report = config or Config(), {"accuracy": audit_accuracy(clean)}
    report["calibration"] = audit_calibration(clean, shifts, config)
    if outside is not None:
        report["detection"] = audit_detection(clean.logits_NC, outside, config)
    if factor_N is not None:
        report["factors"] = audit_factors(clean, factor_N, baselines)
    if corrupted is not None:
        accuracies = {key: suite.accuracy for key, suite in corrupted.items()}
        report["corruptions"] = audit_corruptions(clean.accuracy, accuracies)
    if conflict is not None:
        report["shape_bias"] = audit_shape_bias(*conflict)
    if prompts is not None:
        report["prompts"] = audit_prompts(clean.labels_N, prompts)
    return report


class ClipRobustness:
    """The audit with its constants: `ClipRobustness(Config(bins=10))(clean, outside=...)`."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()

    def __call__(self, clean: Predictions, **suites: Any) -> Figures:
        """`audit_predictions` with this configuration."""
        return audit_predictions(clean, **suites, config=self.config)


KEYS = Keys()
"""Nothing is learned but a number: there are no weights to name."""


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    image_ND, text_CD = (F.normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (24, 4))
    label_N = (image_ND @ text_CD.T + 0.3 * torch.randn(24, 4, generator=generator)).argmax(1)

    def run(image_ND: Tensor, text_CD: Tensor, label_N: Tensor) -> dict[str, Tensor]:
        logits_NC = (10 * image_ND @ text_CD.T).numpy()
        figures = audit_calibration(Predictions(logits_NC, label_N.numpy()))
        return {
            "confidence": torch.from_numpy(softmax(logits_NC).max(1)),
            "temperature": torch.tensor(figures["temperature"]),
            "ece": torch.tensor(figures["suites"][REST]["ece"]),
        }

    inputs = {"image_ND": image_ND, "text_CD": text_CD, "label_N": label_N}
    shapes: dict[str, tuple[int, ...]] = {"confidence": (24,), "temperature": (), "ece": ()}
    return Example(run, inputs, shapes, batched=("image_ND", "label_N", "confidence"))


# --------------------------------------------------------------------------------------------------
# The claim in miniature
# --------------------------------------------------------------------------------------------------


_ZERO_SHOT, _TUNED, _DEALT = "zero-shot", "fine-tuned on labels", "fine-tuned, textures dealt"
_WEB, _BATCH = 0.3, 96  # the chance that texture agrees with shape in pairs from the web


@lru_cache(maxsize=3)
def _pretrained(seed: int, pairs: int, steps: int) -> tuple[dict[str, Tensor], CLIP]:
    web = world.made_cues(seed, pairs, agree=_WEB)
    data = {"image": web.images_NCSS, "text": world.made_captions(web, seed, textured=0.5)}
    model = world.small_clip(seed)
    fit(model, Contrastive(model), data, steps=steps, batch=_BATCH, lr=2e-3, seed=seed)
    return data, model


def run_claim(
    arm: str, seed: int, *, start: int = 500, steps: int = 250, pairs: int = 6000, tests: int = 2000
) -> dict[str, float]:
    """Go on training one CLIP for as many steps: on its pairs, or on as many new pictures by class label.

    In the labelled pictures texture goes with the class nearly always, as it does in many classes of a
    benchmark; "textures dealt" has textures at random there and tells that from fine-tuning as such. Then
    the audit of new pictures: of those with cues in conflict, and of those like the labelled ones.
    """
    data, young = _pretrained(seed, pairs, start)
    model, classes = copy.deepcopy(young), len(world.SHAPES)
    with torch.no_grad():
        tuning = FineTuning(model, F.normalize(model.encode_text(world.made_prompts()), dim=-1))
    objective: BasePairObjective = Contrastive(model)
    if arm != _ZERO_SHOT:
        agree = 0.95 if arm == _TUNED else 1 / classes
        labelled = world.made_cues(seed, pairs, agree=agree, split=1)
        data = {"image": labelled.images_NCSS, "label": torch.from_numpy(labelled.shape_N)}
        objective = tuning
    fit(model, objective, data, steps=steps, batch=_BATCH, lr=1e-3, seed=seed + 1)
    conflict, clean = (world.made_cues(seed, tests, agree=agree, split=2) for agree in (0.0, 0.95))
    with torch.no_grad():
        if arm == _ZERO_SHOT:  # the texts' vectors moved with the towers
            tuning.head_CD.copy_(F.normalize(model.encode_text(world.made_prompts()), dim=-1))
        logits, cues = (tuning.logits(model, made.images_NCSS).numpy() for made in (clean, conflict))
    said = Conflict(cues, conflict.shape_N, conflict.texture_N)
    report = audit_predictions(Predictions(logits, clean.shape_N), conflict=said)
    return {
        "shape bias": report["shape_bias"]["bias"],
        "neither, %": 100 * report["shape_bias"]["neither"] / report["shape_bias"]["used"],
        "top-1": report["accuracy"]["top1"],
        "ECE": report["calibration"]["suites"][REST]["ece"],
    }


CLAIM = Claim(
    statement="Fine-tuning on class labels lowers the shape bias of a zero-shot CLIP.",
    data="made cues: outlines filled with patterns; both agree in 95 % of the labelled pictures",
    metric="shape bias",
    arms=(_ZERO_SHOT, _TUNED, _DEALT),
    ours=_TUNED,
    baseline=_ZERO_SHOT,
    run=run_claim,
    higher_is_better=False,
)
