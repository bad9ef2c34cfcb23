"""`report`: search results as one HTML file that needs nothing else, for a browser or a phone."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moviola.types import Moment, StoreError, UsageError, printable
from moviola.verbs.search import Curve, Results, clock

_WIDTH, _HEIGHT = 1000, 120  # of a curve, in the SVG's own units
_MOST_POINTS = 1500


@dataclass(frozen=True, slots=True)
class _Card:
    number: int
    name: str
    folder: str
    when: str
    score: str
    picture: str
    text: str


@dataclass(frozen=True, slots=True)
class _Band:
    x: float
    width: float
    label: str


@dataclass(frozen=True, slots=True)
class _Chart:
    name: str
    points: str
    bands: list[_Band]
    end: str
    low: str
    high: str


@dataclass(frozen=True, slots=True)
class _Section:
    query: str
    index: str
    model: str
    measure: str
    cards: list[_Card]
    charts: list[_Chart]


_MEASURES = {
    "cosine": "Scores are cosines, averaged over the moment and corrected for the file's own level.",
    "model": "Scores are the model's own; candidates were found by cosine.",
    "words": "Scores say how well the words match (BM25).",
}


def report(results: Results | Sequence[Results], html_path: str | Path, *, title: str = "Moments") -> Path:
    """Write one or several searches to a self-contained HTML file; its path.

    Thumbnails and score curves are inside; there is no script and no reference to anything outside.
    Names and texts come from strangers' files and are escaped.
    """
    import jinja2

    several = [results] if isinstance(results, Results) else list(results)
    if not several:
        raise UsageError("There are no results to report.")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moviola.verbs", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        title=title, sections=[_section(one) for one in several], width=_WIDTH, height=_HEIGHT
    )
    target = Path(html_path)
    temporary = target.with_name(f".{target.name}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"The report {printable(target)} could not be written ({error.strerror})."
        ) from error
    return target


def _section(results: Results) -> _Section:
    return _Section(
        query=_safe(results.query),
        index=printable(results.index_path),
        model=_safe(results.model),
        measure=_MEASURES[results.measure],
        cards=[_card(number, moment) for number, moment in enumerate(results, 1)],
        charts=[_chart(curve, results.moments) for curve in results.curves.values()],
    )


def _safe(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _card(number: int, moment: Moment) -> _Card:
    folder, name = os.path.split(moment.file)
    picture = base64.b64encode(moment.thumbnail).decode() if moment.thumbnail else ""
    when = "picture" if moment.kind == "picture" else f"{clock(moment.span.start)} - {clock(moment.span.end)}"
    return _Card(
        number=number,
        name=printable(name),
        folder=printable(folder),
        when=when,
        score=f"{moment.score:.3f}",
        picture=picture,
        text=_safe(moment.text or ""),
    )


def _chart(curve: Curve, moments: Iterable[Moment]) -> _Chart:
    """A curve with its moments as bands; long videos keep the highest score of each few pixels."""
    times, scores = _thinned(curve.times, curve.scores)
    duration = max(curve.duration, times[-1], 1e-9)
    low, high = min(curve.scores), max(curve.scores)
    room = (high - low) or 1.0
    points = " ".join(
        f"{_WIDTH * time / duration:.1f},{_HEIGHT - 4 - (_HEIGHT - 8) * (score - low) / room:.1f}"
        for time, score in zip(times, scores, strict=True)
    )
    bands = [
        _Band(
            x=round(_WIDTH * one.span.start / duration, 1),
            width=round(max(2.0, _WIDTH * one.span.duration / duration), 1),
            label=f"{number}: {clock(one.span.start)} - {clock(one.span.end)}, score {one.score:.3f}",
        )
        for number, one in enumerate(moments, 1)
        if one.file == curve.file
    ]
    return _Chart(
        name=printable(os.path.basename(curve.file)),  # noqa: PTH119
        points=points,
        bands=bands,
        end=clock(duration),
        low=f"{low:.3f}",
        high=f"{high:.3f}",
    )


def _thinned(times: Sequence[float], scores: Sequence[float]) -> tuple[list[float], list[float]]:
    stride = -(-len(times) // _MOST_POINTS)
    best = [
        max(range(at, min(at + stride, len(times))), key=lambda i: scores[i])
        for at in range(0, len(times), stride)
    ]
    return [times[i] for i in best], [scores[i] for i in best]
