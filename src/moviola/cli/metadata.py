"""`moviola metadata build` and `moviola metadata check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moviola.cli import show
from moviola.cli.options import Json, Quiet

metadata_app = typer.Typer(
    no_args_is_help=True,
    help="The list of entries that curation balances by: build one from local sources, check one.",
)


def _rule(text: str, paper: str, other: str | None = None) -> typer.models.OptionInfo:
    """An option for a threshold; its default is the paper's for the language.

    In round brackets, since the help takes square ones for markup.
    """
    default = f"(default {paper}; other languages: {other})" if other else f"(default {paper})"
    return typer.Option(help=f"{text} {default}", rich_help_panel="Thresholds")


@metadata_app.command("build")
def metadata_build(
    to: Annotated[Path, typer.Option(help="The list to write: .txt, .json or .parquet.")],
    language: Annotated[str, typer.Option(help="A Wikipedia's name: en, de, zh_yue ...")] = "en",
    wordnet: Annotated[
        Path | None, typer.Option(help="A WordNet database folder, such as /usr/share/wordnet.")
    ] = None,
    words: Annotated[Path | None, typer.Option(help="A list of your own entries, after WordNet's.")] = None,
    dump: Annotated[
        list[Path] | None,
        typer.Option(help="A pages-articles dump (.xml, .bz2, .gz), or a folder; more than once."),
    ] = None,
    views: Annotated[
        list[Path] | None, typer.Option(help="An hourly pageviews file, or a folder; more than once.")
    ] = None,
    numbers: Annotated[int | None, _rule("Numbers from 0 to start with.", "100")] = None,
    unigram_count: Annotated[int | None, _rule("Least count of a word.", "100", "1")] = None,
    unigram_share: Annotated[
        float | None, _rule("Share of the distinct words, most frequent first.", "1", "0.1")
    ] = None,
    unigrams: Annotated[int | None, _rule("At most so many words.", "no limit", "251465")] = None,
    bigram_pmi: Annotated[
        float | None, _rule("Least pointwise mutual information of two words, in bits.", "30")
    ] = None,
    bigram_count: Annotated[int | None, _rule("Least count of two words.", "1")] = None,
    bigrams: Annotated[int | None, _rule("At most so many pairs of words.", "no limit", "100646")] = None,
    title_hourly: Annotated[
        int | None, _rule("Views of a title in an hour below which they are ignored.", "50", "1")
    ] = None,
    title_views: Annotated[int | None, _rule("Least views of a title in all.", "70", "1")] = None,
    title_share: Annotated[
        float | None, _rule("Share of the distinct titles, most viewed first.", "1", "0.76")
    ] = None,
    titles: Annotated[int | None, _rule("At most so many titles.", "no limit", "61235")] = None,
    mobile: Annotated[
        bool | None,
        typer.Option(
            "--mobile/--no-mobile",
            help="Count the mobile site's views. (default no; other languages: yes)",
            rich_help_panel="Thresholds",
        ),
    ] = None,
    longest: Annotated[int | None, _rule("Most characters of an entry.", "no limit", "256")] = None,
    most: Annotated[int | None, _rule("At most so many entries.", "500000", "no limit")] = None,
    matchable: Annotated[
        bool, typer.Option("--matchable", help="Leave out entries that no text can hold.")
    ] = False,
    keep: Annotated[str, typer.Option(help='Marks that may stand inside a word, such as "\'-".')] = "",
    work: Annotated[
        Path | None, typer.Option(help="A folder where counts stay, for resuming and other thresholds.")
    ] = None,
    memory: Annotated[int, typer.Option(help="MB that counting may take.", min=16)] = 1024,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the list if there is one.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a list of entries from WordNet, Wikipedia dumps and page views, all local files.

    The thresholds are those of MetaCLIP for English and of MetaCLIP 2 for other languages.
    """
    from moviola.data.metadata import MetadataRules
    from moviola.verbs.metadata import build

    rules = MetadataRules.of(
        language,
        numbers=numbers,
        unigram_count=unigram_count,
        unigram_share=unigram_share,
        unigrams=unigrams,
        bigram_pmi=bigram_pmi,
        bigram_count=bigram_count,
        bigrams=bigrams,
        title_hourly=title_hourly,
        title_views=title_views,
        title_share=title_share,
        titles=titles,
        mobile=mobile,
        longest=longest,
        most=most,
    )
    with show.progress(quiet or json, "MB read") as on_progress:
        report = build(
            to,
            language=language,
            wordnet=wordnet,
            words=words,
            dumps=dump or (),
            views=views or (),
            rules=rules,
            matchable=matchable,
            keep=keep,
            work=work,
            memory=memory << 20,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    if json:
        show.print_json(report.to_json())
    else:
        print(report)


@metadata_app.command("check")
def metadata_check(
    metadata: Annotated[
        Path, typer.Argument(help="A list (.txt, .json, .parquet), or a folder with one per language.")
    ],
    column: Annotated[str | None, typer.Option(help="The column of a Parquet file.")] = None,
    languages: Annotated[
        bool | None,
        typer.Option(
            "--languages/--no-languages",
            help="Match as for several languages (MetaCLIP 2). (default: for a folder)",
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Show every problem, not the first 20 a kind.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 for warnings too.")] = False,
    json: Json = False,
) -> None:
    """Find duplicate, empty, undecodable and unmatchable entries, and say why each is one.

    Exit status 1 if curation would refuse the list.
    """
    from moviola.verbs.metadata import check

    report = check(metadata, column=column, languages=languages, strict=strict, shown=None if all_ else 20)
    if json:
        show.print_json(report.to_json())
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1)
