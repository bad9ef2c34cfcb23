"""A curation report as one HTML page (no script, nothing from outside, drawings inside), and as lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moviola.types import printable

_WIDTH, _HEIGHT = 480, 300  # of a chart, in the SVG's own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 20, 12, 40
_JOINERS = "\u200c\u200d"  # parts of words and signs in many scripts
_FEW_POINTS = 30
_SPELLED = 60  # languages whose curves are drawn; the table has all


@dataclass(frozen=True, slots=True)
class _Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class _Line:
    kind: str
    points: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Chart:
    """A drawing: ticks and lines in the SVG's units."""

    about: str
    x_ticks: list[_Tick]
    y_ticks: list[_Tick]
    lines: list[_Line]
    threshold: _Tick | None
    x_label: str


@dataclass(frozen=True, slots=True)
class _Step:
    label: str
    left: str
    share: str
    width: float
    lost: list[str]


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a report as `build_report` made it, or as read back from its `report.json`.

    Texts and entries come from strangers' files: they are escaped, control characters are spelled out.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moviola.verbs", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(n=_number, pct=_percent, figure=_figure)
    blocks = report["languages"]
    page = environment.get_template("curate.html").render(
        report=report,
        came=report["input"],
        total=report["total"],
        kept=report["kept"],
        several=len(blocks) > 1,
        steps=_steps(report["funnel"]),
        whole=None if len(blocks) == 1 else _charts(report["total"], None),
        blocks=[
            (block, _charts(block, block["threshold"]) if number < _SPELLED else None)
            for number, block in enumerate(blocks)
        ],
        chart_size=(_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM),
        about=list(_about(report)),
    )
    return page.strip() + "\n"


def shown_text(text: str) -> str:
    """Text for a page: characters that hide or reorder others are spelled out."""
    return "".join(c if c.isprintable() or c in _JOINERS else _spelled(c) for c in text)


def _shown(value: Any) -> Any:
    """Every value that the template prints; what it made itself has markup and stays."""
    return shown_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _figure(value: float | None) -> str:
    """A chance: as many digits as it needs to be told from 0 and from 1."""
    if value is None:
        return "-"
    if value in (0, 1):
        return str(int(value))
    return f"{value:.3g}" if value < 0.999 else f"{value:.6g}"


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if share >= 0.1 or not share else f"{100 * share:.2g} %"


def _steps(funnel: Mapping[str, Any]) -> list[_Step]:
    unit, whole = funnel["unit"], max(1, funnel["steps"][0]["left"])
    return [
        _Step(
            f"{unit} {step['step']}",
            _number(step["left"]),
            _percent(step["left"] / whole),
            round(100 * step["left"] / whole, 2),
            [f"{_number(many)} {why}" for why, many in step["lost"].items()],
        )
        for step in funnel["steps"]
    ]


def _about(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What someone needs to make the same set again."""
    config, came = report["config"], report["input"]
    yield "seed", str(report["seed"])
    if report["kept"] is not None:
        if config["tail_share"] is not None:
            yield "asked for", f"a tail share of {config['tail_share']:g}"
        else:
            limit = config["threshold"]
            yield "asked for", "no threshold" if limit is None else f"a threshold of {limit:,.6g}"
        several = {"one": "one, drawn at random", "all": "all, each with its own draw"}
        yield "of a row's matched texts", several[config["texts"]]
    yield "entries were counted in", "another pool (given counts)" if report["counts_given"] else "this pool"
    yield "metadata", report["metadata"]["name"]
    for language, value in list(report["metadata"]["hashes"].items())[:_SPELLED]:
        yield f"hash of its entries{f', {language}' if language else ''}", value
    for columns in came["columns"]:
        told = [f"texts: {', '.join(columns['texts'])}"]
        told += [f"{name}: {columns[name] or '-'}" for name in ("id", "language")]
        yield "columns", "; ".join(told)
    yield "engine", report["engine"]
    yield "seconds", f"{report['seconds']:,.1f}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())


# --------------------------------------------------------------------------------------------------
# Charts
# --------------------------------------------------------------------------------------------------


def _charts(block: Mapping[str, Any], threshold: float | None) -> list[_Chart]:
    """Counts over ranks, both logarithmic, and the share of all matches up to a rank."""
    curves = [("before", block["before"]), ("after", block["after"])]
    drawn = [(kind, curve) for kind, curve in curves if curve is not None and curve["rank"]]
    if not drawn:
        return []
    x_most = _decade(max(curve["rank"][-1] for _, curve in drawn))
    y_most = _decade(max(curve["many"][0] for _, curve in drawn))
    if threshold is not None and y_most < threshold <= 100 * y_most:
        y_most = _decade(threshold)
    x = _log_scale(x_most, _LEFT, _WIDTH - _RIGHT)
    y = _log_scale(y_most, _HEIGHT - _BOTTOM, _TOP)
    line = None
    if threshold is not None and 1 <= threshold <= y_most:
        line = _Tick(y(threshold), f"threshold {threshold:,.6g}")
    size = _HEIGHT - _BOTTOM - _TOP
    shares = [
        _Tick(_HEIGHT - _BOTTOM - size * percent / 100, f"{percent} %") for percent in range(0, 101, 25)
    ]
    ranks = _decades(x, x_most)
    return [
        _Chart(
            "texts that hold an entry, over the entry's rank",
            ranks,
            _decades(y, y_most),
            [_line(kind, curve["rank"], curve["many"], x, y) for kind, curve in drawn],
            line,
            "rank of the entry",
        ),
        _Chart(
            "share of matches in the most frequent entries",
            ranks,
            shares,
            [
                _line(kind, curve["rank"], curve["share"], x, lambda s: _HEIGHT - _BOTTOM - size * s)
                for kind, curve in drawn
            ],
            None,
            "most frequent entries",
        ),
    ]


def _decade(value: float) -> int:
    """The power of ten at or above; at least 10, so that an axis has a length."""
    power = 10
    while power < value:
        power *= 10
    return power


def _log_scale(most: float, low: float, high: float) -> Any:
    return lambda value: low + (high - low) * math.log10(max(value, 1)) / math.log10(most)


def _decades(scale: Any, most: int) -> list[_Tick]:
    """A tick each power of ten, labels on at most seven."""
    powers = round(math.log10(most))
    each = -(-powers // 6)
    return [_Tick(round(scale(10**p), 1), _short(10**p) if p % each == 0 else "") for p in range(powers + 1)]


def _short(value: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value // size}{letter}"
    return str(value)


def _line(kind: str, xs: Sequence[float], ys: Sequence[float], x: Any, y: Any) -> _Line:
    places = [(round(x(a), 1), round(y(b), 1)) for a, b in zip(xs, ys, strict=True)]
    points = " ".join(f"{a:g},{b:g}" for a, b in places)
    return _Line(kind, points, places if len(places) <= _FEW_POINTS else [])


# --------------------------------------------------------------------------------------------------
# On a terminal
# --------------------------------------------------------------------------------------------------


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report in a few lines of plain text."""
    came, total, kept = report["input"], report["total"], report["kept"]
    unit = report["funnel"]["unit"]
    lines = []
    width = max(len(f"{step['left']:,}") for step in report["funnel"]["steps"])
    for step in report["funnel"]["steps"]:
        why = "; ".join(f"{many:,} {reason}" for reason, many in step["lost"].items())
        lines.append(f"{step['left']:>{width},} {unit} {step['step']}{f'  (less {why})' if why else ''}")
    lines.append(
        f"{total['matched']:,} of {total['entries']:,} entries matched; {total['covering']['50']:,} of them "
        f"make half of the {total['matches']:,} matches, {total['covering']['99']:,} make 99 %."
    )
    if kept is not None:
        if unit == "texts":
            lines.append(f"{kept['rows']:,} of {came['rows']:,} rows stay.")
        lines.append(_threshold_line(report))
    return [*lines, *(f"Note: {printable(warning)}" for warning in report["warnings"])]


def _threshold_line(report: Mapping[str, Any]) -> str:
    total, languages = report["total"], report["languages"]
    if len(languages) == 1:
        limit = languages[0]["threshold"]
        told = "No threshold" if limit is None else f"Threshold {limit:,.6g}"
    else:
        told = f"{len(languages)} languages, each with its own threshold"
    tail = "-" if total["tail_share"] is None else f"{100 * total['tail_share']:.3g} %"
    return f"{told}: {total['head_entries']:,} entries are thinned, the tail holds {tail} of the matches."
