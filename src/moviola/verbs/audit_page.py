"""An audit's report as one HTML page (no script, nothing from outside, drawings inside)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moviola.data.corruptions import CORRUPTIONS
from moviola.metrics.robustness import EffectiveRobustness
from moviola.systems.evaluation.clip_robustness import ALL
from moviola.verbs import audit_charts as charts
from moviola.verbs.audit_rows import Drawing, Drawings, Json, Keys, Table, figure_row, headline_rows
from moviola.verbs.curate_page import shown_text

SECTIONS = {
    "accuracy": "Accuracy",
    "factors": "Visual factors",
    "corruptions": "Corruptions",
    "shape": "Shape or texture",
    "calibration": "Calibration",
    "outside": "Out of distribution",
    "prompts": "Prompts",
    "retrieval": "Retrieval",
}
_CLASSES_SHOWN = 12
_TEMPLATES_SHOWN = 40


def audit_page(report: Json) -> str:
    """The page of a report as `audit` made it, or as read back from its `report.json`."""
    import jinja2

    names = [one["name"] for one in report["models"]]
    parts = report["sections"]
    sections = [
        (name, SECTIONS[name], make(parts[name], names, report))
        for name, make in _MAKERS.items()
        if name in parts
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moviola.verbs", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown_text(value) if type(value) is str else value,
    )
    page = environment.get_template("audit.html").render(
        report=report,
        names=names,
        letters=[charts.letter(n) for n in range(len(names))],
        styles=charts.STYLES,
        summary=Table("", headline_rows(report)),
        sections=sections,
        titles=SECTIONS,
        about=list(_about(report)),
    )
    return page.strip() + "\n"


# --------------------------------------------------------------------------------------------------
# Sections: sentences, tables and drawings
# --------------------------------------------------------------------------------------------------


def _accuracy(part: Json, names: list[str], report: Json) -> list[Any]:
    by_model = part["by_model"]
    rows = [
        figure_row("top-1", by_model, names, ("top1",), "high"),
        figure_row("standard error of top-1", by_model, names, ("standard_error",), None, "z.2f", True),
        figure_row("top-5", by_model, names, ("top5",), "high"),
        figure_row("mean over classes", by_model, names, ("mean_per_class",), "high"),
    ]
    if part["classes"] <= 5:
        del rows[2]

    def telling(name: str) -> tuple[float, float]:
        values = [one["per_class"][name] for one in by_model.values()]
        return max(values) - min(values), -min(values)

    chosen = sorted(by_model[names[0]]["per_class"], key=telling, reverse=True)[:_CLASSES_SHOWN]
    what = "Classes in which the models differ most" if len(names) > 1 else "The hardest classes"
    return [
        f"Percent of {report['items']:,} pictures in {part['classes']:,} classes. A class as high as the "
        "right one counts as before it.",
        Table("percent", rows),
        Table(
            f"{what}, percent",
            [figure_row(one, by_model, names, ("per_class", one), "high") for one in chosen],
        ),
    ]


def _factors(part: Json, names: list[str], report: Json) -> list[Any]:
    by_model, items = part["by_model"], part["items"]
    rows = [figure_row("all items", by_model, names, ("accuracy",), "high", soft=True)]
    rows += [
        figure_row(f"{one} ({n:,})", by_model, names, ("factors", one, "accuracy"), "high")
        for one, n in items.items()
    ]
    marks = []
    for factor in items:
        gaps = [by_model[name]["factors"][factor]["gap"] for name in names]
        marks.append((factor, [(gap, n, f"{names[n]}: {gap:+.1f}") for n, gap in enumerate(gaps)]))
    caption = "Points above or below the model's own accuracy over all items."
    return [
        f"Accuracy over the items of each factor; {part['untagged']:,} items have none.",
        Table("percent", rows),
        Drawings([Drawing(charts.strip(caption, marks, x_label="points", zero=True), caption)], "wide"),
        *_beyond(part, names, [(factor, ("factors", factor, "effective")) for factor in items]),
    ]


def _beyond(part: Json, names: list[str], wanted: Sequence[tuple[str, Keys]]) -> list[Any]:
    """The table of effective robustness, where there is a line."""
    rows = [figure_row(label, part["by_model"], names, keys, "high", "+z.1f") for label, keys in wanted]
    if all(text == "-" for row in rows for text, _ in row.cells):
        return []
    listed = ", ".join(part["baselines"])
    about = f"Points of accuracy above the line through {len(part['baselines'])} baselines: {listed}."
    return [Table("Effective robustness, points", rows, about)]


def _corruptions(part: Json, names: list[str], report: Json) -> list[Any]:
    by_model, severities, several = part["by_model"], part["severities"], part["names"]
    sizes = Counter(CORRUPTIONS[name].group for name in several)
    groups = [one for one in by_model[names[0]]["groups"] if one == ALL or sizes[one] > 1]
    keys = [(one if one == ALL else f"all {one}", ("groups", one)) for one in groups]
    keys += [(one, ("rows", one)) for one in several]
    rows = [figure_row("clean", by_model, names, ("clean",), "high", soft=True)]
    rows += [figure_row(one, by_model, names, (*at, "mean"), "high") for one, at in keys]

    def curves(among: Sequence[str]) -> list[list[tuple[float, float]]]:
        found = []
        for name in names:
            of = [by_model[name]["rows"][one]["severity"] for one in among]
            means = [(float(s), float(np.mean([one[str(s)] for one in of]))) for s in severities]
            found.append([(0.0, by_model[name]["clean"]), *means])
        return found

    caption = f"Top-1 in percent, mean over {len(several)} corruptions."
    drawn = [
        Drawing(charts.severity_curves(caption, curves(several)), caption),
        *_scatter(part, names, report),
    ]
    small = [
        Drawing(charts.severity_curves(f"top-1 under {one} over severity", curves([one]), small=True), one)
        for one in several
    ]
    return [
        f"Top-1 in percent, mean over severities {', '.join(map(str, severities))}. Every model saw the same "
        "pixels. The relative drop is the share of its clean accuracy that a model loses.",
        Table("percent", rows),
        Drawings(drawn),
        Drawings(small, "small"),
        Table(
            "Relative drop, percent",
            [figure_row(one, by_model, names, (*at, "relative_drop"), "low") for one, at in keys],
        ),
        *_beyond(part, names, [(one, (*at, "effective")) for one, at in keys]),
    ]


def _scatter(part: Json, names: list[str], report: Json) -> list[Drawing]:
    """Models about the line of the baselines, where there is one."""
    others = part["baselines"]
    if part["by_model"][names[0]]["groups"][ALL]["effective"] is None:
        return []
    at = {
        name: (one["clean"], one["groups"][ALL]["mean"], name)
        for name, one in (others | part["by_model"]).items()
    }
    points, n = [at[name] for name in others], report["items"]
    line = EffectiveRobustness.fit(
        [x for x, _, _ in points], [y for _, y, _ in points], n, n * len(part["severities"])
    )
    xs = [x for x, _, _ in at.values()]
    curve = [(x, line.expected(x, n)) for x in np.linspace(min(xs), max(xs), 40).tolist()]
    caption = "Top-1 under corruption over clean top-1. Rings: baselines; dashed: their line."
    return [Drawing(charts.line_through(caption, points, [at[name] for name in names], curve), caption)]


def _shape(part: Json, names: list[str], report: Json) -> list[Any]:
    by_model = part["by_model"]
    kinds = ("shape", "texture", "neither")
    bars = [
        Drawing(charts.split_bar([(kind, by_model[name][kind], kind) for kind in kinds]), "", n)
        for n, name in enumerate(names)
        if name in by_model
    ]
    rows = [figure_row("shape bias, percent", by_model, names, ("bias",), None)]
    rows += [
        figure_row(f"pictures named by {kind}", by_model, names, (kind,), None, "d", True) for kind in kinds
    ]
    about = "from a published set."
    if part["made"]:
        about = (
            "made from the data's own: the phase of one picture, the amplitude of another. Figures on the "
            "published set, which was made by style transfer, are not to be compared with these."
        )
    return [
        "The bias is the share of shape among the answers that name one of the two; no merit in itself. "
        f"{part['pictures']:,} pictures whose shape and texture are of different classes, {about}",
        Table("", rows),
        Drawings(bars, "wide"),
    ]


def _calibration(part: Json, names: list[str], report: Json) -> list[Any]:
    by_model = part["by_model"]
    figures = [
        (f"{label}{after}", f"{key}{ending}", form)
        for key, label, form in (("ece", "ECE, percent", "z.1f"), ("nll", "NLL, nats", "z.3f"))
        for ending, after in (("", ""), ("_scaled", ", after scaling"))
    ]
    rows = [figure_row("temperature", by_model, names, ("temperature",), None, ".3g", True)]
    rows += [figure_row(label, by_model, names, (key,), "low", form) for label, key, form in figures]
    shifted = [
        figure_row(
            f"severity {severity}: {label}", by_model, names, ("corrupted", severity, key), "low", form
        )
        for severity in by_model[names[0]]["corrupted"]
        for label, key, form in figures
    ]
    drawn = [
        Drawing(
            charts.reliability_diagram(
                f"reliability of {name}", one["reliability"], one["reliability_scaled"]
            ),
            "",
            n,
        )
        for n, (name, one) in enumerate((name, by_model[name]) for name in names)
    ]
    return [
        f"The temperature was fitted on {part['fitted_on']:,} items drawn by hash; all figures are of the "
        f"other {part['measured_on']:,}. ECE is the gap between confidence and accuracy over 15 bins.",
        Table("", rows),
        Drawings(
            drawn,
            caption="Bars: accuracy by confidence, pale where a bin holds few items. On the dashed line "
            "confidence is right; below it, too high. Diamonds: after scaling.",
        ),
        *([Table("After corruption, with the temperature of the clean items", shifted)] if shifted else []),
    ]


def _outside(part: Json, names: list[str], report: Json) -> list[Any]:
    by_model, rows, drawn = part["by_model"], [], []
    for of, count in part["items"].items():
        for score, label in (("max_probability", "highest probability"), ("max_logit", "highest logit")):
            at, soft = ("by_set", of, score), score == "max_logit"
            start = f"{of} ({count:,}), {label}"
            rows.append(figure_row(f"{start}: AUROC", by_model, names, (*at, "auroc"), "high", soft=soft))
            rows.append(
                figure_row(f"{start}: FPR at 95 % TPR", by_model, names, (*at, "fpr"), "low", soft=soft)
            )
        for n, name in enumerate(names):
            away = by_model[name]["by_set"][of]["histogram"]
            about = f"confidence of {name} inside and on {of}"
            svg = charts.confidence_histogram(about, part["edges"], by_model[name]["histogram"], away)
            drawn.append(Drawing(svg, of, n))
    return [
        f"How well a model's confidence tells {part['inside']:,} pictures of the classes from "
        "others. An AUROC of 50 is chance.",
        Table("percent", rows),
        Drawings(drawn, caption="Bars: inside. Stepped line: outside. Both as percent of their own number."),
    ]


def _prompts(part: Json, names: list[str], report: Json) -> list[Any]:
    by_model = part["by_model"]
    rows = [
        figure_row(
            f"{one} ({count} template{'' if count == 1 else 's'})",
            by_model,
            names,
            ("sets", "templates", one),
            "high",
        )
        for one, count in part["templates"].items()
    ]
    rows.append(figure_row("range over sets, points", by_model, names, ("sets", "range"), "low"))
    rows.append(
        figure_row("items of which all sets name one class", by_model, names, ("sets", "agreement"), "high")
    )
    found: list[Any] = [
        f"Top-1 in percent on {part['items']:,} items by the sentences around the class names.",
        Table("percent", rows),
    ]
    alone = {name: one["alone"] for name, one in by_model.items() if one["alone"] is not None}
    if not alone:
        return found
    spread = [
        figure_row("mean", alone, names, ("mean",), "high"),
        figure_row("standard deviation", alone, names, ("std",), "low", "z.2f"),
        figure_row("range", alone, names, ("range",), "low"),
        figure_row("items of which all name one class", alone, names, ("agreement",), "high"),
    ]
    marks = []
    for n, name in ((n, name) for n, name in enumerate(names) if name in alone):
        each = [(value, n, f"{value:.1f}: {told}") for told, value in alone[name]["templates"].items()]
        marks.append((f"{charts.letter(n)}  {name}", each))
    templates = next(iter(alone.values()))["templates"]
    ranked = sorted(templates, key=lambda one: -max(of["templates"][one] for of in alone.values()))
    caption = "Top-1 in percent of every template alone, a mark each."
    return [
        *found,
        Table("Every template alone", spread),
        Drawings([Drawing(charts.strip(caption, marks, x_label="percent"), caption)], "wide"),
        Table(
            "By template, percent",
            [figure_row(one, alone, names, ("templates", one), "high") for one in ranked[:_TEMPLATES_SHOWN]],
        ),
    ]


def _retrieval(part: Json, names: list[str], report: Json) -> list[Any]:
    rows = []
    for way, label in (("text_to_item", "text to picture"), ("item_to_text", "picture to text")):
        for key in ("R1", "R5", "R10"):
            rows.append(figure_row(f"{label}, R@{key[1:]}", part["by_model"], names, (way, key), "high"))
        rows.append(
            figure_row(f"{label}, median rank", part["by_model"], names, (way, "MedR"), "low", soft=True)
        )
    return [
        f"{part['items']:,} pictures and {part['texts']:,} texts of {part['data']}. R@K in percent; a "
        f"smaller gallery is an easier one. {' '.join(part['notes'])}",
        Table("", rows),
    ]


_MAKERS = {
    "accuracy": _accuracy,
    "factors": _factors,
    "corruptions": _corruptions,
    "shape": _shape,
    "calibration": _calibration,
    "outside": _outside,
    "prompts": _prompts,
    "retrieval": _retrieval,
}


def _about(report: Json) -> list[tuple[str, str]]:
    """What someone needs to run the same audit again."""
    found = [
        ("data", report["data"] + (f" ({report['split']})" if report["split"] else "")),
        ("pictures", report["setting"]["pictures"]),
        ("seed", str(report["setting"]["seed"])),
        ("templates", "; ".join(report["templates"][:3]) + (" ..." if len(report["templates"]) > 3 else "")),
    ]
    for n, one in enumerate(report["models"]):
        told = [one["kind"]]
        if "hash" in one:
            told += [
                f"system {one['system']}",
                f"hash {one['hash']}",
                f"{one['parameters'] / 1e6:.1f} M parameters",
            ]
            told += [one["dtype"], f"logit scale {one['logit_scale']:.4g}"]
        found.append((f"model {charts.letter(n)}", f"{one['name']}: {', '.join(told)}"))
    found.append(("versions", ", ".join(f"{name} {v}" for name, v in report["versions"].items())))
    return found
