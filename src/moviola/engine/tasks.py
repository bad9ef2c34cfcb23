"""One task and its receipt: what every engine runs, wherever it runs.

A task's output is one file. Its receipt, `output` + ".json", is written after it, so a task counts as
done only when both are there, and a restart returns the summary in the receipt without running again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moviola.files import atomic
from moviola.types import MoviolaError, UsageError, printable

Function = Callable[[Any, Path], Any]
"""`function(task, output)` writes `output` whole or not at all and returns something JSON can hold."""
OnDone = Callable[[int, Any], None]
"""Called in the parent with a task's index and its summary, or `Failed`, in the order of finishing."""
Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A task that raised an error of a kind to be skipped; it has no receipt and runs again next time."""

    index: int
    problem: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.problem} {self.hint}" if self.hint else self.problem


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes back from a task, in plain words: some errors do not survive a process boundary."""

    summary: Any = None
    problem: str | None = None
    hint: str | None = None
    skipped: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


def receipt(output: Path) -> Path:
    """The JSON file beside an output that says the task is done."""
    return output.with_name(output.name + ".json")


def write_receipt(output: Path, summary: Any, key: str) -> None:
    with atomic(receipt(output)) as file:
        file.write(json.dumps({"key": key, "summary": summary}).encode())


def read_receipt(output: Path, key: str) -> tuple[bool, Any]:
    """Whether `output` was finished under this key, and its summary."""
    place = receipt(output)
    if not (output.exists() and place.exists()):
        return False, None
    try:
        content = json.loads(place.read_bytes())
    except ValueError:  # not one of ours: the task runs and replaces it
        return False, None
    if not isinstance(content, dict) or content.get("key") != key:
        return False, None
    return True, content.get("summary")


def run_task(
    function: Function, task: Any, output: Path, key: str, skip: tuple[type[MoviolaError], ...]
) -> Outcome:
    """Run one task and write its receipt. An error the user can act on comes back as words.

    A mistake in the program (any other exception) is raised as it is.
    """
    place = receipt(output)
    try:
        # an older receipt must not outlive a new output
        place.unlink(missing_ok=True)
        summary = json.loads(json.dumps(function(task, output)))
        if not output.exists():
            raise RuntimeError(f"the task was to write {output}, but did not")
        write_receipt(output, summary, key)
    except MoviolaError as error:
        return Outcome(problem=error.problem, hint=error.hint, skipped=isinstance(error, skip))
    except OSError as error:
        where = printable(error.filename) if error.filename else printable(output)
        return Outcome(
            problem=f"{where}: {error.strerror or error}.",
            hint="Put it right and run the same command again: finished parts are kept.",
        )
    return Outcome(summary=summary)


class Ledger:
    """The results of one `map`: what was done before, what is left, and what to do with an outcome."""

    def __init__(
        self, tasks: Sequence[Any], outputs: Sequence[Path], key: str, on_done: OnDone | None
    ) -> None:
        if len(tasks) != len(outputs):
            raise UsageError(
                f"Every task needs one output, got {len(tasks)} tasks and {len(outputs)} outputs."
            )
        names = [Path(output) for output in outputs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"Two tasks would write the same file {printable(twice)}.")
        self.results: list[Any] = [None] * len(names)
        self.left: list[int] = []
        self._on_done = on_done
        self._total = len(names)
        for index, output in enumerate(names):
            done, summary = read_receipt(output, key)
            if done:
                self._set(index, summary)
            else:
                self.left.append(index)
        self.finished = self._total - len(self.left)

    def _set(self, index: int, result: Any) -> None:
        self.results[index] = result
        if self._on_done is not None:
            self._on_done(index, result)

    def take(self, index: int, outcome: Outcome) -> None:
        """Note an outcome; raises `MoviolaError` where it was an error that stops the run."""
        if outcome.problem is None:
            self.finished += 1
            self._set(index, outcome.summary)
        elif outcome.skipped:
            self._set(index, Failed(index, outcome.problem, outcome.hint))
        else:
            raise MoviolaError(outcome.problem, hint=outcome.hint)

    def died(self) -> MoviolaError:
        """The error for a worker process that went without a word."""
        return MoviolaError(
            "A worker process ended before its task was done: killed, or out of memory.",
            hint=f"Run the same command again: {self.finished} of {self._total} parts are kept. "
            "Fewer workers need less memory.",
        )
