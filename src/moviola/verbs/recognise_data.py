"""What a recognition run learns from and is measured on: sets of clips, shots, base and new classes.

Axis letters: N clips, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moviola.data.action_lists import Layout, list_layout, read_actions
from moviola.data.class_clips import unreadable
from moviola.data.classes import SPLITS, ClassSet, Names, read_classes
from moviola.data.shots import split_rows
from moviola.types import FrameSpec, UsageError
from moviola.verbs.adapt_pictures import check_classes, test_set
from moviola.verbs.common import Skipped

_SIDES = {"left", "right", "leftwards", "rightwards", "clockwise", "counterclockwise", "anticlockwise"}


@dataclass(frozen=True)
class Source:
    """How sets are read: see `read_classes` and `read_actions`."""

    layout: Layout | None = None
    split: str | None = None
    fold: int = 1
    names: Names | None = None
    media_root: str | Path | None = None
    label_column: str | None = None
    media_column: str | None = None

    def read(self, source: str | Path | ClassSet, split: str | None) -> ClassSet:
        if isinstance(source, ClassSet):
            return source
        layout = self.layout or list_layout(source)
        if layout is not None:
            return read_actions(
                source,
                media_root=self.media_root,
                layout=layout,
                split=split,
                fold=self.fold,
                names=self.names,
            )
        return read_classes(
            source,
            split=split,
            names=self.names,
            label_column=self.label_column,
            media_column=self.media_column,
            media_root=self.media_root,
        )

    def read_both(
        self, data: str | Path | ClassSet, test: str | Path | ClassSet | None
    ) -> tuple[ClassSet, ClassSet | None]:
        """Clips to learn from and, where there are any, others to measure on, with the same class numbers.

        A folder with `train` and another split, and the folder of UCF101's or HMDB51's lists, hold both.
        """
        split, other = self.split, None
        if split is None and not isinstance(data, ClassSet) and Path(data).is_dir():
            there = [name for name in SPLITS if (Path(data) / name).is_dir()]
            if "train" in there:
                split, other = "train", next((name for name in there if name != "train"), None)
            elif list_layout(data) is not None:
                split, other = "train", "test"
        train = self.read(data, split)
        check_classes(train)
        if test is None and other is None:
            return train, None
        shown = self.read(data, other) if test is None else self.read(test, None)
        return train, test_set(shown, train.classes, None)


@dataclass(frozen=True)
class Task:
    """Classes that are told apart, and the clips to measure it on: rows of `data`."""

    name: str
    data: ClassSet
    rows: Sequence[int]
    classes: tuple[str, ...]
    labels_N: np.ndarray


@dataclass(frozen=True)
class Protocol:
    """The rows to learn from, the set with the class numbers that are learned, and what is measured."""

    data: ClassSet
    rows: np.ndarray
    tasks: tuple[Task, ...]
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Readable:
    """Rows of a set as they turn out to be readable."""

    data: ClassSet
    spec: FrameSpec
    seen: set[int] = field(default_factory=set)
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)

    def check(self, rows: Sequence[int]) -> bool:
        """Whether all of these can be read; those that cannot are remembered."""
        new = [row for row in rows if row not in self.seen]
        self.seen.update(new)
        found = unreadable(self.data, new, self.spec) if new else {}
        self.bad |= found
        return not found


def protocol(
    train: ClassSet,
    test: ClassSet | None,
    spec: FrameSpec,
    *,
    shots: int | None,
    base_to_new: bool,
    held_out: float,
    most_test: int | None,
    seed: int,
) -> Protocol:
    """What is learned from and measured on. Clips that cannot be opened give their place to others.

    With `base_to_new` the half of the classes with the most clips is learned, and the others are only
    measured, each half among its own names (Rasheed et al. 2023, ViFi-CLIP).
    """
    ways = _Readable(train, spec)
    while True:
        chosen = split_rows(
            train.labels_N,
            train.classes,
            shots=shots,
            seed=seed,
            held_out=0.0 if test is not None else held_out,
            most_test=None if test is not None else most_test,
            without=ways.bad,
        )
        if ways.check(chosen.train.tolist()):
            break
    failed = [Skipped(*one) for one in (*train.skipped, *(() if test is None else test.skipped))]
    failed += [Skipped(*ways.bad[row]) for row in sorted(ways.bad)]
    shown, rows = (train, chosen.test) if test is None else (test, np.array(test.sample(most_test), np.int64))
    learned, kept = train, chosen.train
    if base_to_new:
        base, new = halves(train)
        learned = _renumbered(train, base)
        kept = kept[np.isin(train.labels_N[kept], base)]
        tasks = tuple(_task(name, shown, rows, half) for name, half in (("base", base), ("new", new)))
    else:
        tasks = (_task("all", shown, rows, np.arange(len(train.classes))),)
    return Protocol(learned, kept, tuple(t for t in tasks if len(t.rows)), tuple(failed), chosen.notes)


def halves(data: ClassSet) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers of the half with the most clips, and of the rest; each in the order of the set."""
    if len(data.classes) < 4:
        raise UsageError(
            f"Base and new classes are two each at least, and there are {len(data.classes)} in all.",
            hint="Leave --base-to-new out.",
        )
    count_C = np.bincount(data.labels_N, minlength=len(data.classes))
    order_C = np.argsort(-count_C, kind="stable")
    middle = (len(order_C) + 1) // 2
    return np.sort(order_C[:middle]), np.sort(order_C[middle:])


def _renumbered(data: ClassSet, kept: np.ndarray) -> ClassSet:
    """The set with these classes alone, numbered anew; clips of others have the label -1."""
    number_C = np.full(len(data.classes), -1, np.int64)
    number_C[kept] = np.arange(len(kept))
    made = copy.copy(data)
    made.classes = tuple(data.classes[number] for number in kept)
    made.labels_N = number_C[data.labels_N]
    return made


def _task(name: str, data: ClassSet, rows: np.ndarray, kept: np.ndarray) -> Task:
    own = _renumbered(data, kept)
    return Task(name, data, rows[own.labels_N[rows] >= 0].tolist(), own.classes, own.labels_N)


def mirrors_badly(classes: Sequence[str]) -> list[str]:
    """Classes whose names say left or right, so that a mirrored clip would have another name."""
    return [name for name in classes if _SIDES & set(name.lower().split())]
