"""Every command of `moviola`. Options repeat the verbs' arguments; the work is in `moviola.verbs`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moviola.cli import show
from moviola.cli.adapt import adapt
from moviola.cli.audit import audit
from moviola.cli.curate import curate_app
from moviola.cli.match import match
from moviola.cli.metadata import metadata_app
from moviola.cli.options import BatchSize, Device, Dtype, Json, Quiet, TokenizerFile
from moviola.cli.recognise import ByTask, recognise_command
from moviola.cli.reinforce import reinforce
from moviola.cli.score import classify, evaluate
from moviola.cli.train import train_command

app = typer.Typer(
    name="moviola",
    help="Find moments in your own videos with words; build, adapt and measure CLIP-like models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class _PathsFirst(TyperGroup):
    """`moviola index PATH... --to INDEX` beside `moviola index list|remove|stats`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["update", *args]
        return super().parse_args(ctx, args)


Model = Annotated[str, typer.Option("--model", help="builtin, a folder or file, or a hub id.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import moviola

        print(moviola.__version__)
        raise typer.Exit


# ------------------------------------------------------------------------------------ index and search

index_app = typer.Typer(
    cls=_PathsFirst,
    no_args_is_help=True,
    help="moviola index PATH... --to INDEX: embed pictures and videos. Or: list, remove, stats.",
)
app.add_typer(index_app, name="index")
app.add_typer(curate_app, name="curate")
app.add_typer(metadata_app, name="metadata")
train_app = typer.Typer(cls=ByTask, help="Train on pairs, or --task recognition on clips by class.")
train_app.command("pairs")(train_command)
train_app.command("recognition")(recognise_command)
app.add_typer(train_app, name="train")
app.command()(reinforce)
app.command()(adapt)
app.command()(audit)
app.command()(match)
app.command()(classify)
app.command()(evaluate)


@index_app.command("update")
def index_update(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders with pictures and videos.")],
    to: Annotated[Path, typer.Option(help="The index, a folder.")],
    model: Annotated[
        str | None, typer.Option(help="builtin, a folder or file, or a hub id. Default: the index's own.")
    ] = None,
    every: Annotated[float | None, typer.Option(help="Seconds between frames. [default: 1]")] = None,
    keyframes: Annotated[bool, typer.Option("--keyframes", help="Only key frames: much faster.")] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: BatchSize = 32,
    tokenizer: TokenizerFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring INDEX up to date with PATHS: new and changed files are embedded, vanished ones forgotten.

    Killed at any point, the same command goes on. Exit status 1 if a file could not be read.
    """
    from moviola.verbs.index import NothingIndexed, index

    try:
        with show.progress(quiet or json, "indexing") as on_progress:
            report = index(
                paths,
                to,
                model=model,
                every=every,
                keyframes=keyframes,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                tokenizer=tokenizer,
                on_progress=on_progress,
            )
    except NothingIndexed as nothing:
        show.skipped(nothing.report.failed, "could not be read")
        raise
    if json:
        show.print_json(report.to_json())
    else:
        print(report.summary())
    if not report.ok:
        raise typer.Exit(1)


@index_app.command("list")
def index_list_(index: Path, json: Json = False) -> None:
    """The files of an index."""
    from moviola.verbs.index import index_list

    files = [file.to_json() for file in index_list(index)]
    if json:
        show.print_json({"files": files})
    elif files:
        show.table(list(files[0]), [list(file.values()) for file in files])


@index_app.command("remove")
def index_remove_(
    index: Path, files: Annotated[list[Path], typer.Argument(help="Files to forget.")], json: Json = False
) -> None:
    """Forget FILES (the files themselves stay)."""
    from moviola.verbs.index import index_remove

    count = index_remove(index, files)
    if json:
        show.print_json({"removed": count})
    else:
        print(f"{count} removed from the index.")


@index_app.command("stats")
def index_stats_(index: Path, json: Json = False) -> None:
    """How much an index holds, and with which model it was made."""
    from moviola.verbs.index import index_stats

    stats = index_stats(index)
    if json:
        show.print_json(stats)
    else:
        show.pairs(stats)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="The index to ask.")],
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many moments.")] = 10,
    image: Annotated[Path | None, typer.Option(help="Look for what this picture shows.")] = None,
    text: Annotated[str | None, typer.Option(help="Words in file names and subtitles.")] = None,
    within: Annotated[
        list[str] | None, typer.Option("--in", help="Only these files, folders or patterns.")
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out weaker moments.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a query that is too long.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report.")] = None,
    clips: Annotated[Path | None, typer.Option(help="Also write the moments as files here.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    tokenizer: TokenizerFile = None,
    json: Json = False,
) -> None:
    """The best moments for words, a picture, or words in subtitles."""
    from moviola.verbs.report import report
    from moviola.verbs.search import NothingFound, save_clips, search

    try:
        results = search(
            index,
            query,
            image=image,
            text=text,
            k=k,
            within=within,
            min_score=min_score,
            truncate=truncate,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
        )
    except NothingFound as nothing:
        if json:
            show.print_json({"results": [], "reason": str(nothing)})
        else:
            show.err.print(str(nothing), markup=False)
        raise typer.Exit(1) from None
    if json:
        show.print_json(results.to_json())
    else:
        show.moments(results)
    if html:
        report(results, html)
        show.err.print(f"Report: {html}", markup=False)
    if clips:
        written = save_clips(results, clips)
        show.err.print(f"{len(written)} files in {clips}", markup=False)


# --------------------------------------------------------------------------------------------- models


@app.command()
def info(
    checkpoint: Annotated[str, typer.Argument(help="builtin, a folder or file, or a hub id.")] = "builtin",
    json: Json = False,
) -> None:
    """What a checkpoint is: architecture, activation, recipe, hash, licence if stated."""
    from moviola.verbs.load import info

    data = info(checkpoint)
    if json:
        show.print_json(data)
    else:
        show.pairs(data)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="builtin, a folder or file, or a hub id.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[str, typer.Option(help="hf or openclip.")] = "hf",
    tokenizer: TokenizerFile = None,
) -> None:
    """Write a model in Hugging Face or OpenCLIP format."""
    from moviola.verbs.load import as_model, export

    folder = export(as_model(model, device="cpu", tokenizer=tokenizer), to, format=format)
    print(folder)


@app.command()
def embed(
    files: Annotated[list[Path] | None, typer.Argument(help="Pictures, videos, folders.")] = None,
    to: Annotated[Path, typer.Option(help="vectors.parquet or vectors.npy")] = Path("vectors.parquet"),
    text_file: Annotated[Path | None, typer.Option(help="Embed the lines of this file instead.")] = None,
    model: Model = "builtin",
    every: Annotated[float | None, typer.Option(help="One vector per frame, this many s apart.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    tokenizer: TokenizerFile = None,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: BatchSize = 32,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Vectors of pictures, videos or lines of text, as Parquet or NumPy."""
    from moviola.verbs.embed import embed
    from moviola.verbs.load import as_model

    loaded = as_model(model, device=device, dtype=dtype, tokenizer=tokenizer)
    with show.progress(quiet or json, "embedding") as on_progress:
        made = embed(
            files,
            text_file=text_file,
            to=to,
            model=loaded,
            batch_size=batch_size,
            every=every,
            truncate=truncate,
            on_progress=on_progress,
        )
    if json:
        show.print_json(made.to_json())
    else:
        print(f"{made.count} vectors of {made.dim} in {to}")
        show.skipped(made.failed)
        show.skipped(made.damaged, "read in part")
    if not made.ok:
        raise typer.Exit(1)


# -------------------------------------------------------------------------------------------- systems


@app.command()
def systems(json: Json = False) -> None:
    """The published systems of the house."""
    from moviola.verbs.systems_page import systems_json

    listed = systems_json()
    if json:
        show.print_json(listed)
    else:
        rows = listed["systems"]
        show.table(list(rows[0]), [list(row.values()) for row in rows])


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="A system's name; see `moviola systems`.")],
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 3,
    json: Json = False,
) -> None:
    """Run a system's claim in miniature: all arms, mean and spread, wall time."""
    from moviola.verbs.reproduce import reproduce

    say = partial(show.err.print, markup=False) if json else partial(show.out.print, markup=False)
    report = reproduce(slug, seeds=tuple(range(seeds)), say=say)
    if json:
        show.print_json(report.to_json())


@app.command()
def demo(
    to: Annotated[Path, typer.Option(help="Where the index and the report go.")] = Path("demo-out"),
    media: Annotated[
        Path | None, typer.Option(help="Your own folder instead of the made videos and pictures.")
    ] = None,
    query: Annotated[list[str] | None, typer.Option(help="Your own search; may be repeated.")] = None,
    model: Model = "builtin",
    json: Json = False,
) -> None:
    """Index a few made videos and pictures (or your own), search them, and write an HTML report."""
    from moviola.verbs.demo import demo

    with show.progress(json, "indexing") as on_progress:
        made = demo(to, media=media, queries=query, model=model, on_progress=on_progress)
    if json:
        show.print_json(made.to_json())
    else:
        for number, results in enumerate(made.searches):
            show.out.print(f'\nmoviola search {made.index} "{results.query}"', markup=False)
            if number < len(made.planted):
                show.planted(made.planted[number])
            show.moments(results)
        show.out.print(f"\nReport: {os.fspath(made.page)}", markup=False)
    if not made.indexed.ok:
        raise typer.Exit(1)
