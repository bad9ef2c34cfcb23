"""`moviola adapt`: a model for the user's own classes. The work is in `moviola.verbs.adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moviola.cli import show
from moviola.cli.options import named_values
from moviola.types import UsageError


def adapt(
    data: Annotated[Path, typer.Option(help="A folder per class, or a table with a class column.")],
    to: Annotated[Path, typer.Option(help="The adapted model, a folder.")],
    method: Annotated[
        str, typer.Option(help="linear-probe, nearest-mean, gda-clip, maple, gopro; vr-lwf with --tasks.")
    ] = "gda-clip",
    model: Annotated[str, typer.Option(help="builtin, a folder or file, or a hub id.")] = "builtin",
    shots: Annotated[
        int | None, typer.Option(help="Pictures of each class to learn from. (all but a fifth)", min=1)
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Other labelled pictures to measure on.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Which classes, and their names: a file, or comma-separated.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, val ...: where the data has splits.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of a table.")] = None,
    media_column: Annotated[str | None, typer.Option(help="Of a table.")] = None,
    media_root: Annotated[Path | None, typer.Option(help="Where a table's files lie.")] = None,
    templates: Annotated[str | None, typer.Option(help="simple, general, or a file.")] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Learn without labels (gda-clip): --data is any folder.")
    ] = False,
    new_classes: Annotated[
        str | None, typer.Option(help="Classes without pictures, known by name (gda-clip): a, b, c.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help='Learn in turn: 5, or "cat, dog; car, truck" (vr-lwf and its kin).')
    ] = None,
    unrelated: Annotated[
        Path | None, typer.Option(help="With --tasks: labelled pictures never learned, to see forgetting.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option of the method.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Of methods that train.")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of --epochs.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of pictures, and of training.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="For checkpoints without one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Adapt a frozen model to your classes from a few pictures of each.

    The pictures it did not learn from tell what it is worth, beside zero-shot on the same ones.
    """
    common: dict[str, Any] = {
        "method": method,
        "model": model,
        "shots": shots,
        "names": class_names(classes),
        "split": split,
        "label_column": label_column,
        "media_column": media_column,
        "media_root": media_root,
        "templates": templates,
        "options": named_values(set_, "--set", parse=True),
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "tokenizer": tokenizer,
        "device": device,
    }
    if tasks is None and unrelated is not None:
        raise UsageError("--unrelated goes with --tasks.")
    with show.progress(quiet or json, "adapting") as on_progress:
        if tasks is not None:
            for option, value in (("--test", test), ("--new-classes", new_classes)):
                if value is not None:
                    raise UsageError(f"{option} does not go with --tasks.")
            from moviola.verbs.adapt_tasks import adapt_tasks, read_tasks

            report: Any = adapt_tasks(
                data, to, tasks=read_tasks(tasks), unrelated=unrelated, on_progress=on_progress, **common
            )
        else:
            from moviola.verbs.adapt import adapt as run

            report = run(
                data,
                to,
                test=test,
                unlabelled=unlabelled,
                new_classes=new_classes,
                on_progress=on_progress,
                **common,
            )
    if json:
        show.print_json(report.to_json())
    else:
        show.out.print(str(report), markup=False)


def class_names(classes: str | None) -> Path | list[str] | None:
    if classes is None:
        return None
    if Path(classes).is_file():
        return Path(classes)
    return [name.strip() for name in classes.split(",")]
