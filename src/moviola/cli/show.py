"""How results look on a terminal: tables, progress bars, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from moviola.types import Clip, printable

if TYPE_CHECKING:
    from moviola.verbs.search import Results

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """For machines: one JSON document on stdout. Undecodable bytes in names stay escaped."""
    text = json.dumps(data, ensure_ascii=False, indent=1)
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """A table with numbers right-aligned; cells are data, never markup."""
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    rows = [list(row) for row in rows]
    for i, name in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) for row in rows)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(f"{c:.2f}" if isinstance(c, float) else printable(c)) for c in row))
    out.print(made)


def figures(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of figures that are written out already, each under the end of its name."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        out.print(line, markup=False, style="bold" if row is columns else None)


def pairs(data: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    for name, value in data.items():
        made.add_row(Text(name, style="bold"), Text(printable(value)))
    out.print(made)


def skipped(failed: Iterable[Any], what: str = "skipped") -> None:
    """What could not be read and why, on stderr: (path, reason) pairs or things that tell themselves."""
    lines = [f"{one[0]}: {one[1]}" if isinstance(one, tuple) else str(one) for one in failed]
    if lines:
        err.print(f"{len(lines)} {what}:", markup=False)
        for line in lines:
            err.print(f"  {printable(line)}", markup=False)


def moments(results: Results) -> None:
    """The moments of a search, best first."""
    from moviola.verbs.search import clock

    rows = []
    for rank, moment in enumerate(results, 1):
        picture = moment.kind == "picture"
        start, end = ("", "") if picture else (clock(moment.span.start), clock(moment.span.end))
        rows.append((rank, _near(moment.file), start, end, f"{moment.score:.3f}", moment.text or ""))
    columns = ["", "file", "start", "end", "score"]
    if any(row[5] for row in rows):
        columns.append("text")
    table(columns, [row[: len(columns)] for row in rows])


def planted(clip: Clip) -> None:
    """Where the made world put what is asked for."""
    from moviola.verbs.search import clock

    if clip.span is not None:
        span = f"{clock(clip.span.start)} to {clock(clip.span.end)}"
        out.print(f"(planted in {clip.path.name} from {span})", markup=False)


def _near(file: str) -> str:
    """The shorter of a path and the same path as seen from here."""
    try:
        return min(file, os.path.relpath(file), key=len)
    except ValueError:  # another drive
        return file


@contextmanager
def progress(quiet: bool, what: str) -> Iterator[Callable[..., None] | None]:
    """A bar for verbs that report (done, total, note), on stderr."""
    if quiet or not err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: float, total: float | None, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {note}".strip())

        yield update


@contextmanager
def stages(quiet: bool) -> Iterator[Callable[[float, float | None, str], None] | None]:
    """A bar for each stage of a long run, with the time it took or has left, on stderr.

    For verbs that report (done, total, stage). Finished stages stay on the screen.
    """
    if quiet or not err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # A piece can take minutes: speed is told from the last hour, not from the last seconds.
    with Bar(*columns, console=err, speed_estimate_period=3600) as bar:
        bars: dict[str, TaskID] = {}

        def update(done: float, total: float | None, stage: str) -> None:
            if stage not in bars:
                bars[stage] = bar.add_task(stage, total=total)
            bar.update(bars[stage], completed=done, total=total)

        yield update


def finish(report: Any, json: bool) -> None:
    """Print a report that knows how to tell itself; exit status 1 if something could not be read."""
    if json:
        print_json(report.to_json())
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1)
