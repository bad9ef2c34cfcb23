"""`match`: which of a few pictures a sentence fits, looking at its things one by one (ComCLIP).

Axis letters: N pictures, D embedding width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from moviola.types import Clip, Dtype, UsageError, printable
from moviola.verbs.classify import refuse_without_words
from moviola.verbs.common import Progress, Skipped, embed_media, looks, resolve, summary

if TYPE_CHECKING:
    from PIL import Image

    from moviola.clip.loaded import Model
    from moviola.parts.regions import Dense, Regions
    from moviola.parts.sentence_parser import Parse, Parser
    from moviola.systems.retrieval.comclip import ComClip, Matched, Pair

_AT_ONCE = 16  # pictures held in memory together
NO_SCORE = "the model gave no finite score for it"
_PREVIEW = 360  # rows of a picture on the page


class NothingMatched(UsageError):
    """Not one picture could be compared; `failed` says why."""

    def __init__(self, problem: str, failed: Sequence[Skipped], *, hint: str | None = None) -> None:
        super().__init__(problem, hint=hint)
        self.failed = tuple(failed)


@dataclass(frozen=True)
class MatchedFile:
    """A picture's score, its plain cosine, and the sub-images that were weighed.

    `size` is (width, height) of the upright picture, which the boxes are in; `preview` a small JPEG where
    a page is written.
    """

    file: str
    size: tuple[int, int]
    matched: Matched
    preview: bytes | None = None

    @property
    def score(self) -> float:
        return self.matched.score

    @property
    def plain(self) -> float:
        return self.matched.plain

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "score": round(self.score, 6),
            "plain": round(self.plain, 6),
            "parts": [
                {
                    "key": part.key,
                    "kind": part.kind,
                    "weight": round(part.weight, 6),
                    "fit": round(part.fit, 6),
                    "boxes": [[round(side, 2) for side in box] for box in part.boxes],
                }
                for part in self.matched.parts
            ],
            "note": self.matched.note,
        }


@dataclass(frozen=True)
class MatchReport:
    """Pictures, best first, and what the sentence was taken apart into."""

    results: tuple[MatchedFile, ...]
    parse: Parse
    model: str
    regions: Literal["given", "own patches"]
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> MatchedFile:
        return self.results[0]

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "sentence": self.parse.sentence,
            "parse": self.parse.to_json(),
            "model": self.model,
            "regions": self.regions,
            "results": [one.to_json() for one in self.results],
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Cells for a table: file, score, plain score, then each sub-image's words and weight."""
        return [
            (
                printable(one.file),
                f"{one.score:.4f}",
                f"{one.plain:.4f}",
                ", ".join(f"{part.key} {part.weight:.2f}" for part in one.matched.parts) or "-",
            )
            for one in self.results
        ]

    def __str__(self) -> str:
        lines = ["  ".join(row) for row in self.rows()]
        return "\n".join([*lines, *self.notes, *summary(self.failed, "could not be compared")])


def match(
    text: str,
    pictures: str | Path | Sequence[str | Path],
    model: str | Path | Model = "builtin",
    *,
    regions: str | Path | Mapping[str, Dense] | None = None,
    table: str | Path | Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    parser: Parser | None = None,
    parse: str | Path | Parse | Mapping[str, Any] | None = None,
    k: int | None = None,
    rerank: int | None = None,
    html: str | Path | None = None,
    scores: Literal["cosine", "dot"] = "cosine",
    weights: Literal["guarded", "ratio", "softmax"] = "guarded",
    overlay: Literal["mask", "grey"] = "mask",
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 32,
    truncate: bool = False,
    on_progress: Progress | None = None,
) -> MatchReport:
    """ComCLIP's score of a sentence with every picture under `pictures`, the `k` best first.

    regions  a dense captioner's boxes: {picture: {phrase: [[left, top, right, bottom], ...]}}, as JSON or a
             file of it; only a phrase's first box is used. A picture goes by its path or its name. None:
             boxes are looked for in the model's own patches
    table    which phrases mean which entity: {picture: {entity: [phrases]}}. None: those that hold all words
             of its name (`parts.regions.by_words`)
    parser   takes the sentence apart; None is `RuleParser`, which needs no model
    parse    the parse itself, or its JSON or a file of it, instead of a parser
    rerank   compare only the so many pictures that fit best by their plain cosine; the others are left out
    html     write a page that shows the boxes
    scores, weights, overlay   see `ComClipConfig`

    Pictures that cannot be compared stand in `failed`; `NothingMatched` if none could.
    """
    from moviola.media import walk
    from moviola.systems.retrieval.comclip import ComClip, ComClipConfig, Pair

    for name, value in (("k", k), ("rerank", rerank)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    if table is not None and regions is None:
        raise UsageError(
            "A match table names phrases, and there are no phrases without regions.",
            hint="Give regions too (--regions boxes.json).",
        )
    taken = taken_apart(text, parser, parse)
    dense = None if regions is None else Named(regions, "regions")
    phrases = None if table is None else Named(table, "match table")
    loaded = resolve(model, device=device, dtype=dtype, tokenizer=tokenizer)
    refuse_without_words(loaded, "match")
    config = ComClipConfig(scores=scores, weights=weights, overlay=overlay)
    matcher = ComClip(loaded, config, batch_size=batch_size, truncate=truncate)

    failed: list[Skipped] = []
    found = list(walk(pictures, on_skip=lambda path, reason: failed.append(Skipped(str(path), reason))))
    failed += [
        Skipped(str(one.path), "it is a video, and match compares pictures")
        for one in found
        if one.kind == "video"
    ]
    names = [str(one.path) for one in found if one.kind == "picture"]
    notes = []
    if rerank is not None and len(names) > rerank:
        notes.append(f"{len(names) - rerank} pictures that fit less by their plain cosine were left out.")
        names = _shortlist(loaded, taken.sentence, names, rerank, batch_size, failed, truncate)

    results: list[MatchedFile] = []
    total = len(names) + len(failed)
    for group in _groups(loaded, names, failed):
        pairs: dict[str, Pair] = {}
        for name, picture in group:
            try:
                boxes = None if dense is None else located(taken, picture, name, dense, phrases)
                pairs[name] = Pair(taken, picture, boxes)
            except UsageError as error:
                failed.append(Skipped(name, error.problem))
        results += _compare(matcher, list(pairs), list(pairs.values()), html is not None, failed)
        if on_progress is not None:
            on_progress(len(results) + len(failed), total, group[-1][0])
    if not results:
        raise NothingMatched(
            f"Nothing was compared: none of the {len(failed)} files could be used. The first: {failed[0]}."
            if failed
            else "Nothing was compared: there are no pictures under the given paths.",
            failed,
            hint=None if failed else "Name files like .jpg, or a folder that holds some.",
        )
    results.sort(key=lambda one: -one.score)
    if not taken.entities:
        notes.insert(0, "No thing was found in the sentence, so the scores are plain cosines.")
    if dense is None:
        notes += _vague(results)
    report = MatchReport(
        tuple(results[:k]),
        taken,
        loaded.name,
        "own patches" if dense is None else "given",
        tuple(failed),
        tuple(notes),
    )
    if html is not None:
        from moviola.verbs.match_page import write_page

        write_page(report, html)
    return report


def _vague(results: Sequence[MatchedFile]) -> list[str]:
    """A note where patches could not tell where a thing is."""
    shown = [
        (right - left + 1) * (bottom - top + 1) / (one.size[0] * one.size[1])
        for one in results
        for part in one.matched.parts
        if part.kind == "entity"
        for left, top, right, bottom in part.boxes
    ]
    vague = sum(share > 0.9 for share in shown)
    if not vague:
        return []
    return [
        f"{vague} of the {len(shown)} boxes cover all of a picture and tell nothing. Give boxes (--regions)."
    ]


def _shortlist(
    model: Model,
    sentence: str,
    names: Sequence[str],
    count: int,
    batch_size: int,
    failed: list[Skipped],
    truncate: bool,
) -> list[str]:
    """The pictures nearest to the sentence by one vector each, in the order given."""
    text_D = model.embed_texts(sentence, truncate=truncate)[0]
    near: dict[int, float] = {}
    items = ((n, name, Clip(Path(name))) for n, name in enumerate(names))
    for group, vectors_ND in embed_media(
        model, items, batch_size=batch_size, on_skip=lambda _, one: failed.append(one)
    ):
        near.update(zip([n for n, _, _ in group], (vectors_ND @ text_D).tolist(), strict=True))
    return [names[n] for n in sorted(sorted(near, key=lambda n: -near[n])[:count])]


def _groups(
    model: Model, names: Sequence[str], failed: list[Skipped]
) -> Iterator[list[tuple[str, Image.Image]]]:
    """Names and pictures, some at a time."""
    items = ((n, name, Clip(Path(name))) for n, name in enumerate(names))
    group: list[tuple[str, Image.Image]] = []
    for _, name, look in looks(items, model, on_skip=lambda _, one: failed.append(one)):
        assert look.picture is not None
        group.append((name, look.picture))
        if len(group) == _AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _compare(
    matcher: ComClip,
    names: Sequence[str],
    pairs: Sequence[Pair],
    preview: bool,
    failed: list[Skipped],
) -> Iterator[MatchedFile]:
    from moviola.media import jpeg

    for name, pair, matched in zip(names, pairs, matcher.match(pairs), strict=True):
        if not math.isfinite(matched.score):
            failed.append(Skipped(name, matched.note or NO_SCORE))
            continue
        small = jpeg(pair.picture, height=_PREVIEW) if preview else None
        yield MatchedFile(name, pair.picture.size, matched, small)


# --------------------------------------------------------------------------------------------------
# Parses and regions as users give them
# --------------------------------------------------------------------------------------------------


def taken_apart(
    text: str, parser: Parser | None = None, parse: str | Path | Parse | Mapping[str, Any] | None = None
) -> Parse:
    """The sentence's parse: the one given, or what the parser says."""
    from moviola.parts.sentence_parser import Parse, RuleParser

    if not text.strip():
        raise UsageError("The sentence is empty.", hint='Say what is to be seen: "a dog chasing a cat"')
    if parse is None:
        return (parser or RuleParser()).parse(text)
    if parser is not None:
        raise UsageError("Give a parser or a parse, not both.")
    if isinstance(parse, str | Path):
        parse = cast("Mapping[str, Any]", read_json(parse, "parse"))
    made = parse if isinstance(parse, Parse) else Parse.from_json(parse, text)
    if made.sentence.split() != text.split():
        raise UsageError(f"The parse is of another sentence: {made.sentence!r}, not {text!r}.")
    return replace(made, sentence=text)


def chat_parser(url: str, model: str | None = None) -> Parser:
    """A parser that asks the language model of an OpenAI-compatible server."""
    from moviola.parts.chat import ChatServer
    from moviola.parts.chat_parser import ChatParser

    return ChatParser(ChatServer(url, model))


def read_json(path: str | Path, what: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The {what} {printable(path)} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UsageError(f"The {what} {printable(path)} is not JSON ({error}).") from error


class Named:
    """A table by picture, which goes by its path, its name, or its name without the ending."""

    def __init__(self, given: str | Path | Mapping[str, Any], what: str) -> None:
        data = read_json(given, what) if isinstance(given, str | Path) else given
        if not isinstance(data, Mapping) or not all(isinstance(one, Mapping) for one in data.values()):
            raise UsageError(
                f"The {what} must be an object of objects, one for each picture.",
                hint='Like {"a.jpg": {"a dog": [[10, 20, 110, 90]]}}',
            )
        self.data, self.what = data, what

    def of(self, picture: str) -> Mapping[str, Any]:
        path = Path(picture)
        for name in (picture, str(path.absolute()), path.name, path.stem):
            if name in self.data:
                return cast("Mapping[str, Any]", self.data[name])
        raise UsageError(f"there is no entry for it in the {self.what}")


def located(
    parse: Parse, picture: Image.Image, name: str, dense: Named, table: Named | None = None
) -> Regions:
    """The picture's boxes of each entity, checked."""
    from moviola.parts.regions import box_mask, by_table, by_words

    boxes = _checked_dense(dense.of(name))
    found = by_words(parse, boxes) if table is None else by_table(table.of(name), boxes)
    lacking = [entity.name for entity in parse.entities if entity.name not in found]
    if lacking:
        raise UsageError(f"the match table lacks the entity {lacking[0]!r} (give it an empty list if unseen)")
    width, height = picture.size
    for entity in parse.entities:
        for box in found[entity.name]:
            if box is not None:
                box_mask(box, (height, width))
    return found


def _checked_dense(dense: Mapping[str, Any]) -> Dense:
    for phrase, boxes in dense.items():
        right = isinstance(boxes, Sequence) and not isinstance(boxes, str)
        if not right or not all(isinstance(b, Sequence) and len(b) == 4 for b in boxes):
            raise UsageError(f"the boxes of {phrase!r} must be a list of [left, top, right, bottom]")
    return cast("Dense", dense)
