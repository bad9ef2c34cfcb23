"""`moviola classify` and `moviola evaluate`: which class it is, and how often that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moviola import types
from moviola.cli import show
from moviola.cli.options import BatchSize, Device, Dtype, Json, Quiet, TokenizerFile


def classify(
    model: Annotated[str, typer.Argument(help="builtin, a folder or file, or a hub id.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures, videos, folders.")],
    classes: Annotated[
        str | None,
        typer.Option(help='Comma-separated: "cat, dog", or a file with one a line. (the model\'s own)'),
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="simple, general, or a file with one template a line ({} = class).")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many classes per file.")] = 5,
    head: Annotated[
        Literal["words", "own"] | None,
        typer.Option(help="By the words for classes, or the model's own classifier. (words, if it has them)"),
    ] = None,
    through_sentences: Annotated[
        bool,
        typer.Option("--through-sentences", help="By what captions say of videos and documents of classes."),
    ] = False,
    captions: Annotated[
        list[Path] | None, typer.Option(help="An observer's file of captions; may be repeated.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option(help="Text about each class: a folder with CLASS.txt, or JSON.")
    ] = None,
    sentence_encoder: Annotated[
        str | None, typer.Option(help="Compare sentences by this model or folder. (MODEL)")
    ] = None,
    min_words: Annotated[int, typer.Option(help="The least words of a document's sentence.", min=1)] = 15,
    encoding: Annotated[str, typer.Option(help="Of the documents of a folder.")] = "utf-8",
    tokenizer: TokenizerFile = None,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: BatchSize = 32,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which class a picture or video shows: by class names in words, or by an adapted model's classifier."""
    from moviola.verbs.classify import classify
    from moviola.verbs.load import as_model

    names = Path(classes) if classes is not None and Path(classes).is_file() else classes
    if through_sentences:
        from moviola.systems.video.zsarcap import ZsarCapConfig
        from moviola.verbs.through_sentences import classify_through_sentences

        if templates is not None or head is not None:
            raise types.UsageError("Through sentences there are neither templates nor a head to choose.")
        with show.progress(quiet or json, "observing") as on_progress:
            made = classify_through_sentences(
                files,
                names,
                captions=captions or [],
                documents=documents,
                encoder=sentence_encoder or model,
                config=ZsarCapConfig(min_words=min_words),
                k=k,
                encoding=encoding,
                device=device,
                dtype=dtype,
                tokenizer=tokenizer,
                on_progress=on_progress,
            )
        show.finish(made, json)
        return
    if captions or documents is not None or sentence_encoder is not None:
        raise types.UsageError(
            "Captions, documents and a sentence encoder are for classifying through sentences.",
            hint="Add --through-sentences.",
        )
    loaded = as_model(model, device=device, dtype=dtype, tokenizer=tokenizer)
    with show.progress(quiet or json, "classifying") as on_progress:
        made = classify(
            loaded,
            files,
            names,
            templates=templates,
            k=k,
            batch_size=batch_size,
            head=head,
            on_progress=on_progress,
        )
    show.finish(made, json)


def evaluate(
    model: Annotated[str, typer.Argument(help="builtin, a folder or file, or a hub id.")],
    data: Annotated[Path, typer.Argument(help="Folder per class, table, Karpathy JSON, MSR-VTT.")],
    task: Annotated[Literal["zero-shot", "retrieval"], typer.Option(help="What to measure.")] = "zero-shot",
    templates: Annotated[str | None, typer.Option(help="simple, general, or a file.")] = None,
    layout: Annotated[
        Literal["auto", "table", "karpathy", "msrvtt"], typer.Option(help="Of a retrieval set.")
    ] = "auto",
    split: Annotated[str, typer.Option(help="Which split of a retrieval set.")] = "test",
    media_root: Annotated[Path | None, typer.Option(help="Where the media lie.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many items.")] = None,
    views: Annotated[
        tuple[int, int], typer.Option(help="Classes of a video by so many clips of it, times so many crops.")
    ] = (1, 1),
    head: Annotated[Literal["words", "own"] | None, typer.Option(help="As in `moviola classify`.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another model on the same items, which are decoded once for all. Repeatable."),
    ] = None,
    tokenizer: TokenizerFile = None,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: BatchSize = 32,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Zero-shot top-1 and top-5, or retrieval R@K, MedR, MeanR both ways."""
    from moviola.verbs.compare import compare
    from moviola.verbs.evaluate import evaluate_retrieval, evaluate_zero_shot
    from moviola.verbs.load import as_model

    loaded = as_model(model, device=device, dtype=dtype, tokenizer=tokenizer)
    common: dict[str, Any] = {"limit": limit, "batch_size": batch_size}
    with show.progress(quiet or json, "evaluating") as on_progress:
        common["on_progress"] = on_progress
        report: Any
        if also:
            if task != "zero-shot" or head is not None or views != (1, 1):
                raise types.UsageError(
                    "--also compares zero-shot figures of one view; leave --task, --head, --views."
                )
            report = compare([loaded, *also], data, templates=templates, device=device, dtype=dtype, **common)
        elif task == "zero-shot":
            report = evaluate_zero_shot(loaded, data, templates=templates, views=views, head=head, **common)
        else:
            report = evaluate_retrieval(
                loaded, data, layout=layout, split=split, media_root=media_root, **common
            )
    show.finish(report, json)
