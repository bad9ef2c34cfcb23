"""`classify`: which of the given classes a picture or a video shows, by the words for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from moviola.data.templates import read_templates
from moviola.types import Clip, Dtype, MediaKind, Refusal, UsageError, printable
from moviola.verbs.common import (
    Item,
    Look,
    Progress,
    Skipped,
    classify_media,
    counting_cuts,
    cut_note,
    embed_media,
    resolve,
    score_media,
    summary,
)
from moviola.verbs.embed import read_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from moviola.clip.loaded import Model


Head = Literal["words", "own"]


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its probability among the classes given."""

    name: str
    probability: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "probability": round(self.probability, 6)}


@dataclass(frozen=True, slots=True)
class Classified:
    """One file and its most probable classes, best first."""

    file: str
    kind: MediaKind
    labels: tuple[Label, ...]

    @property
    def best(self) -> Label:
        return self.labels[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "kind": self.kind,
            "classes": [label.to_json() for label in self.labels],
        }


class NothingClassified(UsageError):
    """Not one file could be classified; `failed` says why."""

    def __init__(self, problem: str, failed: Sequence[Skipped], *, hint: str | None = None) -> None:
        super().__init__(problem, hint=hint)
        self.failed = tuple(failed)


@dataclass(frozen=True)
class Classification:
    """The result of `classify`: a line per file, what could not be read, and notes for the reader."""

    results: tuple[Classified, ...]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    model: str
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "results": [one.to_json() for one in self.results],
            "classes": list(self.classes),
            "templates": list(self.templates),
            "model": self.model,
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Cells for a table: file, then each class with its probability."""
        return [
            (printable(one.file), *(f"{label.name} {label.probability:.1%}" for label in one.labels))
            for one in self.results
        ]

    def __str__(self) -> str:
        lines = ["  ".join(row) for row in self.rows()]
        return "\n".join([*lines, *self.notes, *summary(self.failed, "could not be read")])


def classify(
    model: str | Path | Model,
    files: str | Path | Sequence[str | Path],
    classes: str | Path | Sequence[str] | None = None,
    *,
    templates: str | Path | Sequence[str] | None = None,
    k: int = 5,
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 32,
    frames: int | None = None,
    head: Head | None = None,
    truncate: bool = False,
    on_progress: Progress | None = None,
) -> Classification:
    """The `k` most probable of `classes` for every picture and video under `files`.

    classes    names; or one string with commas between them; or a `Path` to a file with one a line.
               None takes those stored with the model
    templates  a set (`simple`, `general`, `video`), a file, or sentences with `{}` for the class;
               the class vector is the mean over all of them
    frames     frames that make a video's vector where the model takes any number (12)
    head       `own`: the model's own classifier, of the classes it learned; `words`: the words for any
               classes. None: its own where it has nothing else

    Probabilities are the softmax over the classes of the logit scale times the cosine, or of the
    model's own score (the mean over templates) where it is not separable. They say which of these
    classes fits best, not whether any does. A file that cannot be read stands in `failed`;
    `NothingClassified` if none could.
    """
    from moviola.media import walk

    if k < 1:
        raise UsageError(f"k must be at least 1, got {k}.", hint="Ask for one class or more.")
    loaded = resolve(model, device=device, dtype=dtype, tokenizer=tokenizer)
    own = choose_head(loaded, head) == "own"
    sentences = class_templates(loaded, templates, "classify", own=own)
    names = class_names(loaded.classes if classes is None else classes)
    failed: list[Skipped] = []
    found = list(walk(files, on_skip=lambda path, reason: failed.append(Skipped(str(path), reason))))
    done = len(failed)
    total = done + len(found)

    def tell(steps: int, note: str) -> None:
        nonlocal done
        done += steps
        if on_progress is not None:
            on_progress(done, total, note)

    def skip(index: int, one: Skipped) -> None:
        failed.append(one)
        tell(1, one.path)

    items = ((index, str(one.path), Clip(one.path)) for index, one in enumerate(found))
    results = []
    with counting_cuts() as cut:
        scorer = ClassScorer(
            loaded, names, sentences, batch_size=batch_size, frames=frames, truncate=truncate, own=own
        )
    for group, logits_NC in scorer.over(items, on_skip=skip):
        for (_, name, look), logits_C in zip(group, logits_NC, strict=True):
            results.append(Classified(name, look.kind, _ranked(logits_C, names, k)))
        tell(len(group), group[-1][1])
    if not results:
        raise NothingClassified(
            f"Nothing was classified: none of the {len(failed)} files could be read. The first: {failed[0]}."
            if failed
            else "Nothing was classified: there are no pictures or videos under the given paths.",
            failed,
            hint=None if failed else "Name files like .jpg or .mp4, or a folder that holds some.",
        )
    notes = ["There is only one class, so its probability is always 1."] if len(names) == 1 else []
    notes += cut_note(cut)
    return Classification(tuple(results), names, sentences, loaded.name, tuple(failed), tuple(notes))


class ClassScorer:
    """Logits of media for classes described by words, which are encoded once; or the model's own logits.

    A model that is a classifier knows its classes by name: asked for some of them, it gives those.
    """

    def __init__(
        self,
        model: Model,
        classes: Sequence[str],
        templates: Sequence[str],
        *,
        batch_size: int,
        frames: int | None,
        truncate: bool = False,
        own: bool | None = None,
    ) -> None:
        own = model.adaptation == "classifier" if own is None else own
        self.model, self.batch_size, self.frames = model, batch_size, frames
        self.templates = len(templates)
        if frames is not None and frames < 1:
            raise UsageError(f"A video's vector needs at least one frame, got frames={frames}.")
        if batch_size < 1:
            raise UsageError(f"The batch size must be at least 1, got {batch_size}.")
        self.own = _own_columns(model, classes) if own else None
        if self.own is not None:
            self.text_ND = np.empty((0, model.dim), np.float32)
        elif model.separable:
            self.text_ND = model.embed_prompts(classes, templates, truncate=truncate)
        else:  # one row per class and template: scores are averaged, since vectors need not be
            prompts = [template.replace("{}", name) for name in classes for template in templates]
            self.text_ND = model.embed_queries(prompts, truncate=truncate)

    def over(
        self, items: Iterable[Item], *, on_skip: Callable[[int, Skipped], None]
    ) -> Iterator[tuple[list[tuple[int, str, Look]], np.ndarray]]:
        """The items of a batch, and their logits_NC."""
        if self.own is not None:
            for group, logits_NC in classify_media(
                self.model, items, batch_size=self.batch_size, frames=self.frames, on_skip=on_skip
            ):
                yield group, logits_NC[:, self.own]
            return
        if self.model.separable:
            for group, vectors_ND in embed_media(
                self.model, items, batch_size=self.batch_size, frames=self.frames, on_skip=on_skip
            ):
                yield group, self.logits(vectors_ND)
            return
        for group, scores_PN in score_media(
            self.model,
            self.text_ND,
            items,
            batch_size=self.batch_size,
            frames=self.frames,
            on_skip=on_skip,
        ):
            scores_CKN = scores_PN.reshape(-1, self.templates, scores_PN.shape[1])
            yield group, scores_CKN.mean(axis=1).T

    def logits(self, vectors_ND: np.ndarray) -> np.ndarray:
        """logits_NC of unit vectors, for a separable model."""
        return self.model.logit_scale * vectors_ND @ self.text_ND.T


def class_names(classes: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """Checked names: at least one, none empty, none twice."""
    if classes is None:
        raise UsageError(
            "The model stores no class names.", hint='Name them: classes="cat, dog" (--classes "cat, dog").'
        )
    if isinstance(classes, str):
        names = [name.strip() for name in classes.split(",")]
    elif isinstance(classes, Path):
        names = read_lines(classes)
    else:
        names = [str(name).strip() for name in classes]
    if not names or names == [""]:
        raise UsageError("There are no classes.", hint='Name them: --classes "cat, dog"')
    if "" in names:
        raise UsageError(
            f"Class {names.index('') + 1} of {len(names)} has an empty name.",
            hint="Is there a comma too many?",
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"Classes are named twice: {', '.join(twice[:5])}.", hint="Leave one of each out.")
    return tuple(names)


def _own_columns(model: Model, classes: Sequence[str]) -> list[int]:
    """Where a classifier keeps these classes."""
    known = {name: index for index, name in enumerate(model.classes or ())}
    missing = [name for name in classes if name not in known]
    if missing:
        shown = ", ".join(list(known)[:5]) + (", ..." if len(known) > 5 else "")
        raise UsageError(
            f"The classifier '{model.name}' does not know {len(missing)} of the {len(classes)} classes: "
            f"{', '.join(missing[:5])}. It tells apart: {shown}.",
            hint="Name classes it knows, or use its base model with words.",
        )
    return [known[name] for name in classes]


def choose_head(model: Model, head: Head | None) -> Head:
    """Whether the model's own classifier decides, or words. Raises `Refusal` for one it has not."""
    if head is None:
        return "own" if model.adaptation == "classifier" else "words"
    if head not in get_args(Head):
        raise UsageError(f"The head is {' or '.join(get_args(Head))}, got {head!r}.")
    if head == "own" and not model.has_head:
        raise Refusal(
            f"The model '{model.name}' has no classifier of its own: it compares with words.",
            hint="Leave the head out, or train one: moviola train --task recognition --objective m2-clip ...",
        )
    return head


def class_templates(
    model: Model, templates: str | Path | Sequence[str] | None, verb: str, *, own: bool | None = None
) -> tuple[str, ...]:
    """The sentences to put class names into: none for a classifier of the model's own.

    Raises `Refusal` for models that have neither words nor a classifier.
    """
    if not (model.adaptation == "classifier" if own is None else own):
        refuse_without_words(model, verb)
        return read_templates(templates)
    if templates is not None:
        raise UsageError(
            f"The model '{model.name}' classifies by a classifier of its own, which reads no templates.",
            hint="Leave the templates out, or use its base model.",
        )
    return ()


def refuse_without_words(model: Model, verb: str) -> None:
    """Refuse models that cannot compare media with words."""
    if not model.has_text:
        raise Refusal(
            f"The model '{model.name}' has no text tower, so {verb} cannot tell it the classes in words.",
            hint="Use a model with text.",
        )
    if model.adaptation == "classifier":
        raise Refusal(
            f"The model '{model.name}' classifies by a classifier of its own, "
            f"and {verb} compares media with words.",
            hint="Use its base model.",
        )


def _ranked(logits_C: np.ndarray, names: Sequence[str], k: int) -> tuple[Label, ...]:
    shifted_C = np.exp(logits_C.astype(np.float64) - logits_C.max())
    probability_C = shifted_C / shifted_C.sum()
    order = np.argsort(-logits_C, kind="stable")[:k]
    return tuple(Label(names[index], float(probability_C[index])) for index in order)
