"""What `evaluate` reports: figures with what they were measured on, as JSON, text or a Rich table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moviola.types import printable
from moviola.verbs.common import Skipped, summary

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class ZeroShotReport:
    """Accuracy in percent over `n` items: zero-shot by words, or by a classifier of the model's own.

    templates       sentences for each class; 0 where the model has a classifier
    top5            None where there are five classes or fewer
    mean_per_class  the mean over the classes that occur, each weighing the same
    per_class       top-1 by class name; of classes that occur. A name given to two classes is
                    followed by its class number
    """

    model: str
    data: str
    split: str | None
    n: int
    classes: int
    templates: int
    top1: float
    top5: float | None
    mean_per_class: float
    per_class: dict[str, float]
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def task(self) -> str:
        return "zero-shot classification" if self.templates else "classification"

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "n": self.n,
            "classes": self.classes,
            "templates": self.templates,
            "top1": _rounded(self.top1),
            "top5": None if self.top5 is None else _rounded(self.top5),
            "mean_per_class": _rounded(self.mean_per_class),
            "per_class": {name: _rounded(value) for name, value in self.per_class.items()},
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A header and one line of figures."""
        top5 = "-" if self.top5 is None else f"{self.top5:.2f}"
        return [
            ("top-1", "top-5", "mean per class", "items", "classes"),
            (f"{self.top1:.2f}", top5, f"{self.mean_per_class:.2f}", str(self.n), str(self.classes)),
        ]

    def __str__(self) -> str:
        what = f"{self.task.capitalize()} of {_named(self.data, self.split)} by {self.model}, percent"
        return "\n".join([what, *table_lines(self.rows()), *self.notes, *_left_out(self.failed)])

    def __rich__(self) -> RichTable:
        return _rich_table(
            f"{self.task.capitalize()} of {_named(self.data, self.split)}, {self.model}", self.rows()
        )


@dataclass(frozen=True)
class RetrievalReport:
    """Retrieval both ways: R1, R5, R10 in percent, MedR and MeanR as ranks from 1.

    among   what a text found for an item is ranked among: all `captions` (the custom for COCO and
            Flickr30k), or each item's best one, `items` (the custom in text-video retrieval)
    """

    model: str
    data: str
    layout: str
    split: str | None
    n_items: int
    n_texts: int
    among: Literal["items", "captions"]
    text_to_item: dict[str, float]
    item_to_text: dict[str, float]
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "task": "retrieval",
            "model": self.model,
            "data": self.data,
            "layout": self.layout,
            "split": self.split,
            "items": self.n_items,
            "texts": self.n_texts,
            "among": self.among,
            "text_to_item": {name: _rounded(value) for name, value in self.text_to_item.items()},
            "item_to_text": {name: _rounded(value) for name, value in self.item_to_text.items()},
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A header, then a line for each direction."""
        head = ("query", "R@1", "R@5", "R@10", "MedR", "MeanR", "queries")
        ways = (("text", self.text_to_item, self.n_texts), ("item", self.item_to_text, self.n_items))
        keys = ("R1", "R5", "R10", "MedR", "MeanR")
        return [head, *((way, *(f"{got[key]:.2f}" for key in keys), str(n)) for way, got, n in ways)]

    def __str__(self) -> str:
        what = f"Retrieval on {_named(self.data, self.split)} ({self.layout}) by {self.model}"
        return "\n".join([what, *table_lines(self.rows()), *self.notes, *_left_out(self.failed)])

    def __rich__(self) -> RichTable:
        return _rich_table(f"Retrieval on {_named(self.data, self.split)}, {self.model}", self.rows())


def _rounded(value: float) -> float:
    return round(value, 4)


def _named(data: str, split: str | None) -> str:
    name = printable(Path(data).name)
    return f"{name} ({split})" if split else name


def _left_out(failed: Sequence[Skipped]) -> list[str]:
    return summary(failed, "left out")


def table_lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells in columns, for terminals without colour."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _rich_table(title: str, rows: Sequence[tuple[str, ...]]) -> RichTable:
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = RichTable(title=escape(title))
    for cell in rows[0]:
        table.add_column(cell, justify="right")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return table
