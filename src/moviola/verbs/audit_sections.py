"""The sections of an audit, each from what the models gave: figures as JSON, by model.

Shares and accuracies are percent, likelihoods are nats. The measures are those of
`systems.evaluation.clip_robustness`; here are the sets they are taken on and what a page draws of them.

Axis letters: N items, M items outside, C classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moviola.data.classes import ClassSet
from moviola.data.hashing import permutation
from moviola.data.retrieval import RetrievalSet
from moviola.metrics.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
    softmax,
)
from moviola.metrics.classification import per_class_accuracy
from moviola.metrics.robustness import LEAST_BASELINES, EffectiveRobustness
from moviola.systems.evaluation.clip_robustness import (
    REST,
    Config,
    Predictions,
    audit_accuracy,
    audit_calibration,
    audit_corruptions,
    audit_detection,
    audit_factors,
    audit_prompts,
    audit_shape_bias,
)
from moviola.types import UsageError
from moviola.verbs.audit_models import Subject, Templates, WithWords
from moviola.verbs.audit_suites import CueSuite, PublishedCues, Run, Seen, Variant
from moviola.verbs.evaluate import evaluate_retrieval

Json = dict[str, Any]

_HISTOGRAM = 20  # bins of confidence in what is drawn of the outside
_PROMPT_ITEMS = 10_000  # so that the scores of some twenty templates fit in memory


def accuracy(seen: Seen, subjects: Sequence[Subject], data: ClassSet) -> Json:
    """Top-1 with its standard error, top-5 where there are more than five classes, and every class."""
    labels_N = data.labels_N[seen.index_N]
    names_C = [f"{name} ({i})" if name in data.repeated else name for i, name in enumerate(data.classes)]
    by_model = {}
    for subject in subjects:
        logits_NC = seen.logits(subject)
        figures = audit_accuracy(Predictions(logits_NC, labels_N))
        share = figures["top1"] / 100
        classes_C = per_class_accuracy(logits_NC, labels_N)
        by_model[subject.name] = {
            **figures,
            "top5": figures["top5"] if len(names_C) > 5 else None,
            "standard_error": 100 * math.sqrt(share * (1 - share) / len(labels_N)),
            "per_class": {n: v for n, v in zip(names_C, classes_C.tolist(), strict=True) if math.isfinite(v)},
        }
    return {"items": len(labels_N), "classes": len(names_C), "by_model": by_model}


def calibration(seen: Seen, subjects: Sequence[Subject], data: ClassSet, seed: int, notes: list[str]) -> Json:
    """Before and after a temperature fitted on one half of the items; all figures are of the other half.

    `corrupted` has the other half's figures after corruption with that temperature: by severity the mean
    over the corruptions.
    """
    labels_N = data.labels_N[seen.index_N]
    by_model: dict[str, Json] = {}
    fitted_on = 0
    for subject in subjects:
        clean = Predictions(seen.logits(subject), labels_N)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            figures = audit_calibration(clean, config=Config(seed=seed))
        notes += [f"{subject.name}: {one.message}" for one in said]
        fitted_on, temperature = figures["fitted_on"], figures["temperature"]
        rest = np.sort(permutation(seed, 0, len(clean))[fitted_on:])
        other = clean.take(rest)
        by_model[subject.name] = {
            "temperature": temperature,
            **figures["suites"][REST],
            "reliability": _diagram(other, 1.0),
            "reliability_scaled": _diagram(other, temperature),
            "corrupted": _shifted(seen, subject, rest, labels_N, temperature),
        }
    return {"fitted_on": fitted_on, "measured_on": len(labels_N) - fitted_on, "by_model": by_model}


def _diagram(of: Predictions, temperature: float) -> Json:
    found = reliability(softmax(of.logits_NC, temperature), of.labels_N)
    return {name: getattr(found, name).tolist() for name in ("edges", "count", "confidence", "accuracy")}


def _shifted(
    seen: Seen, subject: Subject, rest: np.ndarray, labels_N: np.ndarray, temperature: float
) -> dict[int, dict[str, float]]:
    found: dict[int, list[dict[str, float]]] = {}
    for variant in seen.corrupted:  # one at a time: all of them may not fit in memory
        logits, labels = seen.logits(subject, variant)[rest], labels_N[rest]
        figures = {}
        for ending, value in (("", 1.0), ("_scaled", temperature)):
            figures[f"ece{ending}"] = expected_calibration_error(softmax(logits, value), labels)
            figures[f"nll{ending}"] = negative_log_likelihood(logits, labels, temperature=value)
        found.setdefault(variant.severity, []).append(figures)
    return {
        severity: {name: float(np.mean([one[name] for one in several])) for name in several[0]}
        for severity, several in found.items()
    }


def corruptions(
    seen: Seen,
    subjects: Sequence[Subject],
    baselines: Sequence[Subject],
    stored: Mapping[str, Json],
    data: ClassSet,
    notes: list[str],
) -> Json:
    """Accuracy by corruption and severity, what it loses, and how that compares with the baselines.

    `stored` are figures of baselines from earlier reports.
    """
    labels_N = data.labels_N[seen.index_N]

    def figures(subject: Subject) -> Json:
        def top1(variant: Variant) -> float:
            return Predictions(seen.logits(subject, variant), labels_N).accuracy

        found = {(one.corruption or "", one.severity): top1(one) for one in seen.corrupted}
        return audit_corruptions(Predictions(seen.logits(subject), labels_N).accuracy, found)

    by_model = {subject.name: figures(subject) for subject in subjects}
    others = {subject.name: figures(subject) for subject in baselines} | dict(stored)
    first = next(iter(by_model.values()))
    severities = sorted(next(iter(first["rows"].values()))["severity"])
    pictures = len(labels_N) * len(severities)
    for part in ("rows", "groups"):
        for name in first[part]:
            means = {m: one[part][name]["mean"] for m, one in (others | by_model).items()}
            beyond = _line(
                [one["clean"] for one in others.values()],
                [means[m] for m in others],
                len(labels_N),
                pictures,
                notes,
            )
            for model, one in by_model.items():
                one[part][name]["effective"] = None if beyond is None else beyond(one["clean"], means[model])
    return {"names": list(first["rows"]), "severities": severities, "by_model": by_model, "baselines": others}


def _line(
    x_B: Sequence[float], y_B: Sequence[float], n: int, n_y: int, notes: list[str]
) -> Callable[[float, float], float] | None:
    """Points of accuracy above the baselines' line; None where there is none."""
    if len(x_B) < LEAST_BASELINES:
        return None
    try:
        line = EffectiveRobustness.fit(x_B, y_B, n, n_y)
    except UsageError as error:
        note = f"No effective robustness: {error.problem}"
        if note not in notes:
            notes.append(note)
        return None
    return lambda x, y: line(x, y, n)


def factors(
    seen: Seen,
    subjects: Sequence[Subject],
    baselines: Sequence[Subject],
    stored: Mapping[str, Json],
    data: ClassSet,
    tags: Mapping[int, str],
) -> Json:
    """Accuracy over the items of every factor; items without one count for the overall accuracy alone."""
    labels_N = data.labels_N[seen.index_N]
    factor_N = [tags.get(row) for row in seen.index_N.tolist()]
    if not any(factor_N):
        raise UsageError("None of the items that could be read has a factor.")

    def figures(subject: Subject, others: Sequence[Json] = ()) -> Json:
        found = audit_factors(Predictions(seen.logits(subject), labels_N), factor_N, others)
        for cell in found["factors"].values():
            cell["gap"] = cell["accuracy"] - found["accuracy"]
        return found | {"worst": min(cell["accuracy"] for cell in found["factors"].values())}

    others = {subject.name: figures(subject) for subject in baselines} | dict(stored)
    lines = list(others.values()) if len(others) >= LEAST_BASELINES else []
    by_model = {subject.name: figures(subject, lines) for subject in subjects}
    items = {name: cell["n"] for name, cell in next(iter(by_model.values()))["factors"].items()}
    return {"items": items, "untagged": factor_N.count(None), "by_model": by_model, "baselines": others}


def shape(seen: Seen, subjects: Sequence[Subject], suite: CueSuite | PublishedCues) -> Json:
    """Which cue decides in pictures with the shape of one class and the texture of another."""
    cues = suite.labels(seen.index_N)
    by_model = {subject.name: audit_shape_bias(seen.logits(subject), *cues) for subject in subjects}
    return {"made": isinstance(suite, CueSuite), "pictures": len(seen.index_N), "by_model": by_model}


def outside(seen: Seen, others: Mapping[str, Seen], subjects: Sequence[Subject]) -> Json:
    """Telling items of the classes from others, by the highest probability and by the highest logit."""
    edges = np.linspace(0, 1, _HISTOGRAM + 1)
    by_model: dict[str, Json] = {}
    for subject in subjects:
        inside_NC = seen.logits(subject)
        logits = {name: other.logits(subject) for name, other in others.items()}
        by_set = audit_detection(inside_NC, logits)
        for name, logits_MC in logits.items():
            by_set[name]["histogram"] = np.histogram(softmax(logits_MC).max(1), edges)[0].tolist()
        inside = np.histogram(softmax(inside_NC).max(1), edges)[0].tolist()
        by_model[subject.name] = {"by_set": by_set, "histogram": inside}
    items = {name: len(other.index_N) for name, other in others.items()}
    return {
        "items": items,
        "inside": len(seen.index_N),
        "edges": (100 * edges).tolist(),
        "by_model": by_model,
    }


def prompts(seen: Seen, readers: Sequence[WithWords], data: ClassSet, sets: Mapping[str, Templates]) -> Json:
    """Top-1 by set of templates (`sets`), and of every template alone (`alone`).

    `alone` is None for models that are not separable.
    """
    rows = np.sort(permutation(0, 0, len(seen.index_N))[:_PROMPT_ITEMS])
    labels_N = data.labels_N[seen.index_N][rows]
    single = list(dict.fromkeys(template for several in sets.values() for template in several))
    by_model: dict[str, Json] = {}
    for subject in readers:
        raw_NK = seen.raw(subject)[rows]
        of_sets = {name: subject.logits(raw_NK, several) for name, several in sets.items()}
        alone = None
        if subject.model.separable and len(single) > 1:
            alone = audit_prompts(labels_N, {one: subject.logits(raw_NK, (one,)) for one in single})
        by_model[subject.name] = {"sets": audit_prompts(labels_N, of_sets), "alone": alone}
    sizes = {name: len(several) for name, several in sets.items()}
    return {"items": len(rows), "templates": sizes, "by_model": by_model}


def retrieval(run: Run, readers: Sequence[WithWords], pairs: RetrievalSet, limit: int | None) -> Json:
    """Both ways, by `evaluate_retrieval`."""
    reports = {}
    for reader in readers:
        before = run.done

        def step(done: float, total: float | None, note: str = "", *, before: int = before) -> None:
            run.tell(before + int(done) - run.done, note)

        reports[reader.name] = evaluate_retrieval(
            reader.model,
            pairs,
            limit=limit,
            batch_size=run.batch_size,
            cache=run.cache if reader.model.separable else None,
            on_progress=step,
        )
        run.failed.update(dict.fromkeys(reports[reader.name].failed))
    first = next(iter(reports.values()))
    ways = ("text_to_item", "item_to_text")
    return {
        "data": first.data,
        "items": first.n_items,
        "texts": first.n_texts,
        "among": first.among,
        "notes": list(first.notes),
        "by_model": {name: {way: getattr(one, way) for way in ways} for name, one in reports.items()},
    }
