"""`moviola reinforce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moviola import types
from moviola.cli import show


def reinforce(
    pairs: Annotated[
        list[str],
        typer.Argument(help="Parquet, CSV, TSV, JSON Lines or WebDataset tars: files, folders, globs."),
    ],
    to: Annotated[Path, typer.Option(help="The folder to write; it appears when the run is whole.")],
    teacher: Annotated[
        list[str],
        typer.Option(help="builtin, a model's folder or file, or a hub id; more than once for several."),
    ],
    augmentations: Annotated[int, typer.Option(help="Strong augmentations of each picture.", min=1)] = 10,
    synthetic: Annotated[
        list[str] | None,
        typer.Option(
            help="A column with captions from a captioner; more than once for several. "
            "(default: other captions of the pair)"
        ),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="The column with pictures, as bytes or paths. (default: found by its name)"),
    ] = None,
    text_column: Annotated[
        list[str] | None,
        typer.Option(help="A column with captions; more than once for several. (default: found by its name)"),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="The column that names a pair for good. (default: found by its name)")
    ] = None,
    media_root: Annotated[
        Path | None, typer.Option(help="The folder that paths start from. (default: the table's)")
    ] = None,
    area: Annotated[
        tuple[float, float], typer.Option(help="Least and largest share of the picture that a crop keeps.")
    ] = (0.08, 1.0),
    operations: Annotated[
        int, typer.Option(help="Colour and geometry operations of an augmentation.", min=0)
    ] = 2,
    strength: Annotated[float, typer.Option(help="Their strength.", min=0, max=1)] = 0.3,
    mirror: Annotated[float, typer.Option(help="The chance of mirroring.", min=0, max=1)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the augmentations.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[
        types.Dtype | None, typer.Option(help="Precision of the teachers. [default: float32]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures per pass through a teacher.", min=1)] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Store with PAIRS what teachers say of augmented pictures and of captions, to train on without them.

    Killed at any point, the same command goes on. Exit status 1 if rows were left out.
    """
    from moviola.verbs.reinforce import reinforce as run

    with show.progress(quiet or json, "reinforcing") as on_progress:
        made = run(
            pairs,
            to,
            teachers=teacher,
            augmentations=augmentations,
            synthetic=synthetic or (),
            image_column=image_column,
            text_columns=text_column or (),
            id_column=id_column,
            media_root=media_root,
            area=area,
            operations=operations,
            strength=strength,
            mirror=mirror,
            seed=seed,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    if json:
        show.print_json(made.to_json())
    else:
        show.out.print(str(made), markup=False)
    if not made.ok:
        raise typer.Exit(1)
