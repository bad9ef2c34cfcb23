"""The drawings of an audit's page, as SVG. Models differ by colour, dashes, mark and letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from moviola.verbs.curate_page import shown_text

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 30, 12, 40
_APART = 13  # between letters at the ends of lines, in the SVG's own units
_MARKS = (
    "M-4,0A4,4 0 1 1 4,0A4,4 0 1 1 -4,0Z",
    "M-3.5,-3.5H3.5V3.5H-3.5Z",
    "M0,-4.6L4.4,3.4H-4.4Z",
    "M0,-5L5,0L0,5L-5,0Z",
)
STYLES = 8
"""How many models have a colour and dashes of their own; with more they come again, with other letters."""

Ticks = Sequence[tuple[float, str]]


def letter(number: int) -> str:
    """A, B ... Z, then A2, B2 ...

    >>> letter(0), letter(27)
    ('A', 'B2')
    """
    turn, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(turn + 1) if turn else "")


class Plot:
    """Two axes, and what is drawn between them in data units. `about` is said to those who cannot see it."""

    def __init__(
        self,
        about: str,
        x_ticks: Ticks,
        y_ticks: Ticks,
        *,
        x_label: str = "",
        size: tuple[int, int] = (480, 300),
    ) -> None:
        self.about, self.x_label, (self.width, self.height) = about, x_label, size
        self.x_ticks, self.y_ticks = list(x_ticks), list(y_ticks)
        self.x_range, self.y_range = (self.x_ticks[0][0], self.x_ticks[-1][0]), (0.0, 1.0)
        if self.y_ticks:
            self.y_range = self.y_ticks[0][0], self.y_ticks[-1][0]
        self.parts: list[Markup] = []
        self._ends: list[tuple[float, float, int]] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(_LEFT + (self.width - _LEFT - _RIGHT) * (value - low) / (high - low), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.height - _BOTTOM - (self.height - _BOTTOM - _TOP) * (value - low) / (high - low), 1)

    def add(self, markup: str, **values: Any) -> None:
        """An element; `{name}` in `markup` is replaced and escaped."""
        shown = {name: shown_text(one) if isinstance(one, str) else one for name, one in values.items()}
        self.parts.append(Markup(markup).format(**shown))

    def line(self, points: Sequence[tuple[float, float]], style: int, *, marks: bool = True) -> None:
        places = [(self.x(a), self.y(b)) for a, b in points]
        listed = " ".join(f"{a:g},{b:g}" for a, b in places)
        self.add('<polyline class="s{n}" points="{points}"/>', n=style % STYLES, points=listed)
        for a, b in points if marks else ():
            self.mark(a, b, style)
        self._ends.append((*places[-1], style))

    def mark(self, x: float, y: float, style: int, title: str = "") -> None:
        self.add(
            '<path class="s{n}" d="{d}" transform="translate({x} {y})"><title>{title}</title></path>',
            n=style % STYLES,
            d=_MARKS[style % len(_MARKS)],
            x=self.x(x),
            y=self.y(y),
            title=title or f"{letter(style)}: {y:.1f}",
        )

    def bar(self, x: tuple[float, float], y: tuple[float, float], kind: str, title: str = "") -> None:
        left, right, low, high = self.x(x[0]), self.x(x[1]), self.y(y[0]), self.y(y[1])
        self.add(
            '<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}"><title>{title}</title></rect>',
            kind=kind,
            x=left,
            y=min(low, high),
            w=round(right - left, 1),
            h=round(abs(low - high), 1),
            title=title,
        )

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words at a place in the SVG's own units."""
        self.add(
            '<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>',
            kind=kind,
            x=x,
            y=y,
            anchor=anchor,
            words=words,
        )

    def svg(self) -> Markup:
        bottom, right = self.height - _BOTTOM, self.width - _RIGHT
        drawn, self.parts = self.parts, []
        for value, label in self.x_ticks:
            self.add(
                '<line class="grid" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>', x=self.x(value), a=_TOP, b=bottom
            )
            self.text(self.x(value), bottom + 15, label, anchor="middle")
        for value, label in self.y_ticks:
            self.add(
                '<line class="grid" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>', y=self.y(value), a=_LEFT, b=right
            )
            self.text(_LEFT - 6, self.y(value) + 4, label, anchor="end")
        self.text((_LEFT + right) / 2, self.height - 6, self.x_label, anchor="middle")
        frame, self.parts = self.parts, drawn
        last = -1e9
        for x, y, style in sorted(self._ends, key=lambda end: end[1]):
            last = max(y, last + _APART)
            self.text(x + 8, round(last + 4, 1), letter(style), f"name s{style % STYLES}")
        head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            self.width, self.height, shown_text(self.about)
        )
        return head + Markup("\n").join([*frame, *self.parts]) + Markup("</svg>")


def percents(low: float = 0, high: float = 100, most: int = 5) -> Ticks:
    """Round ticks in percent from at or below `low` to at or above `high`."""
    step = next(one for one in (0.5, 1, 2, 5, 10, 20, 25) if (high - low) / one <= most or one == 25)
    first, last = int(low // step), int(-(-high // step))
    return [(n * step, f"{n * step:g}") for n in range(first, max(last, first + 1) + 1)]


def severity_curves(
    about: str, curves: Sequence[Sequence[tuple[float, float]]], *, small: bool = False
) -> Markup:
    """Accuracy over severity, a line a model; severity 0 is the clean picture."""
    last = int(max(x for curve in curves for x, _ in curve))
    x_ticks = [(n, "clean" if n == 0 else str(n)) for n in range(last + 1)]
    size = (300, 190) if small else (480, 300)
    plot = Plot(about, x_ticks, percents(most=5), x_label="severity", size=size)
    for style, curve in enumerate(curves):
        plot.line(curve, style)
    return plot.svg()


def reliability_diagram(about: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup:
    """Bars: accuracy by confidence as it is; a stroke at the mean confidence; marks: after scaling."""
    plot = Plot(about, percents(), percents(), x_label="confidence, percent", size=(340, 300))
    edges, most = before["edges"], max(1, *before["count"])
    for n, (count, right) in enumerate(zip(before["count"], before["accuracy"], strict=True)):
        if count:
            told = f"confidence {before['confidence'][n]:.1f}, accuracy {right:.1f}, {count} items"
            plot.bar((edges[n], edges[n + 1]), (0, right), "few" if count < most / 20 else "many", told)
    plot.add(
        '<line class="even" x1="{a}" y1="{b}" x2="{c}" y2="{d}"/>',
        a=plot.x(0),
        b=plot.y(0),
        c=plot.x(100),
        d=plot.y(100),
    )
    points = zip(after["confidence"], after["accuracy"], after["count"], strict=True)
    for confidence, right, count in points:
        if count:
            told = f"scaled: confidence {confidence:.1f}, accuracy {right:.1f}, {count} items"
            plot.mark(confidence, right, 3, told)
    return plot.svg()


def confidence_histogram(
    about: str, edges: Sequence[float], inside: Sequence[int], outside: Sequence[int]
) -> Markup:
    """Filled: items inside; the stepped line: items outside. Both as shares of their own number."""
    shares = [[100 * count / max(1, sum(counts)) for count in counts] for counts in (inside, outside)]
    plot = Plot(
        about,
        percents(),
        percents(0, max(map(max, shares))),
        x_label="highest class probability, percent",
        size=(340, 240),
    )
    steps: list[tuple[float, float]] = [(edges[0], 0)]
    for n, (a, b) in enumerate(zip(*shares, strict=True)):
        if a:
            plot.bar((edges[n], edges[n + 1]), (0, a), "many", f"inside: {inside[n]} items")
        steps += [(edges[n], b), (edges[n + 1], b)]
    listed = " ".join(f"{plot.x(a):g},{plot.y(b):g}" for a, b in [*steps, (edges[-1], 0)])
    plot.add('<polyline class="away" points="{points}"/>', points=listed)
    return plot.svg()


def strip(
    about: str,
    rows: Sequence[tuple[str, Sequence[tuple[float, int, str]]]],
    *,
    x_label: str,
    zero: bool = False,
) -> Markup:
    """A row each, with marks (value, style, title) along one axis of percent; `zero` draws a line at 0."""
    values = [value for _, marks in rows for value, _, _ in marks] + ([0.0] if zero else [])
    height = 26 * len(rows)
    plot = Plot(
        about,
        percents(min(values), max(values), 8),
        [],
        x_label=x_label,
        size=(700, height + _TOP + _BOTTOM),
    )
    plot.y_range = float(len(rows)), 0.0
    if zero:
        plot.add(
            '<line class="even" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>', x=plot.x(0), a=_TOP, b=_TOP + height
        )
    names = Markup("").join(
        Markup('<text x="0" y="{}" class="row">{}</text>').format(plot.y(n + 0.5) + 4, shown_text(name))
        for n, (name, _) in enumerate(rows)
    )
    for n, (_, marks) in enumerate(rows):
        rank = {style: at for at, style in enumerate(sorted({style for _, style, _ in marks}))}
        for value, style, title in marks:  # models of one row a little apart, or one would hide another
            plot.mark(value, n + 0.5 + 0.5 * ((rank[style] + 0.5) / len(rank) - 0.5), style, title)
    side = 150
    svg = plot.svg()
    head = Markup('<svg viewBox="{} 0 {} {}" role="img" aria-label="{}">').format(
        -side, plot.width + side, plot.height, shown_text(about)
    )
    shifted = names.replace('x="0"', Markup(f'x="{8 - side}"'))
    return head + shifted + Markup(svg[svg.index(">") + 1 :])


def split_bar(shares: Sequence[tuple[str, int, str]]) -> Markup:
    """One bar in parts: (name, number, kind); the parts are named in it where there is room."""
    total = max(1, sum(count for _, count, _ in shares))
    width, at, parts = 1000, 0.0, []
    for name, count, kind in shares:
        w = width * count / total
        share = f"{100 * count / total:.0f} %"
        parts.append(
            Markup(
                '<rect class="{}" x="{}" y="0" width="{}" height="26"><title>{}: {}</title></rect>'
            ).format(kind, round(at, 1), round(w, 1), name, share)
        )
        words = next((one for one in (f"{name} {share}", share) if 7 * len(one) < w), "")
        parts.append(
            Markup('<text class="on {}" x="{}" y="18" text-anchor="middle">{}</text>').format(
                kind, round(at + w / 2, 1), words
            )
        )
        at += w
    about = ", ".join(f"{name} {count}" for name, count, _ in shares)
    head = Markup('<svg class="split" viewBox="0 0 {} 26" role="img" aria-label="{}">').format(
        width, escape(about)
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def line_through(
    about: str,
    baselines: Sequence[tuple[float, float, str]],
    audited: Sequence[tuple[float, float, str]],
    line: Sequence[tuple[float, float]],
) -> Markup:
    """Accuracy under corruption over clean accuracy: baselines as rings, their line, and models by letter."""
    everything = [*baselines, *audited]
    xs, ys = [one[0] for one in everything], [one[1] for one in everything]
    plot = Plot(
        about, percents(min(xs), max(xs)), percents(min(ys), max(ys)), x_label="clean accuracy, percent"
    )
    low, high = plot.y_range
    inside = [(x, y) for x, y in line if low <= y <= high]
    listed = " ".join(f"{plot.x(x):g},{plot.y(y):g}" for x, y in inside)
    plot.add('<polyline class="even" points="{points}"/>', points=listed)
    for x, y, name in baselines:
        plot.add(
            '<circle class="ring" cx="{x}" cy="{y}" r="4"><title>{name}</title></circle>',
            x=plot.x(x),
            y=plot.y(y),
            name=name,
        )
    for style, (x, y, name) in enumerate(audited):
        plot.mark(x, y, style, name)
        plot._ends.append((plot.x(x), plot.y(y), style))
    return plot.svg()
