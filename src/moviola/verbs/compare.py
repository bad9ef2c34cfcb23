"""`compare`: several models on the same labelled items, each of which is decoded once for all of them.

Axis letters: N items, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.data.classes import ClassSet, read_classes
from moviola.types import Clip, Dtype, UsageError
from moviola.verbs.classify import ClassScorer, class_templates
from moviola.verbs.common import (
    BATCH_BYTES,
    Look,
    Progress,
    Skipped,
    ahead,
    counting_cuts,
    cut_note,
    looks_at,
    resolve,
    summary,
)
from moviola.verbs.evaluate import zero_shot_report
from moviola.verbs.figures import ZeroShotReport, table_lines
from moviola.verbs.set_reader import NothingEvaluated

if TYPE_CHECKING:
    from moviola.clip.loaded import Model

_TOGETHER = 16  # items whose pixels wait for all models, or fewer where they are large


@dataclass(frozen=True)
class Comparison:
    """A report a model, in the order asked, all over the same items: those that every model could read."""

    reports: tuple[ZeroShotReport, ...]
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "models": [report.to_json() for report in self.reports],
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A header, and a line of figures for each model."""
        header = ("model", *self.reports[0].rows()[0])
        return [header, *((report.model, *report.rows()[1]) for report in self.reports)]

    def __str__(self) -> str:
        left_out = summary(self.failed, "were left out")
        return "\n".join([*table_lines(self.rows()), *self.notes, *left_out])


def compare(
    models: Sequence[str | Path | Model],
    data: str | Path | ClassSet,
    *,
    templates: str | Path | Sequence[str] | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    batch_size: int = 32,
    frames: int | None = None,
    truncate: bool = False,
    on_progress: Progress | None = None,
) -> Comparison:
    """What `evaluate_zero_shot` says of each of several models, for one pass over the files.

    A video is opened once, and the frames that models of one input size ask for are decoded together. An
    item that one of the models cannot take is left out for all, so that they are compared on the same ones.
    Options as in `evaluate_zero_shot`; models with a classifier of their own use that.
    """
    loaded = [resolve(model, device=device, dtype=dtype, tokenizer=None) for model in models]
    if len(loaded) < 2:
        raise UsageError(f"Comparing needs two models or more, got {len(loaded)}.")
    found = data if isinstance(data, ClassSet) else read_classes(data)
    sentences = [
        () if model.adaptation == "classifier" else class_templates(model, templates, "compare")
        for model in loaded
    ]
    with counting_cuts() as cut:
        scorers = [
            ClassScorer(model, found.classes, own, batch_size=batch_size, frames=frames, truncate=truncate)
            for model, own in zip(loaded, sentences, strict=True)
        ]
    rows = found.sample(limit)
    failed = [Skipped(*one) for one in found.skipped]
    scores: list[dict[int, np.ndarray]] = [{} for _ in loaded]
    done = 0

    def tell(many: int, note: str) -> None:
        nonlocal done
        done += many
        if on_progress is not None:
            on_progress(done, len(rows), note)

    def skip(index: int, one: Skipped) -> None:
        failed.append(one)
        tell(1, one.path)

    def together(media: Clip | bytes) -> list[Look]:
        return looks_at(media, loaded, frames=frames)

    items = found.stream(rows, on_skip=lambda name, why: skip(-1, Skipped(name, why)))
    for group in _groups(ahead(items, together, on_skip=skip)):
        for place, scorer in enumerate(scorers):
            own_looks = [(index, name, looks[place]) for index, name, looks in group]
            for kept, logits_NC in scorer.over(own_looks, on_skip=lambda index, one: failed.append(one)):
                scores[place].update(zip((one[0] for one in kept), logits_NC, strict=True))
        tell(len(group), group[-1][1])
    index = sorted(set.intersection(*(set(of_model) for of_model in scores)))
    if not index:
        raise NothingEvaluated("Not one item could be read by all models.", failed)
    index_N = np.array(index)
    reports = [
        zero_shot_report(model, found, index_N, np.stack([own[i] for i in index]), len(said), (), ())
        for model, own, said in zip(loaded, scores, sentences, strict=True)
    ]
    notes = [f"A sample of {len(rows)} of {len(found)} items."] if len(rows) < len(found) else []
    return Comparison(tuple(reports), tuple(dict.fromkeys(failed)), (*notes, *cut_note(cut)))


def _groups(found: Iterator[tuple[int, str, list[Look]]]) -> Iterator[list[tuple[int, str, list[Look]]]]:
    group: list[tuple[int, str, list[Look]]] = []
    size = 0
    for item in found:
        group.append(item)
        size += sum(look.bytes for look in item[2])
        if len(group) == _TOGETHER or size > BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
