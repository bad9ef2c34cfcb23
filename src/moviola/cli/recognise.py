"""`moviola train --task recognition`: video encoders that name classes. The work is in `verbs.recognise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from moviola.cli import show
from moviola.cli.adapt import class_names
from moviola.cli.options import named_values
from moviola.types import UsageError


class ByTask(TyperGroup):
    """`moviola train ... --task NAME` runs the command NAME; without the option `pairs`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        task, rest = "pairs", list(args)
        for place, one in enumerate(args):
            name, equals, value = one.partition("=")
            if name == "--task":
                task = value if equals else (args[place + 1] if place + 1 < len(args) else "")
                rest = args[:place] + args[place + (1 if equals else 2) :]
                break
        if task not in self.commands:
            raise UsageError(f"There is no task {task!r}.", hint=f"There are: {', '.join(self.commands)}.")
        return super().parse_args(ctx, [task, *rest])


def recognise_command(
    to: Annotated[Path, typer.Option(help="The run's folder. The same command goes on after a kill.")],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A folder per class of clips, a table, or a list of Kinetics, UCF101, HMDB51, SSv2."
        ),
    ] = None,
    data_option: Annotated[Path | None, typer.Option("--data", help="The same as an option.")] = None,
    objective: Annotated[
        str, typer.Option(help="A video system's slug, or clip: the mean of the frames.")
    ] = "vifi-clip",
    init: Annotated[
        str, typer.Option(help="The model to start from: builtin, a folder, file or hub id.")
    ] = "builtin",
    model: Annotated[
        str | None, typer.Option(help="A new model: a preset, for systems that learn without words.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Other clips to measure on. (a fifth of the clips)")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Clips of each class to learn from. (all)", min=1)] = None,
    base_to_new: Annotated[
        bool, typer.Option("--base-to-new", help="Learn half of the classes, measure both halves.")
    ] = False,
    views: Annotated[
        tuple[int, int], typer.Option(help="Clips and crops of a video when it is measured.")
    ] = (4, 3),
    frames: Annotated[
        int | None,
        typer.Option(help="Frames of a clip, where the model takes any number. (the system's own)", min=1),
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="A sentence with {} for the class, a set or a file.")
    ] = None,
    layout: Annotated[
        Literal["kinetics", "ucf101", "hmdb51", "ssv2", "numbered"] | None,
        typer.Option(help="The format of a list. (told by its name and content)"),
    ] = None,
    media_root: Annotated[Path | None, typer.Option(help="Where the files of a list or table lie.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Which classes, and their names: a file, or comma-separated.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, val ...: where the data has splits.")] = None,
    fold: Annotated[int, typer.Option(help="Which split of UCF101 and HMDB51: 1, 2 or 3.", min=1)] = 1,
    label_column: Annotated[str | None, typer.Option(help="Of a table.")] = None,
    media_column: Annotated[str | None, typer.Option(help="Of a table.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option of the objective.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="How long. (the system's own, or 10)")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of --epochs.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips a step. (32, or fewer)", min=1)] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Clips in the tower at a time: less memory.", min=1)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up. (a tenth)", min=0)] = None,
    keep_statistics: Annotated[
        bool | None,
        typer.Option(help="Whether BatchNorm keeps its statistics. (if the model has words)"),
    ] = None,
    precision: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="(float32)")] = None,
    crop_area: Annotated[
        tuple[float, float] | None, typer.Option(help="Share of a frame that a crop keeps. (0.4 1)")
    ] = None,
    flip: Annotated[
        float | None, typer.Option(help="Chance of mirroring. (0.5; 0 with classes that say left or right)")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of each class to measure on, without --test.")] = 0.2,
    most_test: Annotated[int | None, typer.Option(help="At most so many clips to measure on.")] = None,
    measure_every: Annotated[int | None, typer.Option(help="Steps between measurements.", min=1)] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode clips.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the draw of clips, and of training.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="For checkpoints without one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fine-tune a video encoder to name the classes of your clips, and measure it before and after."""
    if (data is None) == (data_option is None):
        raise UsageError("Name the clips once: as an argument, or with --data.")
    from moviola.verbs.recognise import recognise

    with show.progress(quiet or json, "training") as on_progress:
        report = recognise(
            data or data_option or "",
            to,
            objective=objective,
            options=named_values(set_, "--set", parse=True),
            init=init,
            model=model,
            test=test,
            shots=shots,
            base_to_new=base_to_new,
            templates=templates,
            layout=layout,
            split=split,
            fold=fold,
            names=class_names(classes),
            media_root=media_root,
            label_column=label_column,
            media_column=media_column,
            held_out=held_out,
            most_test=most_test,
            views=views,
            measure_every=measure_every,
            frames=frames,
            crop_area=crop_area,
            flip=flip,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            lr=lr,
            warmup=warmup,
            keep_statistics=keep_statistics,
            precision=precision,
            workers=workers,
            seed=seed,
            device=device,
            tokenizer=tokenizer,
            on_progress=on_progress,
        )
    if json:
        show.print_json(report.to_json())
    else:
        show.out.print(str(report), markup=False)
