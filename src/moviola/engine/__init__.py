"""Engines: where the pieces of a large job run. Three verbs over files, the same bytes from each engine.

`LocalEngine` needs nothing beyond the base: in process, or over processes. `DaftEngine` runs the same
on Daft, native or on a Ray cluster whose machines see the same paths. `engine(name)` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moviola.engine.joining import How
from moviola.engine.local import MEMORY, LocalEngine
from moviola.engine.requests import Joined
from moviola.engine.tasks import Failed, Function, OnDone, Progress
from moviola.types import MoviolaError, UsageError

if TYPE_CHECKING:
    from moviola.engine.daft import DaftEngine

__all__ = ["Engine", "Failed", "How", "Joined", "LocalEngine", "engine"]


class Engine(Protocol):
    """Every verb can be killed and called again: what was finished is kept, what was not is made anew."""

    name: str

    def map(
        self,
        function: Function,
        tasks: Sequence[Any],
        outputs: Sequence[Path],
        *,
        key: str = "",
        skip: tuple[type[MoviolaError], ...] = (),
        on_done: OnDone | None = None,
    ) -> list[Any]:
        """Run `function(task, output)` for every task; returns its summaries in the tasks' order.

        `function` and `tasks` must be picklable. The function writes `output` whole or not at all (see
        `moviola.files.atomic`) and returns a summary that JSON can hold; it comes back as JSON gives it.
        Beside the output a receipt `output.json` keeps the summary. A task whose output and receipt are
        there under the same `key` (name your settings in it) is not run again.

        An error of a class in `skip` gives `Failed` in the task's place; any other `MoviolaError`, and an
        `OSError` such as a full disk, ends the run as a `MoviolaError`.
        """

    def group_count(
        self,
        parts: Sequence[Path],
        column: str,
        to: Path,
        *,
        at_least: int = 1,
        size: int | None = None,
        first: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> int:
        """Count how often each value of `column` occurs in Parquet parts; returns the table's rows.

        The table at `to` has the value (under the column's name), `count` (int64) and `first_NAME` for
        every integer column in `first`: together the least tuple (compared in the given order) among the
        value's rows. It is sorted by value, numbers by size and strings by their UTF-8 bytes. Lists
        count item by item; nulls are left out. Values counted fewer than `at_least` times are left out.
        `size` says that the values are integers 0 to size-1 and few enough for an array; with
        `at_least=0` the table then has a row for each of them.
        """

    def join(
        self,
        parts: Sequence[Path],
        table: Path,
        column: str,
        to: Path,
        *,
        how: How = "inner",
        progress: Progress | None = None,
    ) -> list[Joined]:
        """Join Parquet parts with a table sorted by the integer `column`, each value once.

        Each part gives one part of the same name in the folder `to`, rows in their order. "inner" keeps
        the rows in the table and adds its other columns (numbers); "left" keeps all rows, with nulls;
        "anti" keeps the rows that are not in the table; "distinct" drops duplicates: it keeps a row that
        is not in the table, or whose own columns equal the table's `first_` columns.
        """


def engine(
    name: str = "local", *, address: str | None = None, workers: int | None = None, memory: int = MEMORY
) -> LocalEngine | DaftEngine:
    """The engine of this name: "local", "daft" (one machine) or "ray" (Daft on a Ray cluster).

    `address` is the cluster's ("local" starts one on this machine), only for "ray". `workers` and
    `memory` (bytes) are for "local".
    """
    if address is not None and name != "ray":
        raise UsageError(f"An address is only for the engine 'ray', not '{name}'.")
    if name == "local":
        return LocalEngine(workers, memory)
    if name in ("daft", "ray"):
        from moviola.engine.daft import DaftEngine

        return DaftEngine((address or "local") if name == "ray" else None, memory=memory)
    raise UsageError(f"There is no engine '{name}'.", hint="Engines: local, daft, ray.")
