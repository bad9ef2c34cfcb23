"""`adapt`: a frozen model made to know the user's own classes, from a few pictures of each.

Axis letters: N pictures, D embedding width, C classes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moviola.clip.loaded import Model
from moviola.data.classes import ClassSet, Names, read_classes
from moviola.data.media_set import MediaSet
from moviola.data.shots import Split
from moviola.data.templates import read_templates
from moviola.files import atomic
from moviola.parts.linear_head import HeadConfig, LinearHead
from moviola.systems.registry import model_class
from moviola.types import Adaptation, UsageError, printable
from moviola.verbs.adapt_methods import adaptation_of, options_for
from moviola.verbs.adapt_pictures import Augmented, Work, check_classes, test_set, unlabelled_set
from moviola.verbs.adapt_train import keep_curves, run_folder, train_adaptation
from moviola.verbs.classify import class_names
from moviola.verbs.common import Progress, Skipped, cache_folder, resolve, summary
from moviola.verbs.load import base_card

REPORT = "adapt.json"


@dataclass(frozen=True)
class AdaptReport:
    """An adapted model and what it is worth: top-1 in percent on pictures it did not learn from.

    kind    `classifier`: it classifies by itself; `embedding`: its vectors changed, so it searches too
    before  the base model's zero-shot figures on the same pictures; empty for a model without words
    after   the adapted model's; both empty where no picture was left to measure on
    """

    folder: Path
    method: str
    model: str
    kind: Literal["none", "classifier", "embedding"]
    classes: tuple[str, ...]
    shots: int | None
    learned_from: int
    measured_on: int
    before: dict[str, float]
    after: dict[str, float]
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.folder),
            "method": self.method,
            "base": self.model,
            "kind": self.kind,
            "classes": list(self.classes),
            "shots": self.shots,
            "learned_from": self.learned_from,
            "measured_on": self.measured_on,
            "before": {name: round(value, 4) for name, value in self.before.items()},
            "after": {name: round(value, 4) for name, value in self.after.items()},
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method} on {self.model}: {len(self.classes)} classes, learned from {self.learned_from} "
            f"pictures, measured on {self.measured_on} others."
        ]
        for name, value in self.after.items():
            told = f", {self.before[name]:.1f} zero-shot before" if name in self.before else ""
            lines.append(f"{name}: {value:.1f} %{told}")
        lines += [*self.notes, *summary(self.failed, "could not be read")]
        use = {
            "classifier": f"moviola classify {printable(self.folder)} FILES",
            "embedding": f"moviola index PATHS --model {printable(self.folder)} --to INDEX",
        }.get(self.kind, "")
        return "\n".join([*lines, f"Model: {printable(self.folder)}", *([f"Use it: {use}"] if use else [])])


def adapt(
    data: str | Path | ClassSet,
    to: str | Path,
    *,
    method: str,
    model: str | Path | Model = "builtin",
    shots: int | None = None,
    options: Mapping[str, Any] | None = None,
    test: str | Path | ClassSet | None = None,
    unlabelled: bool = False,
    new_classes: str | Sequence[str] | None = None,
    names: Names | None = None,
    split: str | None = None,
    label_column: str | None = None,
    media_column: str | None = None,
    media_root: str | Path | None = None,
    templates: str | Path | Sequence[str] | None = None,
    held_out: float = 0.2,
    most_test: int | None = 2000,
    passes: int = 0,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    crop_area: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    seed: int = 0,
    device: str = "auto",
    tokenizer: str | Path | None = None,
    frames: int | None = None,
    cache: str | Path | Literal["auto"] | None = "auto",
    on_progress: Progress | None = None,
) -> AdaptReport:
    """Adapt a frozen model to the classes of a folder (one folder per class) or a table.

    >>> moviola.adapt("flowers/", "flowers-model", method="gda-clip", shots=16)      # doctest: +SKIP

    method     `linear-probe`, `nearest-mean`, or a system that adapts: `gda-clip`, `maple`, `gopro`
    shots      pictures of each class to learn from, drawn by hash of `seed`; the others are measured on,
               at most `most_test`. None: all but a share `held_out`
    test       other labelled pictures to measure on, with the same classes
    options    of the method
    passes     methods on frozen vectors learn from so many random crops of each picture (0: the picture)
    unlabelled `data` is any folder of pictures, and `names` are the classes to find in it (gda-clip)
    new_classes  names of classes that have no pictures (gda-clip)
    templates  sentences that class names stand in, for zero-shot figures and methods that use them
    epochs ... the recipe of methods that train; `crop_area` and `flip` are of random crops
    cache      where vectors of the frozen model are kept (`auto`: the user's cache folder; None: nowhere)

    The folder `to` is a model: `moviola.load(to)` finds its base by name and checks its hash. Methods
    that train can be killed at any point; the same call goes on. Pictures that cannot be read are
    replaced by others of their class where there are any.
    """
    slug, adaptation = adaptation_of(method)
    if adaptation.sequence:
        raise UsageError(
            f"{slug} learns a sequence of tasks.", hint="Say how many: moviola adapt --tasks 5 (adapt_tasks)."
        )
    folder = Path(to)
    _check_folder(folder)
    loaded = resolve(model, device=device, dtype=None, tokenizer=tokenizer)
    found: MediaSet
    if unlabelled:
        found, classes = unlabelled_set(data), class_names(names)  # type: ignore[arg-type]
    else:
        found = (
            data
            if isinstance(data, ClassSet)
            else read_classes(
                data,
                split=split,
                names=names,
                label_column=label_column,
                media_column=media_column,
                media_root=media_root,
            )
        )
        classes = found.classes
        check_classes(found)
    place = cache_folder("features") if cache == "auto" else cache
    work = Work(
        loaded,
        found,
        classes,
        read_templates(templates),
        frames=frames,
        cache=None if place is None else Path(place),
        on_progress=on_progress,
    )
    other = None if test is None else test_set(test, classes, media_root)
    asked = dict(options or {})
    chosen = Split(np.empty(0, np.int64), np.empty(0, np.int64))
    if not unlabelled:
        chosen = work.split(shots=shots, seed=seed, held_out=0 if other else held_out, most_test=most_test)
    if adaptation.fit is not None:
        augmented = Augmented(passes, crop_area, flip) if passes else None
        made = _fitted(slug, adaptation, work, None if unlabelled else chosen, asked, augmented, seed)
        if new_classes is not None:
            made = _extended(slug, adaptation, work, made, class_names(new_classes))
    elif unlabelled or new_classes is not None:
        raise UsageError(f"{slug} learns from labelled pictures, and knows new classes by name already.")
    else:
        made = _trained(
            slug,
            adaptation,
            work,
            chosen,
            folder,
            options=asked,
            settings={"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr},
            crop_area=crop_area,
            flip=flip,
            seed=seed,
        )
    notes = [*chosen.notes, *made.notes]
    before, after, measured = work.measure(made.model, chosen.test, other)
    if not measured:
        notes.append("Nothing was left to measure on: name labelled pictures with test= (--test).")
    adapted = made.model
    adapted.base = _base(loaded, folder)
    adapted.save(folder)
    if adaptation.start is not None:
        notes += keep_curves(run_folder(folder), folder)
        shutil.rmtree(run_folder(folder))
    report = AdaptReport(
        folder=folder,
        method=slug,
        model=loaded.name,
        kind=adapted.adaptation,
        classes=tuple(adapted.classes or ()),
        shots=shots,
        learned_from=made.learned_from,
        measured_on=measured,
        before=before,
        after=after,
        failed=tuple(work.failed),
        notes=tuple(notes),
    )
    with atomic(folder / REPORT) as file:
        file.write(json.dumps(report.to_json(), indent=1, ensure_ascii=False).encode("utf-8", "replace"))
    return report


# --------------------------------------------------------------------------------------------------
# The two ways to make one
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    model: Model
    learned_from: int
    notes: tuple[str, ...] = ()
    head: Any = None
    vectors_ND: np.ndarray | None = None


def _fitted(
    slug: str,
    adaptation: Adaptation,
    work: Work,
    split: Split | None,
    options: dict[str, Any],
    augmented: Augmented | None,
    seed: int,
) -> _Made:
    """A classifier from the frozen vectors; without a split from all of them, unlabelled."""
    fit = adaptation.fit if split is not None else adaptation.unlabelled
    if fit is None:
        raise UsageError(f"{slug} needs labels.", hint="Use gda-clip to learn without.")
    options = options_for({"fit": fit}, options, slug)["fit"]
    model = work.model
    given: dict[str, Any] = {"logit_scale": model.logit_scale, "seed": seed, **options}
    if split is None:
        vectors_ND = work.all_vectors()
        learned_from = len(vectors_ND)
        head = fit(vectors_ND, work.text_CD(slug), **given)
    else:
        vectors_ND, labels_N = work.vectors(split.train)
        learned_from = len(vectors_ND)
        if augmented is not None:
            vectors_ND, labels_N, picture_N = work.augmented(split.train, augmented, seed)
            if "picture_N" in signature(fit).parameters:
                given["picture_N"] = picture_N
        head = fit(vectors_ND, labels_N, work.text_CD(slug), **given)
    made = _with_head(slug, model, head, work.classes, options)
    return _Made(made, learned_from, head.notes, head, vectors_ND)


def _extended(slug: str, adaptation: Adaptation, work: Work, made: _Made, names: Sequence[str]) -> _Made:
    """Classes more, of which there are words but no pictures."""
    if adaptation.extend is None:
        raise UsageError(f"{slug} cannot take in classes without pictures.", hint="Use gda-clip.")
    twice = sorted(set(names) & set(work.classes))
    if twice:
        raise UsageError(f"New classes that have pictures already: {', '.join(twice[:5])}.")
    text_KD = work.model.embed_prompts(names, work.templates)
    head = adaptation.extend(made.head, made.vectors_ND, text_KD)
    model = _with_head(slug, work.model, head, (*work.classes, *names), {"new_classes": list(names)})
    note = (
        f"{len(names)} classes are known by name alone; the figures are among all {len(model.classes or ())}."
    )
    return replace(made, model=model, notes=(*made.notes, note), head=head)


def _with_head(
    slug: str, base: Model, head: LinearHead, classes: Sequence[str], options: Mapping[str, Any]
) -> Model:
    config = HeadConfig(slug, len(classes), dict(options))
    return _as_model(slug, model_class(slug)(copy.deepcopy(base.module), config, head), base, classes)


def _trained(
    slug: str,
    adaptation: Adaptation,
    work: Work,
    split: Split,
    folder: Path,
    *,
    options: dict[str, Any],
    settings: Mapping[str, Any],
    crop_area: tuple[float, float],
    flip: float,
    seed: int,
) -> _Made:
    """A module that the loop trained, with the model frozen inside."""
    model = work.model
    inside = copy.copy(model)
    inside.module = copy.deepcopy(model.module)  # the caller's stays as it is
    module, config = train_adaptation(
        slug,
        adaptation,
        inside,
        work.labelled,
        split.train,
        run_folder(folder),
        options=options,
        settings=settings,
        crop_area=crop_area,
        flip=flip,
        seed=seed,
        on_progress=work.on_progress,
    )
    note = f"{config.steps} steps of {config.batch_size} pictures, {config.optimizer}, lr {config.lr:g}."
    return _Made(_as_model(slug, module, model, work.classes), len(split.train), (note,))


def _as_model(slug: str, module: Any, base: Model, classes: Sequence[str]) -> Model:
    name = f"{base.name} adapted by {slug}"
    return base.around(
        module, name=name, system=slug, device=base.device, dtype=base.dtype, base=None, classes=classes
    )


def _base(model: Model, folder: Path) -> dict[str, Any]:
    """How the folder finds the model it was made from, also when both are moved together."""
    told = base_card(model)
    if "source" in told and Path(told["source"]).exists():
        told["relative"] = os.path.relpath(told["source"], folder.absolute())
    return told


def _check_folder(folder: Path) -> None:
    """Refuse a place that holds anything but a model, before any work is done."""
    from moviola.clip.native import MANIFEST

    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file())
    ):
        raise UsageError(
            f"{printable(folder)} is there already and is no model.", hint="Name a new folder with --to."
        )
