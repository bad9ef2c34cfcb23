"""`moviola match`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moviola import types
from moviola.cli import show


def match(
    text: Annotated[str, typer.Argument(help='What is to be seen, such as "a dog chasing a cat".')],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, and folders with pictures.")],
    model: Annotated[str, typer.Option(help="builtin, a folder or file, or a hub id.")] = "builtin",
    regions: Annotated[
        Path | None,
        typer.Option(
            help="JSON of boxes: by picture, by phrase, lists of left, top, right, bottom. "
            "(default: found by the model's own patches)"
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="JSON of the phrases that mean an entity: by picture, by entity. (default: by words)"
        ),
    ] = None,
    parse: Annotated[
        Path | None, typer.Option(help="JSON of the sentence's parse. (default: taken apart by rules)")
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server that takes the sentence apart instead."),
    ] = None,
    chat_model: Annotated[str | None, typer.Option(help="The name of that server's model.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="Show so many. (default: all)", min=1)] = None,
    rerank: Annotated[
        int | None,
        typer.Option(help="Compare only so many pictures, those with the best plain score.", min=1),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows the boxes.")] = None,
    scores: Annotated[
        Literal["cosine", "dot"], typer.Option(help="Cosines, or dot products as on ComVG.")
    ] = "cosine",
    weights: Annotated[
        Literal["guarded", "ratio", "softmax"], typer.Option(help="How sub-images are weighed.")
    ] = "guarded",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[
        types.Dtype | None, typer.Option(help="Precision of the model. [default: float32]")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="For checkpoints without one.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures per pass through the model.", min=1)] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a sentence that is too long.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Which of PICTURES the sentence TEXT fits, looking at its things one by one (ComCLIP).

    Exit status 1 if pictures could not be compared.
    """
    from moviola.verbs.match import chat_parser
    from moviola.verbs.match import match as run

    with show.progress(quiet or json, "comparing") as on_progress:
        made = run(
            text,
            pictures,
            model,
            regions=regions,
            table=table,
            parser=None if chat is None else chat_parser(chat, chat_model),
            parse=parse,
            k=k,
            rerank=rerank,
            html=html,
            scores=scores,
            weights=weights,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            batch_size=batch_size,
            truncate=truncate,
            on_progress=on_progress,
        )
    if json:
        show.print_json(made.to_json())
    else:
        show.table(("file", "score", "plain", "weights"), made.rows())
        for note in made.notes:
            show.out.print(note, markup=False)
        show.skipped(made.failed, "could not be compared")
    if not made.ok:
        raise typer.Exit(1)
