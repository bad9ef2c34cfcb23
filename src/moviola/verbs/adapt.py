"""`adapt`: a frozen model made to know the user's own classes, from a few pictures of each.

Axis letters: N pictures, D embedding width, C classes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moviola.clip.loaded import Model
from moviola.data.classes import ClassSet, Names, read_classes
from moviola.data.shots import Split
from moviola.data.templates import read_templates
from moviola.files import atomic
from moviola.parts.linear_head import HeadConfig, LinearHead
from moviola.systems.registry import model_class
from moviola.types import Adaptation, UsageError, printable
from moviola.verbs.adapt_methods import adaptation_of, options_for
from moviola.verbs.adapt_pictures import Work, check_classes, test_set
from moviola.verbs.adapt_train import keep_curves, run_folder, train_adaptation
from moviola.verbs.common import Progress, Skipped, cache_folder, resolve, summary

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
    templates  sentences that class names stand in, for zero-shot figures and methods that use them
    epochs ... crop, mirror and recipe of methods that train; others do not use them
    cache      where vectors of the frozen model are kept (`auto`: the user's cache folder; None: nowhere)

    The folder `to` is a model: `moviola.load(to)` finds its base by name and checks its hash. Methods
    that train can be killed at any point; the same call goes on. Pictures that cannot be read are
    replaced by others of their class where there are any.
    """
    slug, adaptation = adaptation_of(method)
    if adaptation.sequence:
        raise UsageError(
            f"{slug} learns a sequence of tasks.", hint="Use moviola.adapt_tasks (moviola adapt --tasks N)."
        )
    folder = Path(to)
    _check_folder(folder)
    loaded = resolve(model, device=device, dtype=None, tokenizer=tokenizer)
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
    check_classes(found)
    sentences = read_templates(templates)
    place = cache_folder("features") if cache == "auto" else cache
    work = Work(loaded, found, sentences, frames, None if place is None else Path(place), on_progress)
    other = None if test is None else test_set(test, found, media_root)
    chosen = work.split(shots=shots, seed=seed, held_out=0 if other else held_out, most_test=most_test)
    if adaptation.fit is not None:
        made = _fitted(slug, adaptation, work, chosen, dict(options or {}), seed)
    else:
        made = _trained(
            slug,
            adaptation,
            work,
            chosen,
            folder,
            options=dict(options or {}),
            settings={"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr},
            crop_area=crop_area,
            flip=flip,
            seed=seed,
        )
    notes = [*chosen.notes, *made.notes]
    before, after, measured = work.measure(made.model, chosen.test if other is None else None, other)
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
        classes=found.classes,
        shots=shots,
        learned_from=len(chosen.train),
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
    notes: tuple[str, ...] = ()


def _fitted(
    slug: str, adaptation: Adaptation, work: Work, split: Split, options: dict[str, Any], seed: int
) -> _Made:
    """A classifier from the frozen vectors."""
    assert adaptation.fit is not None
    options = options_for({"fit": adaptation.fit}, options, slug)["fit"]
    model, classes = work.model, work.data.classes
    vectors_ND, labels_N = work.vectors(split.train)
    head: LinearHead = adaptation.fit(
        vectors_ND, labels_N, work.text_CD(slug), logit_scale=model.logit_scale, seed=seed, **options
    )
    config = HeadConfig(slug, len(classes), options)
    module = model_class(slug)(copy.deepcopy(model.module), config, head)
    return _Made(_as_model(slug, module, model, classes), head.notes)


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
        work.data,
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
    return _Made(_as_model(slug, module, model, work.data.classes), (note,))


def _as_model(slug: str, module: Any, base: Model, classes: Sequence[str]) -> Model:
    return Model(
        module,
        config=module.config.to_json(),
        recipe=base.recipe,
        tokenizer=base.tokenizer,
        name=f"{base.name} adapted by {slug}",
        system=slug,
        device=base.device,
        dtype=base.dtype,
        licence=base.licence,
        classes=classes,
    )


def _base(model: Model, folder: Path) -> dict[str, Any]:
    """How the folder finds the model it was made from."""
    told: dict[str, Any] = {"name": model.name, "hash": model.hash}
    if model.source is not None:
        path = Path(model.source)
        told["source"] = str(path.absolute()) if path.exists() else model.source
        if path.exists():
            told["relative"] = os.path.relpath(path.absolute(), folder.absolute())
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
