"""The pictures that a model is adapted to: which are learned from, their vectors, and the figures.

Axis letters: N pictures, D embedding width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moviola.clip.loaded import Model
from moviola.data.classes import ClassSet, read_classes
from moviola.data.shots import Split, split_rows
from moviola.metrics.classification import mean_class_accuracy, topk_accuracy
from moviola.parts.linear_head import LinearHead
from moviola.types import Refusal, UsageError
from moviola.verbs.classify import ClassScorer
from moviola.verbs.common import Progress, Skipped
from moviola.verbs.set_reader import SetReader


class Work:
    """The base model over pictures by class. Those that cannot be read are found before they are needed.

    `failed` lists them. Raises `Refusal` for models whose pictures have no vector to adapt.
    """

    def __init__(
        self,
        model: Model,
        data: ClassSet,
        templates: Sequence[str],
        frames: int | None,
        cache: Path | None,
        on_progress: Progress | None,
    ) -> None:
        if not model.separable or model.adaptation == "classifier":
            what = "is a classifier already" if model.separable else "has no single vector per picture"
            raise Refusal(
                f"The model '{model.name}' {what}, so it cannot be adapted.", hint="Adapt its base model."
            )
        self.model, self.data, self.templates = model, data, templates
        self.frames, self.cache, self.on_progress = frames, cache, on_progress
        self.failed: list[Skipped] = [Skipped(*one) for one in data.skipped]
        self._seen: dict[int, np.ndarray] = {}

    def split(self, *, shots: int | None, seed: int, held_out: float, most_test: int | None) -> Split:
        """Rows that can be read, to learn from and to measure on."""
        bad: set[int] = set()
        while True:
            chosen = split_rows(
                self.data.labels_N,
                self.data.classes,
                shots=shots,
                seed=seed,
                held_out=held_out,
                most_test=most_test,
                without=bad,
            )
            rows = [int(row) for row in np.concatenate([chosen.train, chosen.test]) if row not in self._seen]
            if not rows:
                return chosen
            index_N, vectors_ND = self._read(self.data, rows)
            self._seen.update(zip(index_N.tolist(), vectors_ND, strict=True))
            bad |= set(rows) - set(index_N.tolist())

    def _read(self, data: ClassSet, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return SetReader(
            self.model,
            data,
            sorted(rows),
            frames=self.frames,
            cache=self.cache,
            failed=self.failed,
            on_progress=self.on_progress,
        ).vectors()

    def vectors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors_ND and labels_N of rows that were split off."""
        return np.stack([self._seen[int(row)] for row in rows]), self.data.labels_N[rows]

    def text_CD(self, method: str) -> np.ndarray:
        """Unit vectors of the class names; zeros of a model without words where the method needs none."""
        if self.model.has_text:
            return self.model.embed_prompts(self.data.classes, self.templates)
        if method in ("linear-probe", "nearest-mean"):
            return np.zeros((len(self.data.classes), self.model.dim), np.float32)
        raise Refusal(
            f"The model '{self.model.name}' has no text tower, and {method} uses the words of the classes.",
            hint="Use linear-probe or nearest-mean, or a model with text.",
        )

    def measure(
        self, adapted: Model, rows: np.ndarray | None, other: ClassSet | None
    ) -> tuple[dict[str, float], dict[str, float], int]:
        """Zero-shot figures of the base, the adapted model's, and on how many pictures."""
        if other is None:
            assert rows is not None
            if not len(rows):
                return {}, {}, 0
            data, index_N = self.data, rows
            vectors_ND, labels_N = self.vectors(rows)
        else:
            data = other
            index_N, vectors_ND = self._read(other, range(len(other)))
            labels_N = other.labels_N[index_N]
        before = {}
        if self.model.has_text:
            text_CD = self.model.embed_prompts(self.data.classes, self.templates)
            before = _figures(vectors_ND @ text_CD.T, labels_N)
        module: Any = adapted.module
        if hasattr(module, "classify_vectors"):
            head = LinearHead(module.weight_DC.float().cpu().numpy(), module.bias_C.float().cpu().numpy())
            return before, _figures(head.logits(vectors_ND), labels_N), len(labels_N)
        templates = () if adapted.adaptation == "classifier" else self.templates
        scorer = ClassScorer(adapted, self.data.classes, templates, batch_size=32, frames=self.frames)
        reader = SetReader(adapted, data, index_N.tolist(), frames=self.frames, on_progress=self.on_progress)
        seen_N, scores_NC = reader.scores(scorer)
        return before, _figures(scores_NC, data.labels_N[seen_N]), len(seen_N)


def _figures(scores_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    return {
        "top-1": topk_accuracy(scores_NC, labels_N, (1,))["top1"],
        "mean per class": mean_class_accuracy(scores_NC, labels_N),
    }


def check_classes(data: ClassSet) -> None:
    if data.repeated:
        raise UsageError(
            f"{len(data.repeated)} names are given to more than one class: {', '.join(data.repeated[:5])}.",
            hint="Give each its own name with names= (--classes).",
        )
    if len(data.classes) < 2:
        raise UsageError(
            f"There is one class only ({data.classes[0]}), so there is nothing to tell apart.",
            hint="Add a folder for each other class.",
        )


def test_set(test: str | Path | ClassSet, data: ClassSet, media_root: str | Path | None) -> ClassSet:
    """The pictures to measure on, their classes in the order of those learned."""
    found = test if isinstance(test, ClassSet) else read_classes(test, media_root=media_root)
    known = {name: index for index, name in enumerate(data.classes)}
    foreign = [name for name in found.classes if name not in known]
    if foreign:
        raise UsageError(
            f"{len(foreign)} classes of the pictures to measure on are not among those to learn: "
            f"{', '.join(foreign[:5])}.",
            hint="Both sets need the same class names.",
        )
    mapped = copy.copy(found)
    mapped.classes = data.classes
    mapped.labels_N = np.array([known[found.classes[label]] for label in found.labels_N.tolist()], np.int64)
    return mapped
