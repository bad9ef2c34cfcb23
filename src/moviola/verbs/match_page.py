"""The page of `match`: each picture with the boxes that were compared, and what each weighed."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moviola.files import atomic
from moviola.types import StoreError, printable

if TYPE_CHECKING:
    from moviola.verbs.match import MatchedFile, MatchReport

_HUES = (18, 205, 120, 285, 48, 330, 165, 240)


@dataclass(frozen=True, slots=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    hue: int
    label: str


@dataclass(frozen=True, slots=True)
class _Part:
    key: str
    kind: str
    weight: str
    share: float
    where: str
    hue: int


@dataclass(frozen=True, slots=True)
class _Card:
    number: int
    name: str
    folder: str
    score: str
    plain: str
    width: int
    height: int
    picture: str
    boxes: list[_Box]
    parts: list[_Part]
    note: str


def write_page(report: MatchReport, path: str | Path) -> Path:
    """Write the report to a self-contained HTML file; its path. Names from outside are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moviola.verbs", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("match.html").render(
        report=report,
        sentence=report.parse.sentence,
        relations=[" ".join(filter(None, (r.subject, r.verb, r.object))) for r in report.parse.relations],
        cards=[_card(number, one) for number, one in enumerate(report.results, 1)],
        failed=[str(one) for one in report.failed],
    )
    target = Path(path)
    try:
        with atomic(target) as file:
            file.write(page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StoreError(f"The page {printable(target)} could not be written ({error.strerror}).") from error
    return target


def _card(number: int, one: MatchedFile) -> _Card:
    path, (width, height) = Path(one.file), one.size
    boxes, parts = [], []
    for n, part in enumerate(one.matched.parts):
        hue = _HUES[n % len(_HUES)]
        if part.kind == "entity":  # a relation's boxes are its entities'
            for left, top, right, bottom in part.boxes:
                boxes.append(_Box(left, top, right - left + 1, bottom - top + 1, hue, part.key))
        where = "the whole picture" if not part.boxes else "box" if len(part.boxes) == 1 else "boxes"
        share = round(100 * min(1.0, max(0.0, part.weight)), 1)
        parts.append(_Part(part.key, part.kind, f"{part.weight:.2f}", share, where, hue))
    return _Card(
        number=number,
        name=printable(path.name),
        folder=printable(path.parent),
        score=f"{one.score:.4f}",
        plain=f"{one.plain:.4f}",
        width=width,
        height=height,
        picture=base64.b64encode(one.preview or b"").decode(),
        boxes=boxes,
        parts=parts,
        note=one.matched.note or "",
    )
