"""`moviola train`: the options of a training run. The work is in `moviola.verbs.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moviola.cli import show
from moviola.cli.options import named_values


def train_command(
    data: Annotated[
        list[str], typer.Argument(help="Parquet, CSV, JSONL, WebDataset tars, folders or globs of pairs.")
    ],
    to: Annotated[Path, typer.Option(help="The run's folder. The same command goes on after a kill.")],
    objective: Annotated[
        list[str] | None,
        typer.Option(help="clip, siglip or a system's slug. Several add up: clip, siglip=0.5. (clip)"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="The model to start from: builtin, a folder, file or hub id. (builtin)"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A new model: a preset or a JSON file.")] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="New weights for the --init model.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="Your Python file with config = moviola.TrainRun(...).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option of the objective.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="ROLE=COLUMN, for example image=jpg or caption=alt_text.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where relative picture paths start.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's file.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    epochs: Annotated[float | None, typer.Option(help="Instead of --steps. (5)")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Pairs a step, over all processes.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Pairs in the towers at a time: less memory, same result.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    lr_floor: Annotated[
        float | None, typer.Option(help="Share of it left at the end. (the system's own, or 0)")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    clip_grad: Annotated[float | None, typer.Option(help="Largest gradient norm. (1)")] = None,
    keep_statistics: Annotated[
        bool, typer.Option("--keep-statistics", help="BatchNorm keeps the statistics that it came with.")
    ] = False,
    precision: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="(float32)")] = None,
    episode_steps: Annotated[int | None, typer.Option(help="Steps between clusterings (protoclip).")] = None,
    crop_area: Annotated[
        tuple[float, float] | None, typer.Option(help="Share of a picture that a crop keeps. (0.9 1)")
    ] = None,
    flip: Annotated[float | None, typer.Option(help="Chance of mirroring. (0)")] = None,
    hold_out: Annotated[int | None, typer.Option(help="Pairs kept to measure retrieval.")] = None,
    probe: Annotated[
        Path | None, typer.Option(help="Labelled pictures for zero-shot accuracy before and after.")
    ] = None,
    probe_every: Annotated[int | None, typer.Option(help="Steps between measurements.")] = None,
    probe_limit: Annotated[int | None, typer.Option(help="Labelled pictures used. (1000)")] = None,
    average: Annotated[
        float | None,
        typer.Option(help="Also save weights averaged with those before, against forgetting: 0.5."),
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory for a third more work.")
    ] = False,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of metrics. (10)")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode pictures. (0)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps. (auto)")] = None,
    seed: Annotated[int | None, typer.Option(help="(0)")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a model on pairs of pictures and texts, by any objective of the house.

    Video encoders that name classes: moviola train --task recognition --help.
    On several GPUs: torchrun --nproc-per-node 8 -m moviola train ... (needs the extra named train).
    """
    given: dict[str, Any] = {
        "objective": tuple(objective) if objective else None,
        "init": init,
        "model": model,
        "scratch": scratch or None,
        "options": named_values(set_, "--set", parse=True),
        "columns": named_values(column, "--column", parse=False),
        "image_root": image_root,
        "tokenizer": tokenizer,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "lr": lr,
        "lr_floor": lr_floor,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip_grad": clip_grad,
        "keep_statistics": keep_statistics or None,
        "precision": precision,
        "episode_steps": episode_steps,
        "crop_area": crop_area,
        "flip": flip,
        "hold_out": hold_out,
        "probe": probe,
        "probe_every": probe_every,
        "probe_limit": probe_limit,
        "average": average,
        "checkpoint_activations": checkpoint_activations or None,
        "save_every": save_every,
        "log_every": log_every,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    from moviola.verbs.train import train
    from moviola.verbs.train_run import read_run

    run = None if config is None else read_run(config)
    changes = {name: value for name, value in given.items() if value is not None}
    with show.progress(quiet or json, "training") as on_progress:
        report = train(data, to, run, on_progress=on_progress, **changes)
    if json:
        show.print_json(report.to_json())
    else:
        show.out.print(str(report), markup=False)
