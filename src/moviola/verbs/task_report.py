"""What a model still knows after each of several tasks: figures, text and a picture.

Axis letters: P phases (as many as tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moviola.files import atomic
from moviola.metrics.continual import average_accuracy, backward_transfer
from moviola.types import printable
from moviola.verbs.common import Skipped, summary


@dataclass(frozen=True)
class TaskReport:
    """A model that learned one task after the other. Figures are top-1 in percent on pictures kept apart.

    before     zero-shot accuracy on each task's classes (the mean over its classes), before the first task
    matrix     a row after each task: the accuracy on every task's classes, among the names of all
    unrelated  zero-shot accuracy on classes that were never learned: before, and after each task; or empty
    """

    folder: Path
    model: Path
    method: str
    base: str
    tasks: tuple[tuple[str, ...], ...]
    learned_from: tuple[int, ...]
    measured_on: int
    before: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    unrelated: tuple[float, ...] = ()
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def average(self) -> tuple[float, ...]:
        """After each task: the mean accuracy over the tasks learned by then."""
        return tuple(average_accuracy(self.matrix, phase) for phase in range(len(self.tasks)))

    @cached_property
    def transfer(self) -> tuple[float, ...]:
        """After each task: backward transfer, below 0 where earlier tasks were forgotten."""
        return tuple(backward_transfer(self.matrix, phase) for phase in range(len(self.tasks)))

    @property
    def both(self) -> float | None:
        """The mean at the end of the accuracy on the tasks and on unrelated classes."""
        return (self.average[-1] + self.unrelated[-1]) / 2 if self.unrelated else None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "method": self.method,
            "base": self.base,
            "tasks": [list(names) for names in self.tasks],
            "learned_from": list(self.learned_from),
            "measured_on": self.measured_on,
            "before": _rounded(self.before),
            "matrix": [_rounded(row) for row in self.matrix],
            "average": _rounded(self.average),
            "backward_transfer": _rounded(self.transfer),
            "unrelated": _rounded(self.unrelated),
            "mean_of_tasks_and_unrelated": None if self.both is None else round(self.both, 4),
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        count = len(self.tasks)
        lines = [
            f"{self.method} on {self.base}: {count} {'task' if count == 1 else 'tasks'} of "
            f"{sum(map(len, self.tasks))} classes, learned from {sum(self.learned_from)} pictures, "
            f"measured on {self.measured_on} others."
        ]
        for number, names in enumerate(self.tasks):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            told = f"{self.before[number]:.1f} before, {self.matrix[number][number]:.1f} when learned"
            if number < count - 1:
                told += f", {self.matrix[-1][number]:.1f} at the end"
            lines.append(f"Task {number + 1} ({shown}): {told}")
        told = f", backward transfer {self.transfer[-1]:+.1f}" if count > 1 else ""
        lines.append(f"Average accuracy {self.average[-1]:.1f} %{told}")
        if self.unrelated:
            after = ", ".join(f"{value:.1f}" for value in self.unrelated[1:])
            lines.append(
                f"Unrelated classes, zero-shot: {self.unrelated[0]:.1f} before; after the tasks {after}"
            )
        lines += [*self.notes, *summary(self.failed, "could not be read")]
        return "\n".join([*lines, f"Model: {printable(self.model)}"])

    def draw(self, path: Path) -> list[str]:
        """The matrix as a picture, unrelated classes in its last column; a note where it cannot be drawn."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return ["No picture was drawn. Install it with: pip install 'moviola[plots]'"]
        rows = np.array([self.before, *self.matrix])
        columns = [f"task {number + 1}" for number in range(len(self.tasks))]
        if self.unrelated:
            rows = np.column_stack([rows, self.unrelated])
            columns.append("unrelated")
        figure = Figure(figsize=(1.5 + 0.9 * len(columns), 1.3 + 0.5 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(rows, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(rows):
            colour = "white" if value > 60 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize="small")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), ["before", *(f"after {n + 1}" for n in range(len(self.tasks)))])
        axes.set_title(f"{self.method}: top-1, %", fontsize="medium")
        with atomic(path) as file:
            figure.savefig(file, format="png", dpi=120)
        return []


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]
