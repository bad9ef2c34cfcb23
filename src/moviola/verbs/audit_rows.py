"""The rows of an audit's tables: figures as text, the best of each marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from markupsafe import Markup

from moviola.systems.evaluation.clip_robustness import ALL

Json = Mapping[str, Any]
Better = Literal["high", "low"] | None
Keys = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a cell for each model, and whether it is the best of them."""

    label: str
    cells: list[tuple[str, bool]]
    soft: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    head: str
    rows: list[Row]
    about: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """With its caption; `model` is the number of the model that it is of."""

    svg: Markup
    caption: str
    model: int | None = None


@dataclass(frozen=True, slots=True)
class Drawings:
    """`kind` says how large they are: pair, small or wide."""

    all: list[Drawing]
    kind: Literal["pair", "small", "wide"] = "pair"
    caption: str = ""


def headlines(report: Json) -> list[tuple[str, ...]]:
    """A header with the models' names, then the figures that sum a section up, as text."""
    names = [one["name"] for one in report["models"]]
    rows = headline_rows(report)
    marked = [(row.label, *(f"{text}{' *' if best else ''}" for text, best in row.cells)) for row in rows]
    return [("* is best" if any(best for row in rows for _, best in row.cells) else "", *names), *marked]


def figure_row(
    label: str,
    by_model: Json,
    names: Sequence[str],
    keys: Keys,
    better: Better,
    form: str = "z.1f",
    soft: bool = False,
) -> Row:
    """The figure at `keys` of each model; the best is marked where there are several and they differ."""
    values = [
        reduce(lambda one, key: one[key], keys, by_model[name]) if name in by_model else None
        for name in names
    ]
    texts = ["-" if value is None else format(value, form) for value in values]
    known = [value for value in values if value is not None]
    best = None
    if better is not None and len({text for text in texts if text != "-"}) > 1:
        best = format(max(known) if better == "high" else min(known), form)
    return Row(label, [(text, text == best) for text in texts], soft)


def headline_rows(report: Json) -> list[Row]:
    names = [one["name"] for one in report["models"]]
    parts = report["sections"]
    first = ("by_set", next(iter(parts["outside"]["items"]))) if "outside" in parts else ()
    of = f" ({first[1]})" if first and len(parts["outside"]["items"]) > 1 else ""
    wanted: list[tuple[str, str, Keys, Better, str]] = [
        ("accuracy", "top-1, %", ("top1",), "high", "z.1f"),
        ("accuracy", "mean over classes, %", ("mean_per_class",), "high", "z.1f"),
        ("corruptions", "top-1 under corruption, %", ("groups", ALL, "mean"), "high", "z.1f"),
        ("corruptions", "relative drop, %", ("groups", ALL, "relative_drop"), "low", "z.1f"),
        ("corruptions", "effective robustness, points", ("groups", ALL, "effective"), "high", "+z.1f"),
        ("factors", "worst factor, %", ("worst",), "high", "z.1f"),
        ("shape", "shape bias, %", ("bias",), None, "z.1f"),
        ("calibration", "ECE, %", ("ece",), "low", "z.1f"),
        ("calibration", "ECE after scaling, %", ("ece_scaled",), "low", "z.1f"),
        ("calibration", "NLL after scaling, nats", ("nll_scaled",), "low", "z.3f"),
        ("outside", f"OOD AUROC{of}, %", (*first, "max_probability", "auroc"), "high", "z.1f"),
        ("outside", f"OOD FPR95{of}, %", (*first, "max_probability", "fpr"), "low", "z.1f"),
        ("prompts", "range over sets of prompts, points", ("sets", "range"), "low", "z.1f"),
        ("retrieval", "text to picture R@1, %", ("text_to_item", "R1"), "high", "z.1f"),
        ("retrieval", "picture to text R@1, %", ("item_to_text", "R1"), "high", "z.1f"),
    ]
    rows = [
        figure_row(label, parts[section]["by_model"], names, keys, better, form)
        for section, label, keys, better, form in wanted
        if section in parts
    ]
    return [row for row in rows if any(text != "-" for text, _ in row.cells)]
