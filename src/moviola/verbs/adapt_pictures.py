"""The pictures that a model is adapted to: which are learned from, their vectors, and the figures.

Axis letters: N pictures, D embedding width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moviola.clip.loaded import Model, unit
from moviola.data.class_pictures import ClassPictures
from moviola.data.classes import ClassSet, read_classes
from moviola.data.media_set import MediaSet, file_stream
from moviola.data.shots import Split, split_rows
from moviola.media import walk
from moviola.metrics.classification import mean_class_accuracy, topk_accuracy
from moviola.parts.linear_head import LinearHead
from moviola.types import Clip, LabelField, Needs, PictureField, Refusal, UsageError, printable
from moviola.verbs.classify import ClassScorer
from moviola.verbs.common import Progress, Skipped
from moviola.verbs.set_reader import SetReader


@dataclass(frozen=True)
class Augmented:
    """So many random crops of every picture instead of the picture itself."""

    passes: int
    crop_area: tuple[float, float]
    flip: float


class Work:
    """The base model over pictures by class. Those that cannot be read are found before they are needed.

    `failed` lists them. Raises `Refusal` for models whose pictures have no vector to adapt.
    """

    def __init__(
        self,
        model: Model,
        data: MediaSet,
        classes: Sequence[str],
        templates: Sequence[str],
        *,
        frames: int | None,
        cache: Path | None,
        on_progress: Progress | None,
    ) -> None:
        if not model.separable or model.adaptation == "classifier":
            what = "is a classifier already" if model.separable else "has no single vector per picture"
            raise Refusal(
                f"The model '{model.name}' {what}, so it cannot be adapted.", hint="Adapt its base model."
            )
        self.model, self.data, self.classes, self.templates = model, data, tuple(classes), templates
        self.frames, self.cache, self.on_progress = frames, cache, on_progress
        self.failed = [Skipped(*one) for one in data.skipped] if isinstance(data, ClassSet) else []
        self._seen: dict[int, np.ndarray] = {}

    @property
    def labelled(self) -> ClassSet:
        assert isinstance(self.data, ClassSet)
        return self.data

    def split(self, *, shots: int | None, seed: int, held_out: float, most_test: int | None) -> Split:
        """Rows that can be read, to learn from and to measure on."""
        bad: set[int] = set()
        while True:
            chosen = split_rows(
                self.labelled.labels_N,
                self.classes,
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

    def all_vectors(self) -> np.ndarray:
        """Unit vectors_ND of every item that can be read."""
        return self._read(self.data, range(len(self.data)))[1]

    def _read(self, data: MediaSet, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
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
        return np.stack([self._seen[int(row)] for row in rows]), self.labelled.labels_N[rows]

    def augmented(
        self, rows: np.ndarray, asked: Augmented, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Unit vectors_ND of random crops, labels_N, and which row each is of: one pass after the other."""
        needs = Needs((PictureField(), LabelField()))
        pictures = ClassPictures(
            self.labelled, rows, needs, recipe=self.model.recipe, crop_area=asked.crop_area, flip=asked.flip
        )
        module, made = self.model.module, []
        for done in range(asked.passes):
            for chunk in np.array_split(np.arange(len(pictures)), max(1, len(pictures) // 32)):
                batch = pictures.batch(chunk, seed=seed, epoch=done, step=0)
                with torch.inference_mode():
                    pixels_NCHW = batch["image"].to(self.model.device, self.model.dtype)
                    made.append(module.encode_image(pixels_NCHW).float().cpu().numpy())  # type: ignore[operator]
            if self.on_progress is not None:
                self.on_progress(done + 1, asked.passes, "random crops")
        labels_N = np.tile(pictures.labels_N, asked.passes)
        return unit(np.concatenate(made)), labels_N, np.tile(pictures.rows_N, asked.passes)

    def text_CD(self, method: str) -> np.ndarray:
        """Unit vectors of the class names; zeros of a model without words where the method needs none."""
        if self.model.has_text:
            return self.model.embed_prompts(self.classes, self.templates)
        if method in ("linear-probe", "nearest-mean"):
            return np.zeros((len(self.classes), self.model.dim), np.float32)
        raise Refusal(
            f"The model '{self.model.name}' has no text tower, and {method} uses the words of the classes.",
            hint="Use linear-probe or nearest-mean, or a model with text.",
        )

    def measure(
        self, adapted: Model, rows: np.ndarray, other: ClassSet | None
    ) -> tuple[dict[str, float], dict[str, float], int]:
        """Zero-shot figures of the base, the adapted model's, and on how many pictures."""
        if other is None:
            if not len(rows):
                return {}, {}, 0
            data, index_N = self.labelled, rows
            vectors_ND, labels_N = self.vectors(rows)
        else:
            data = other
            index_N, vectors_ND = self._read(other, range(len(other)))
            labels_N = other.labels_N[index_N]
        before = {}
        if self.model.has_text:
            text_CD = self.model.embed_prompts(adapted.classes or self.classes, self.templates)
            before = _figures(vectors_ND @ text_CD.T, labels_N)
        module: Any = adapted.module
        if hasattr(module, "classify_vectors"):
            head = LinearHead(module.weight_DC.float().cpu().numpy(), module.bias_C.float().cpu().numpy())
            return before, _figures(head.logits(vectors_ND), labels_N), len(labels_N)
        templates = () if adapted.adaptation == "classifier" else self.templates
        scorer = ClassScorer(adapted, self.classes, templates, batch_size=32, frames=self.frames)
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


def test_set(test: str | Path | ClassSet, classes: Sequence[str], media_root: str | Path | None) -> ClassSet:
    """The pictures to measure on, their classes in the order of those learned."""
    found = test if isinstance(test, ClassSet) else read_classes(test, media_root=media_root)
    known = {name: index for index, name in enumerate(classes)}
    foreign = [name for name in found.classes if name not in known]
    if foreign:
        raise UsageError(
            f"{len(foreign)} classes of the pictures to measure on are not among those to learn: "
            f"{', '.join(foreign[:5])}.",
            hint="Both sets need the same class names.",
        )
    mapped = copy.copy(found)
    mapped.classes = tuple(classes)
    mapped.labels_N = np.array([known[found.classes[label]] for label in found.labels_N.tolist()], np.int64)
    return mapped


def unlabelled_set(source: str | Path) -> MediaSet:
    """Every picture and video under a folder, whatever folders it is sorted into."""
    clips = [Clip(found.path) for found in walk(source)]
    if not clips:
        raise UsageError(f"There are no pictures or videos under {printable(source)}.")
    ids = [str(clip.path) for clip in clips]
    return MediaSet(Path(source), ids, file_stream(clips, ids), [clip.path for clip in clips])
