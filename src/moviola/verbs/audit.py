"""`audit`: what one accuracy hides, for one model or several side by side, as HTML and JSON."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moviola.data.classes import ClassSet, Names, read_classes
from moviola.data.cue_conflict import CueConflictSet
from moviola.data.media_set import MediaSet
from moviola.data.retrieval import RetrievalSet, read_retrieval
from moviola.files import atomic
from moviola.types import Dtype, StoreError, UsageError, printable
from moviola.verbs import audit_sections as sections
from moviola.verbs.audit_inputs import (
    Earlier,
    Setting,
    free_name,
    read_cues,
    read_outside,
    read_sets,
    read_tags,
    read_variants,
    several,
)
from moviola.verbs.audit_models import PictureClassifier, Subject, Templates, WithWords, subject
from moviola.verbs.audit_suites import CLEAN, Run, Seen, Suite
from moviola.verbs.common import Progress, Skipped, counting_cuts, cut_note, summary

if TYPE_CHECKING:
    from moviola.clip.loaded import Model

    Audited = str | Path | Model | PictureClassifier
    Pictures = str | Path | MediaSet

Json = dict[str, Any]

CORRUPTIONS = ("gaussian noise", "motion blur", "fog", "contrast", "jpeg")
"""Asked of by default: one of each group, and a second digital one."""
_FEW = 300  # items on which fifteen bins of confidence say little
_ASK = {
    "calibration": ("two items or more", "data= (--data)"),
    "factors": ("what is unusual about each item", "factors= (--factors)"),
    "corruptions": ("names of corruptions", "corruptions= (--corruption)"),
    "shape": ("pictures of two classes, or a cue-conflict set", "cue_conflict= (--cue-conflict)"),
    "outside": ("pictures of none of the classes", "outside= (--outside)"),
    "retrieval": ("pictures with captions, and a model that reads words", "retrieval= (--retrieval)"),
    "prompts": ("two sets of templates, and a model that reads words", "prompts= (--prompts)"),
}


@dataclass(frozen=True)
class AuditReport:
    """The figures of an audit. `figures` is what `to_json` gives; see `docs/audit.md` for its parts."""

    figures: Json

    @property
    def ok(self) -> bool:
        """False when something could not be read."""
        return not self.figures["failed"]

    def to_json(self) -> Json:
        return dict(self.figures)

    def write(self, folder: str | Path) -> Path:
        """`report.html` and `report.json` in a folder; the path of the page."""
        from moviola.verbs.audit_page import audit_page

        target = Path(folder)
        page = audit_page(self.figures).encode("utf-8", "backslashreplace")
        stored = json.dumps(self.figures, ensure_ascii=False, indent=1, allow_nan=False)
        try:
            for name, content in (
                ("report.json", stored.encode("utf-8", "backslashreplace")),
                ("report.html", page),
            ):
                with atomic(target / name) as file:
                    file.write(content)
        except OSError as error:
            raise StoreError(
                f"The report could not be written to {printable(target)} ({error.strerror})."
            ) from error
        return target / "report.html"

    def rows(self) -> list[tuple[str, ...]]:
        """A header with the models, and a line for each of the figures that sum a section up."""
        from moviola.verbs.audit_rows import headlines

        return headlines(self.figures)

    def __str__(self) -> str:
        figures = self.figures
        title = (
            f"Audit on {printable(figures['data'])}, {figures['items']} items, {figures['classes']} classes"
        )
        rows = self.rows()
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = [
            "  "
            + "  ".join(
                cell.rjust(w) if at else cell.ljust(w) for at, (cell, w) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        lines += [
            f"Not asked: {one['section']} ({one['needs']}: {one['option']})" for one in figures["not_asked"]
        ]
        failed = [Skipped(one["file"], one["reason"]) for one in figures["failed"]]
        return "\n".join([title, *lines, *map(printable, figures["notes"]), *summary(failed, "left out")])


def audit(
    models: Audited | Sequence[Audited],
    data: str | Path | ClassSet,
    *,
    to: str | Path | None = None,
    templates: str | Path | Sequence[str] | None = None,
    corruptions: Sequence[str] | Literal["all"] | None = CORRUPTIONS,
    severities: Sequence[int] = (1, 3, 5),
    outside: Pictures | Sequence[Pictures] | None = None,
    retrieval: str | Path | RetrievalSet | None = None,
    cue_conflict: str | Path | CueConflictSet | None = "made",
    factors: str | Path | Mapping[str, Any] | None = None,
    prompts: Sequence[str | Path | Sequence[str]] = ("simple", "general"),
    baselines: Sequence[Audited | AuditReport] = (),
    split: str | None = None,
    names: Names | None = None,
    label_column: str | None = None,
    media_column: str | None = None,
    media_root: str | Path | None = None,
    limit: int | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype | None = None,
    batch_size: int = 32,
    truncate: bool = False,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Accuracy and what it hides, of one model or several on labelled pictures.

    models        one or several: what `load` takes, a loaded model, or any object with `name`, `classes`
                  and `classify_pictures(pictures) -> logits_NC`, whose classes are matched by name
    data          labelled pictures, as `read_classes` takes them (with `split`, `names`, columns)
    to            a folder for `report.html` and `report.json`
    templates     the prompts of every section; `prompts` are sets that are compared with them
    corruptions   names, "all" or None; each at every one of `severities` (1 to 5), drawn by `seed`
    outside       pictures of none of the classes: a folder, a table, a set, or several of these
    retrieval     pictures with captions, as `read_retrieval` takes them
    cue_conflict  "made" from the data's own pictures, the folder of the published set, or None
    factors       what is unusual about each item: a column of the data's table, a JSON file or a mapping
    baselines     three models or more, or earlier reports on the same items, that the line of effective
                  robustness goes through
    limit         at most so many items of each set, drawn by hash
    cache         where answers are kept, by default `to/cache`: an audit that is killed goes on there

    Needs labels alone: a section without its data stands in `not_asked`. Every model sees the same pixels,
    and what cannot be read is left out for all of them. Answers that are not finite raise `UsageError`.
    """
    variants = read_variants(corruptions, severities)
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
    if len(found.classes) < 2:
        raise UsageError(f"An audit needs two classes or more, {printable(found.source)} has one.")
    sets = read_sets([templates or "simple", *prompts])
    tags = None if factors is None else read_tags(factors, found)
    away = read_outside(outside)
    pairs = read_retrieval(retrieval) if isinstance(retrieval, str | Path) else retrieval
    earlier = Earlier()
    live = [one for one in baselines if not earlier.take(getattr(one, "figures", one))]
    rows = found.sample(limit)
    notes: list[str] = []
    with counting_cuts() as cut:

        def asked(one: Any, classes: Sequence[str], several: Sequence[Templates]) -> Subject:
            options: Json = {"dtype": dtype, "batch_size": batch_size, "truncate": truncate}
            return subject(one, classes, several, device=device, **options)

        wanted = list(dict.fromkeys(sets.values()))
        subjects = [asked(one, found.classes, wanted) for one in several(models)]
        lines = [asked(one, found.classes, wanted[:1]) for one in live]
        if not subjects:
            raise UsageError("There is no model to audit.", hint="Name one or more.")
        _name_apart([*subjects, *lines], earlier.names)
        cues = read_cues(cue_conflict, found, rows, limit, seed)
        cue_subjects = subjects
        if cues is not None and cues.data is not found:  # the published set has classes of its own
            cue_subjects = list(_with_classes(subjects, cues.data.classes, asked, wanted[:1], notes))
    readers = [one for one in subjects if isinstance(one, WithWords)]
    suite = Suite(found, rows, (CLEAN, *variants), seed=seed)
    outer = {name: Suite(one, one.sample(limit)) for name, one in away.items()}
    total = len(rows) * len(suite.variants) * len([*subjects, *lines])
    total += len(subjects) * sum(len(one.rows) for one in outer.values())
    total += 0 if cues is None else len(cues.rows) * len(cue_subjects)
    total += 0 if pairs is None else len(readers) * len(pairs.sample(limit))
    failed = dict.fromkeys(Skipped(*one) for one in found.skipped)
    parts: Json = {}
    with _folders(cache, to) as (kept, temporary):
        run = Run(kept, temporary, batch_size, on_progress, total, failed)
        seen = run.see(suite, [*subjects, *lines])
        setting = Setting.of(found, seen.index_N, variants, seed)
        parts["accuracy"] = sections.accuracy(seen, subjects, found)
        if len(seen.index_N) > 1:
            parts["calibration"] = sections.calibration(seen, subjects, found, seed, notes)
        if variants:
            old = earlier.figures("corruptions", setting)
            parts["corruptions"] = sections.corruptions(seen, subjects, lines, old, found, notes)
        if tags is not None:
            old = earlier.figures("factors", setting)
            parts["factors"] = sections.factors(seen, subjects, lines, old, found, tags)
        if cues is not None and cue_subjects:
            parts["shape"] = sections.shape(run.see(cues, cue_subjects), cue_subjects, cues)
        if outer:
            others = {name: run.see(one, subjects) for name, one in outer.items()}
            parts["outside"] = sections.outside(seen, others, subjects)
        if len(sets) > 1 and readers:
            parts["prompts"] = sections.prompts(seen, readers, found, sets)
        if pairs is not None and readers:
            parts["retrieval"] = sections.retrieval(run, readers, pairs, limit)
    notes = [note for one in [*subjects, *lines] for note in one.notes] + notes
    notes += _notes(found, rows, seen, cut)
    if variants or tags is not None:
        notes += earlier.note(len(lines))
    report = AuditReport(
        _plain(
            {
                "task": "audit",
                "data": str(found.source),
                "split": found.split,
                "items": len(seen.index_N),
                "classes": len(found.classes),
                "templates": list(wanted[0]),
                "setting": setting.to_json(),
                "models": [_about(one) for one in subjects],
                "baselines": [*(one.name for one in lines), *earlier.names],
                "sections": parts,
                "not_asked": _not_asked(parts),
                "failed": [one.to_json() for one in failed],
                "notes": list(dict.fromkeys(notes)),
                "versions": {name: version(name) for name in ("moviola", "torch", "numpy", "pillow")},
                "ok": not failed,
            }
        )
    )
    if to is not None:
        report.write(to)
    return report


def _with_classes(
    subjects: Sequence[Subject],
    classes: Sequence[str],
    asked: Any,
    sets: Sequence[Templates],
    notes: list[str],
) -> Iterator[Subject]:
    """The same models for other classes; a classifier that does not know them is left out with a note."""
    for one in subjects:
        try:
            made: Subject = asked(one.source, classes, sets)
        except UsageError as error:
            if isinstance(one, WithWords):
                raise
            notes.append(f"Shape or texture: {error.problem}")
        else:
            made.name = one.name
            yield made


def _name_apart(subjects: Sequence[Subject], taken: Sequence[str]) -> None:
    names = list(taken)
    for one in subjects:
        one.name = free_name(one.name, names)
        names.append(one.name)


@contextmanager
def _folders(cache: str | Path | None, to: str | Path | None) -> Iterator[tuple[Path, Path]]:
    """Where answers are kept for the next run, and where they lie for this one alone."""
    with tempfile.TemporaryDirectory(prefix="moviola-audit-") as temporary:
        folder = (
            Path(cache) if cache is not None else Path(to) / "cache" if to is not None else Path(temporary)
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The folder {printable(folder)} cannot be made ({error.strerror}).") from error
        yield folder, Path(temporary)


# --------------------------------------------------------------------------------------------------
# What is told
# --------------------------------------------------------------------------------------------------


def _about(subject: Subject) -> Json:
    model = subject.model
    about: Json = {"name": subject.name, "kind": subject.kind}
    if model is not None:
        about |= {"system": model.system, "hash": model.hash, "parameters": model.parameters}
        about |= {"dtype": str(model.dtype)[6:], "logit_scale": model.logit_scale}
    return about


def _not_asked(parts: Mapping[str, Any]) -> list[Json]:
    return [
        {"section": name, "needs": needs, "option": option}
        for name, (needs, option) in _ASK.items()
        if name not in parts
    ]


def _notes(data: ClassSet, rows: Sequence[int], seen: Seen, cut: Sequence[str]) -> list[str]:
    notes = [f"A sample of {len(rows)} of {len(data)} items."] if len(rows) < len(data) else []
    if data.repeated:
        listed = ", ".join(data.repeated[:5])
        notes.append(f"Names given to more than one class, which words cannot tell apart: {listed}.")
    empty = len(data.classes) - len(set(data.labels_N[seen.index_N].tolist()))
    if empty:
        notes.append(f"{empty} of {len(data.classes)} classes have no item here.")
    if len(seen.index_N) < _FEW:
        notes.append(f"With {len(seen.index_N)} items, the figures of calibration are rough.")
    return notes + cut_note(cut)


def _plain(value: Any) -> Any:
    """As JSON takes it: numbers rounded to six digits after the point, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) + 0.0 if math.isfinite(value) else None  # and no -0
    return int(value) if isinstance(value, np.integer) else value
