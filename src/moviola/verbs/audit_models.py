"""The models under audit: those that read words, those with classes of their own, and what stands for one.

Axis letters: N items, C classes, K numbers that a model gives for a picture, B a batch.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import numpy as np

from moviola.media import on_white
from moviola.types import Dtype, UsageError, printable
from moviola.verbs.classify import ClassScorer, refuse_without_words
from moviola.verbs.common import resolve

if TYPE_CHECKING:
    from PIL import Image

    from moviola.clip.loaded import Model

Templates = tuple[str, ...]


@runtime_checkable
class PictureClassifier(Protocol):
    """What may be audited beside models: anything that names its classes and scores pictures for them.

    With a string `hash` that changes with its weights, its answers are kept for the next run.
    """

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...

    def classify_pictures(self, pictures: Sequence[Image.Image]) -> Any:
        """logits_NC, one row a picture and one column for each of `classes`."""
        ...


class Subject(ABC):
    """A model under audit. `key` names it for the cache, None where nothing is known that would."""

    kind: Literal["words", "classifier"]
    model: Model | None = None

    def __init__(self, name: str, key: str | None, source: Any) -> None:
        self.name, self.key, self.source = name, key, source
        self.notes: tuple[str, ...] = ()

    @abstractmethod
    def see(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """What is kept of each picture: raw_NK."""

    @abstractmethod
    def logits(self, raw_NK: np.ndarray, templates: Templates | None = None) -> np.ndarray:
        """logits_NC for the classes of the data; `templates` is for models that read words."""


class WithWords(Subject):
    """Knows the classes by words. Keeps vectors, so that any templates may be asked for later.

    A model that is not separable keeps its scores for every set of `sets` instead.
    """

    kind: Literal["words", "classifier"] = "words"
    model: Model

    def __init__(
        self,
        model: Model,
        classes: Sequence[str],
        sets: Sequence[Templates],
        *,
        batch_size: int,
        truncate: bool,
    ) -> None:
        parts: list[Any] = [model.hash, model.recipe.hash, str(model.dtype)]
        if not model.separable:
            parts += [list(classes), [list(one) for one in sets]]
        super().__init__(model.name, json.dumps(parts), model)
        self.model, self.classes = model, tuple(classes)
        self.batch_size, self.truncate = batch_size, truncate
        # now, so that a text that is too long is found before the pictures are looked at
        self._scorers = {templates: self._scorer(templates) for templates in sets}

    def see(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        if self.model.separable:
            return self.model.embed_pictures(pictures, batch_size=self.batch_size)
        return np.concatenate([self._scores(scorer, pictures) for scorer in self._scorers.values()], axis=1)

    def logits(self, raw_NK: np.ndarray, templates: Templates | None = None) -> np.ndarray:
        chosen = next(iter(self._scorers)) if templates is None else templates
        if not self.model.separable:
            first = list(self._scorers).index(chosen) * len(self.classes)
            return raw_NK[:, first : first + len(self.classes)]
        if chosen not in self._scorers:
            self._scorers[chosen] = self._scorer(chosen)
        return self._scorers[chosen].logits(raw_NK)

    def _scorer(self, templates: Templates) -> ClassScorer:
        return ClassScorer(
            self.model,
            self.classes,
            templates,
            batch_size=self.batch_size,
            frames=None,
            truncate=self.truncate,
        )

    def _scores(self, scorer: ClassScorer, pictures: Sequence[Image.Image]) -> np.ndarray:
        scores_NC = np.full((len(pictures), len(self.classes)), np.nan, np.float32)
        items = ((index, str(index), _lossless(picture)) for index, picture in enumerate(pictures))
        for group, logits_BC in scorer.over(items, on_skip=lambda index, one: None):
            scores_NC[[index for index, _, _ in group]] = logits_BC
        return scores_NC


class OwnClasses(Subject):
    """Scores classes of its own; those of the data are found among them by name."""

    kind: Literal["words", "classifier"] = "classifier"

    def __init__(
        self, source: PictureClassifier, classes: Sequence[str], parts: Sequence[str] | None
    ) -> None:
        own = [str(name) for name in source.classes or ()]
        super().__init__(str(source.name), None if parts is None else json.dumps([*parts, own]), source)
        self.width = len(own)
        self.column_C = _matched(self.name, own, classes)
        if len(own) > len(classes):
            self.notes = (f"{self.name}: its scores for {len(classes)} of its {len(own)} classes were used.",)

    def see(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        given = self.source.classify_pictures(pictures)
        if hasattr(given, "detach"):
            given = given.detach().float().cpu()
        logits_NC = np.asarray(given, np.float32)
        if logits_NC.shape != (len(pictures), self.width):
            raise UsageError(
                f"The classifier '{self.name}' gave scores of the shape {logits_NC.shape}, expected one row "
                f"for each of {len(pictures)} pictures and one column for each of its {self.width} classes."
            )
        return logits_NC

    def logits(self, raw_NK: np.ndarray, templates: Templates | None = None) -> np.ndarray:
        return raw_NK[:, self.column_C]


def subject(
    source: str | Path | Model | PictureClassifier,
    classes: Sequence[str],
    sets: Sequence[Templates],
    *,
    device: str,
    dtype: Dtype | None,
    batch_size: int,
    truncate: bool,
) -> Subject:
    """A model, or what stands for one, ready to be asked for `classes`."""
    from moviola.clip.loaded import Model as LoadedModel

    if not isinstance(source, str | Path | LoadedModel):
        if not isinstance(source, PictureClassifier):
            raise UsageError(
                f"A {type(source).__name__} cannot be audited.",
                hint="Give a model, its name or folder, or an object with name, classes, classify_pictures.",
            )
        known = getattr(source, "hash", None)
        return OwnClasses(source, classes, [known] if isinstance(known, str) else None)
    model = resolve(source, device=device, dtype=dtype, tokenizer=None)
    if model.adaptation == "classifier":
        parts = [model.hash, model.recipe.hash, str(model.dtype)]
        made: Subject = OwnClasses(cast(PictureClassifier, model), classes, parts)
        made.model = model
        return made
    refuse_without_words(model, "audit")
    return WithWords(model, classes, sets, batch_size=batch_size, truncate=truncate)


def _matched(name: str, own: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """For each class of the data the classifier's column: names are alike but for case, `_` and spaces."""

    def plain(text: str) -> str:
        return " ".join(text.replace("_", " ").casefold().split())

    if not own:
        raise UsageError(f"The classifier '{name}' names no classes.", hint="Give it `classes`.")
    column = {plain(one): index for index, one in enumerate(own)}
    if len(column) < len(own):
        twice = [one for one, count in Counter(map(plain, own)).items() if count > 1]
        raise UsageError(f"The classifier '{name}' names classes twice: {', '.join(twice[:5])}.")
    missing = [one for one in classes if plain(one) not in column]
    if missing:
        raise UsageError(
            f"The classifier '{name}' does not know {len(missing)} of {len(classes)} classes of the data: "
            f"{', '.join(map(printable, missing[:5]))}. Its classes: {', '.join(map(printable, own[:5]))}"
            f"{' ...' if len(own) > 5 else ''}.",
            hint="Classes are matched by name: rename the data's, or leave the others out.",
        )
    return np.array([column[plain(one)] for one in classes])


def _lossless(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    on_white(picture).save(out, "BMP")
    return out.getvalue()
