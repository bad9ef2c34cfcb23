"""`moviola curate run`, `count`, `plan` and `clips`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moviola.cli import show
from moviola.cli.options import Json, Quiet
from moviola.types import UsageError, printable

if TYPE_CHECKING:
    from moviola.verbs.curate import Curation
    from moviola.verbs.curate_plan import PlanRow

curate_app = typer.Typer(
    no_args_is_help=True,
    help="Choose image-text pairs by balancing what their texts speak of (MetaCLIP): run, count, plan. "
    "Clean raw videos for training: clips.",
)

Pairs = Annotated[
    list[str],
    typer.Argument(
        help="Parquet, CSV, TSV or JSON Lines (plain or compressed), WebDataset tars: files, folders, globs."
    ),
]
Metadata = Annotated[
    Path, typer.Option(help="The entries (.txt, .json, .parquet), or a folder with a list per language.")
]
To = Annotated[Path, typer.Option(help="The folder to write; it appears when the run is whole.")]
TextColumn = Annotated[
    list[str] | None,
    typer.Option(help="A column with texts; more than once for several. (default: found by its name)"),
]
IdColumn = Annotated[
    str | None, typer.Option(help="The column that names a pair for good. (default: found by its name)")
]
LanguageColumn = Annotated[
    str | None, typer.Option(help="The column with the text's language. (default: found, if there are lists)")
]
Texts = Annotated[
    Literal["one", "all"],
    typer.Option(help="Of a row's matched texts draw for one, chosen at random, or for all."),
]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
EngineName = Annotated[
    Literal["local", "daft", "ray"], typer.Option(help="Where the work runs: this machine, Daft, Ray.")
]
Address = Annotated[
    str | None, typer.Option(help="The Ray cluster, such as ray://head:10001. (default: one made here)")
]
Workers = Annotated[
    int | None, typer.Option(help="Processes of the local engine. (default: all cores)", min=1)
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at a file that cannot be read.")]


@curate_app.command("run")
def curate_run(
    pairs: Pairs,
    metadata: Metadata,
    to: To,
    threshold: Annotated[
        float | None, typer.Option(help="Texts of an entry above which it is thinned. (default 20000)")
    ] = None,
    tail_share: Annotated[
        float | None, typer.Option(help="Instead: the share of all matches that lies in the tail, 0 to 1.")
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(help="The counts.parquet of another run with this metadata, to draw by."),
    ] = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    language_column: LanguageColumn = None,
    texts: Texts = "one",
    seed: Seed = 0,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    strict: Strict = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the balanced part of PAIRS to a folder, with counts.parquet and report.html.

    Killed at any point, the same command goes on. Exit status 1 if a file could not be read.
    """
    from moviola.verbs.curate import curate

    with show.stages(quiet or json) as on_progress:
        made = curate(
            pairs,
            metadata=metadata,
            to=to,
            threshold=threshold,
            tail_share=tail_share,
            counts=counts,
            text_columns=text_column or (),
            id_column=id_column,
            language_column=language_column,
            texts=texts,
            seed=seed,
            engine=engine,
            address=address,
            workers=workers,
            strict=strict,
            on_progress=on_progress,
        )
    _finish(made, json)


@curate_app.command("count")
def curate_count(
    pairs: Pairs,
    metadata: Metadata,
    to: To,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    language_column: LanguageColumn = None,
    texts: Texts = "one",
    seed: Seed = 0,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    strict: Strict = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Only count how many texts hold each entry, for `moviola curate plan` and for --counts.

    Killed at any point, the same command goes on. Exit status 1 if a file could not be read.
    """
    from moviola.verbs.curate import count_pool

    with show.stages(quiet or json) as on_progress:
        made = count_pool(
            pairs,
            metadata=metadata,
            to=to,
            text_columns=text_column or (),
            id_column=id_column,
            language_column=language_column,
            texts=texts,
            seed=seed,
            engine=engine,
            address=address,
            workers=workers,
            strict=strict,
            on_progress=on_progress,
        )
    _finish(made, json)


@curate_app.command("plan")
def curate_plan(
    counts: Annotated[Path, typer.Argument(help="A counts.parquet, or the folder of a run.")],
    threshold: Annotated[
        list[float] | None,
        typer.Option(help="A threshold to try; more than once. (default: two a decade)"),
    ] = None,
    json: Json = False,
) -> None:
    """Set size and tail share over thresholds, without reading the pairs again.

    With several languages the threshold is English's and the others follow its tail share. The size comes
    from a sample of the pool; +- is its standard error.
    """
    from dataclasses import asdict

    from moviola.verbs.curate_plan import plan

    rows = plan(counts, thresholds=threshold or ())
    if json:
        show.print_json([asdict(row) for row in rows])
    else:
        show.figures(
            ("threshold", "tail share", "head entries", "expected size", "+-"), list(map(_plan_cells, rows))
        )


@curate_app.command("clips")
def curate_clips(
    sources: Annotated[list[Path], typer.Argument(help="Videos, or folders of them.")],
    to: Annotated[Path, typer.Option(help="The folder to write clips.jsonl to. A killed run goes on.")],
    detector: Annotated[
        str | None,
        typer.Option(help="Your function that counts people in frames, as package.module:name. (none)"),
    ] = None,
    looks: Annotated[int, typer.Option(help="Frames of a scene that the detector sees.", min=1)] = 8,
    shortest: Annotated[float, typer.Option(help="Seconds that a scene must last.", min=0)] = 0.0,
    threshold: Annotated[float, typer.Option(help="Of scene detection: higher finds fewer cuts.")] = 3.0,
    floor: Annotated[float, typer.Option(help="The least change of a frame that may be a cut.")] = 30.0,
    cut: Annotated[bool, typer.Option("--cut", help="Also write each scene as a video.")] = False,
    workers: Annotated[int, typer.Option(help="Threads that read and decode.", min=1)] = 2,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Clean raw videos for training: equal files once, of each its longest scene, only those with people."""
    import pkgutil
    import sys

    from moviola.verbs.clean_clips import clean_clips

    if detector is not None and "" not in sys.path:
        sys.path.insert(0, "")  # a file of the current folder, as `python -m` finds it
    try:
        found = None if detector is None else pkgutil.resolve_name(detector)
    except (ValueError, ImportError, AttributeError) as error:
        raise UsageError(
            f"There is no detector {detector!r}: {error}.",
            hint="Name a function that Python can import: --detector package.module:name",
        ) from error
    with show.progress(quiet or json, "cleaning") as on_progress:
        made = clean_clips(
            sources,
            to,
            detector=found,
            looks=looks,
            shortest=shortest,
            threshold=threshold,
            floor=floor,
            cut=cut,
            workers=workers,
            on_progress=on_progress,
        )
    show.finish(made, json)


def _plan_cells(row: PlanRow) -> tuple[str, ...]:
    return (
        f"{row.threshold:,.10g}",
        f"{100 * row.tail_share:.2f} %",
        f"{row.head_entries:,}",
        f"{row.size:,.0f}",
        f"{row.error:,.0f}",
    )


def _finish(made: Curation, json: bool) -> None:
    """Print what came of it; exit status 1 if something could not be read."""
    from moviola.verbs.curate_report import report_lines

    if json:
        show.print_json({"folder": os.fspath(made.folder), **made.report})
    else:
        for line in report_lines(made.report):
            show.out.print(line, markup=False)
        show.out.print(f"Report: {printable(made.folder / 'report.html')}", markup=False)
        show.skipped(made.failed, "could not be read")
    if made.failed:
        raise typer.Exit(1)
