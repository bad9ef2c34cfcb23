"""Which of the labelled pictures to learn from, and which to measure on. Drawn by hash, so a draw stays.

Axis letters: N items, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moviola.data.hashing import hash_uint64
from moviola.types import UsageError

_STREAM = 0x5407


@dataclass(frozen=True)
class Split:
    """Rows to learn from and rows to measure on, none in both; `notes` are for the user."""

    train: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()


def few_shot(
    labels_N: np.ndarray, shots: int | None, seed: int, *, without: Collection[int] = ()
) -> np.ndarray:
    """At most `shots` rows of each class (None: all) and none of `without`, in rising order.

    The first K + 1 shots of a seed contain the first K; a row that is left out gives its place to the
    next of its class.
    """
    if shots is not None and shots < 1:
        raise UsageError(f"shots must be at least 1, got {shots}.", hint="Usual: 1, 2, 4, 8 or 16.")
    order_N = _order(len(labels_N), seed, without)
    kept = [order_N[labels_N[order_N] == label][:shots] for label in np.unique(labels_N)]
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)


def split_rows(
    labels_N: np.ndarray,
    classes: Sequence[str],
    *,
    shots: int | None,
    seed: int,
    held_out: float = 0.2,
    most_test: int | None = None,
    without: Collection[int] = (),
) -> Split:
    """`shots` of each class to learn from and all others to measure on, at most `most_test` of them.

    Without `shots` a share `held_out` of each class is kept to measure on. A class with fewer than
    `shots` pictures gives all it has, which a note says; one with none raises `UsageError`. `without`
    are rows that cannot be used.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"The share to measure on lies in [0, 1), got {held_out}.")
    if shots is not None and shots < 1:
        raise UsageError(f"shots must be at least 1, got {shots}.", hint="Usual: 1, 2, 4, 8 or 16.")
    order_N = _order(len(labels_N), seed, without)
    members = [order_N[labels_N[order_N] == label] for label in range(len(classes))]
    empty = [name for name, rows in zip(classes, members, strict=True) if not len(rows)]
    if empty:
        raise UsageError(
            f"{len(empty)} of {len(classes)} classes have no item that can be read: {', '.join(empty[:5])}.",
            hint="Add some to them, or leave the classes out with names= (--classes).",
        )
    notes = []
    if shots is None:
        kept = [rows[: math.ceil(len(rows) * (1 - held_out))] for rows in members]
    else:
        kept = [rows[:shots] for rows in members]
        few = [name for name, rows in zip(classes, members, strict=True) if len(rows) < shots]
        if few:
            notes.append(
                f"{len(few)} of {len(classes)} classes have fewer than {shots} items, and all of theirs "
                f"were used: {', '.join(few[:5])}."
            )
    single = [name for name, rows in zip(classes, members, strict=True) if len(rows) == 1]
    if single:
        notes.append(
            f"{len(single)} of {len(classes)} classes have one item only, which leaves none to measure "
            f"them on: {', '.join(single[:5])}."
        )
    train = np.sort(np.concatenate(kept))
    rest = order_N[~np.isin(order_N, train)][:most_test]
    return Split(train, np.sort(rest), tuple(notes))


def _order(count: int, seed: int, without: Collection[int]) -> np.ndarray:
    order_N = np.argsort(hash_uint64(seed, np.arange(count), _STREAM), kind="stable")
    return order_N[~np.isin(order_N, list(without))] if without else order_N
