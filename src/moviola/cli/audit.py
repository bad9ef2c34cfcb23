"""`moviola audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moviola import types
from moviola.cli import show


def audit(
    models: Annotated[
        list[str], typer.Argument(help="builtin, a model's folder or file, or a hub id; one or several.")
    ],
    data: Annotated[
        Path, typer.Option(help="Labelled pictures: a folder per class, or a table with a class column.")
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="The folder for report.html and report.json; a killed audit goes on."),
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="simple, general, a file, or a sentence with {}. [default: simple]")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Templates to compare; more than once. [default: simple and general]"),
    ] = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option(help="A corruption, all or none; more than once. [default: one of each kind, and jpeg]"),
    ] = None,
    severity: Annotated[
        list[int] | None, typer.Option(help="1 to 5; more than once. [default: 1, 3 and 5]", min=1, max=5)
    ] = None,
    outside: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures of none of the classes, a folder or table; more than once."),
    ] = None,
    retrieval: Annotated[
        Path | None, typer.Option(help="Pictures with captions: a table, Karpathy JSON.")
    ] = None,
    cue_conflict: Annotated[
        str, typer.Option(help="made (from the data), a folder of the published set, or none.")
    ] = "made",
    factors: Annotated[
        str | None,
        typer.Option(help="What is unusual about each item: a column of the table, or a JSON file."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="For effective robustness: a model, or an earlier report; three or more."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the data.")] = None,
    names: Annotated[Path | None, typer.Option(help="A file with the names of the classes.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="The table's column of classes. (default: found by its name)")
    ] = None,
    media_column: Annotated[
        str | None, typer.Option(help="The table's column of pictures. (default: found by its name)")
    ] = None,
    media_root: Annotated[
        Path | None, typer.Option(help="The folder that paths start from. (default: the table's)")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most this many items of each set, drawn by hash.", min=1)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where answers are kept. (default: cache, in the folder of --to)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of corruptions, made pictures and the drawn half.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[
        types.Dtype | None, typer.Option(help="Precision of the models. [default: float32]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures per pass through a model.", min=1)] = 32,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut prompts that are too long for a model.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """What one accuracy hides: corruptions, shape or texture, calibration, the outside, prompts, retrieval.

    One report for all MODELS side by side. A section without its data is listed with the option that asks
    for it. Killed at any point, the same command goes on. Exit status 1 if pictures were left out.
    """
    from moviola.verbs.audit import CORRUPTIONS
    from moviola.verbs.audit import audit as run

    chosen = corruption or list(CORRUPTIONS)
    with show.progress(quiet or json, "auditing") as on_progress:
        report = run(
            models,
            data,
            to=to,
            templates=templates,
            corruptions="all" if "all" in chosen else None if chosen == ["none"] else chosen,
            severities=severity or (1, 3, 5),
            outside=outside,
            retrieval=retrieval,
            cue_conflict=None if cue_conflict == "none" else cue_conflict,
            factors=factors,
            prompts=prompts or ("simple", "general"),
            baselines=baseline or (),
            split=split,
            names=names,
            label_column=label_column,
            media_column=media_column,
            media_root=media_root,
            limit=limit,
            cache=cache,
            seed=seed,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            truncate=truncate,
            on_progress=on_progress,
        )
    if json:
        show.print_json(report.to_json())
    else:
        show.out.print(str(report), markup=False)
        if to is not None:
            show.out.print(f"The report is in {types.printable(to)}.", markup=False)
    if not report.ok:
        raise typer.Exit(1)
