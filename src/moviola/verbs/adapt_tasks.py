"""`adapt_tasks`: a model that learns groups of classes one after the other, and what it forgets meanwhile.

Axis letters: N pictures.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moviola.clip.loaded import Model
from moviola.data.classes import ClassSet, Names, read_classes
from moviola.data.shots import split_rows
from moviola.data.templates import read_templates
from moviola.files import atomic
from moviola.parts.adapted import Adapted
from moviola.types import Refusal, UsageError
from moviola.verbs.adapt_methods import adaptation_of, options_for
from moviola.verbs.classify import refuse_without_words
from moviola.verbs.common import Progress, cache_folder, resolve
from moviola.verbs.task_report import TaskReport
from moviola.verbs.task_sequence import Exam, TaskSequence

REPORT = "report.json"
_SMALL = 50_000_000
"""Parameters below which the authors' learning rate, which is for ViT-B/32, teaches little."""


def adapt_tasks(
    data: str | Path | ClassSet,
    to: str | Path,
    *,
    method: str = "vr-lwf",
    model: str | Path | Model = "builtin",
    tasks: int | Sequence[Sequence[str]] = 5,
    unrelated: str | Path | ClassSet | None = None,
    shots: int | None = None,
    options: Mapping[str, Any] | None = None,
    names: Names | None = None,
    split: str | None = None,
    label_column: str | None = None,
    media_column: str | None = None,
    media_root: str | Path | None = None,
    templates: str | Path | Sequence[str] | None = None,
    held_out: float = 0.2,
    most_test: int | None = 2000,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    crop_area: tuple[float, float] = (0.75, 1.0),
    flip: float = 0.5,
    seed: int = 0,
    device: str = "auto",
    tokenizer: str | Path | None = None,
    cache: str | Path | Literal["auto"] | None = "auto",
    on_progress: Progress | None = None,
) -> TaskReport:
    """Teach a model one group of classes after the other, and measure after each what it still knows.

    >>> moviola.adapt_tasks("flowers/", "run", tasks=5, lr=1e-5, unrelated="pets/")  # doctest: +SKIP

    method     `vr-lwf`, or what it is compared with: `fine-tune`, `lwf`, `imm`, `geodl`, `a-gem`, `rkr`
    tasks      how many equal groups of the classes in their order, or the groups themselves by name; 1
               teaches all classes at once
    unrelated  labelled pictures of classes that are never learned: zero-shot accuracy before and after
               each task, on at most `most_test` of them
    shots      pictures of each class to learn from, drawn by hash of `seed`; the others are measured on,
               at most `most_test`. None: all but a share `held_out` of each class
    options    of the method: `alpha`, `part`, `above`, `n_pseudo` ...
    steps ...  of each task; the defaults are the authors' recipe. Their rate of 1e-6 is for ViT-B/32
    cache      where the unchanged model's vectors are kept (`auto`: the user's cache folder; None: nowhere)

    `to` then holds `model/`, a plain model for every verb; `report.json`, `matrix.png` and `run/`. A killed
    call goes on where it was, at the step, when it is made again.
    """
    slug, adaptation = adaptation_of(method)
    if slug not in adaptation.sequence:
        raise UsageError(
            f"{slug} does not learn one task after the other.",
            hint="Use moviola.adapt, or one of: vr-lwf, lwf, fine-tune.",
        )
    make = adaptation.sequence[slug]
    mine = options_for({"method": make}, options or {}, slug)["method"]
    loaded = resolve(model, device=device, dtype=None, tokenizer=tokenizer)
    _check_model(loaded)
    columns = {"label_column": label_column, "media_column": media_column, "media_root": media_root}
    if isinstance(data, ClassSet):
        if any(value is not None for value in (split, names, *columns.values())):
            raise UsageError("split, names, columns and media_root belong to read_classes here.")
        found = data
    else:
        found = read_classes(data, split=split, names=names, **columns)  # type: ignore[arg-type]
    groups = task_groups(found, tasks)
    learned = relabelled(found, groups)
    other = read_classes(unrelated) if isinstance(unrelated, str | Path) else unrelated
    chosen = split_rows(
        learned.labels_N,
        learned.classes,
        shots=shots,
        seed=seed,
        held_out=held_out,
        most_test=most_test,
        without=np.flatnonzero(learned.labels_N < 0).tolist(),
    )
    place = cache_folder("features") if cache == "auto" else cache
    sentences = read_templates(templates)
    report = TaskSequence(
        Path(to),
        method=slug,
        make=make,
        options=mine,
        base=loaded,
        data=learned,
        groups=groups,
        rows=chosen.train,
        templates=sentences,
        exam=Exam(learned, chosen.test, groups, other, sentences, most_test, place),
        recipe=adaptation.recipe,
        settings={"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr},
        shown={"crop_area": crop_area, "flip": flip},
        seed=seed,
        on_progress=on_progress,
    ).run([*_notes(found, groups, other, loaded, lr), *chosen.notes])
    with atomic(Path(to) / REPORT) as file:
        file.write(json.dumps(report.to_json(), indent=1, ensure_ascii=False).encode("utf-8", "replace"))
    return report


def read_tasks(text: str) -> int | list[list[str]]:
    """Tasks as they are typed: `5`, or the classes of each, as in `cat, dog; car, truck`.

    >>> read_tasks("cat, dog; car, truck")
    [['cat', 'dog'], ['car', 'truck']]
    """
    if text.strip().isdecimal():
        return int(text)
    return [[name.strip() for name in group.split(",") if name.strip()] for group in text.split(";")]


def task_groups(data: ClassSet, tasks: int | Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The class names of each task; `UsageError` where a class is named twice or not there."""
    if data.repeated:
        raise UsageError(
            f"Names are given to more than one class: {', '.join(data.repeated[:5])}.",
            hint="Give each its own name with names= (--classes).",
        )
    if isinstance(tasks, int):
        count = len(data.classes)
        if tasks < 1 or count % tasks:
            raise UsageError(
                f"{count} classes cannot be shared evenly by {tasks} tasks.",
                hint="Use a number that divides them, or name each task's classes.",
            )
        size = count // tasks
        groups = [data.classes[start : start + size] for start in range(0, count, size)]
    else:
        groups = [(group,) if isinstance(group, str) else tuple(group) for group in tasks]
    if not groups or not all(groups):
        raise UsageError("Every task needs at least one class.", hint="Leave empty tasks out.")
    ordered = [name for group in groups for name in group]
    twice = sorted({name for name in ordered if ordered.count(name) > 1})
    if twice:
        raise UsageError(f"The tasks repeat classes: {', '.join(twice[:5])}.", hint="Name each class once.")
    foreign = [name for name in ordered if name not in data.classes]
    if foreign:
        raise UsageError(
            f"{len(foreign)} classes of the tasks are not there: {', '.join(foreign[:5])}. There are: "
            f"{', '.join(data.classes[:8])}{', ...' if len(data.classes) > 8 else ''}."
        )
    if len(ordered) < 2:
        raise UsageError("There is one class only, so there is nothing to tell apart.")
    return tuple(groups)


def relabelled(data: ClassSet, groups: Sequence[Sequence[str]]) -> ClassSet:
    """The same pictures with the classes numbered in the order of the tasks; -1 for those left out."""
    made = copy.copy(data)
    made.classes = tuple(name for group in groups for name in group)
    number = {name: index for index, name in enumerate(made.classes)}
    made.labels_N = np.array([number.get(name, -1) for name in data.classes], np.int64)[data.labels_N]
    return made


def _check_model(model: Model) -> None:
    refuse_without_words(model, "adapt_tasks")
    if not model.separable or isinstance(model.module, Adapted) or not hasattr(model.module, "logit_scale"):
        raise Refusal(
            f"The model '{model.name}' is no pair of towers that can be trained as a whole.",
            hint="Use a CLIP, or the base model of an adapted one.",
        )
    if model.dtype != torch.float32:
        raise UsageError(f"Training needs float32, and the model is {model.dtype}.", hint="Load it so.")
    if model.tokenizer is None:
        raise UsageError(f"The model '{model.name}' has no tokenizer.", hint="Name its file: tokenizer=PATH.")


def _notes(
    data: ClassSet,
    groups: Sequence[Sequence[str]],
    other: ClassSet | None,
    model: Model,
    lr: float | None,
) -> list[str]:
    ordered = {name for group in groups for name in group}
    notes = []
    if len(ordered) < len(data.classes):
        notes.append(f"{len(data.classes) - len(ordered)} of {len(data.classes)} classes are in no task.")
    shared = [] if other is None else [name for name in other.classes if name in ordered]
    if shared:
        notes.append(f"Classes that are called unrelated are learned, too: {', '.join(shared[:5])}.")
    if other is None:
        notes.append("No unrelated classes were named: what else the model forgot was not measured.")
    if lr is None and model.parameters < _SMALL:
        notes.append(
            "The authors' learning rate is for ViT-B/32; a model as small as this needs a larger lr."
        )
    return notes
