"""The curves of a run, as people look at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moviola.files import atomic

_OTHERS = ("step", "rows_per_second")
_LOOP = ("gradient_norm", "lr")


def draw(metrics: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    """Losses, learning rate and measurements over the steps as a picture; a note where it cannot be drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["No curves were drawn. Install them with: pip install 'moviola[plots]'"]
    names = list(dict.fromkeys(name for line in metrics for name in line if name not in _OTHERS))
    logged = {name for line in metrics if "lr" in line for name in line}
    losses = [name for name in names if name in logged and name not in _LOOP]
    measured = [name for name in names if name not in logged]
    panels = [("loss", losses), ("measured, %", measured), ("learning rate", ["lr"])]
    panels = [(title, shown) for title, shown in panels if any(n in line for n in shown for line in metrics)]
    if not panels:
        return []
    figure = Figure(figsize=(7, 2.6 * len(panels)), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for name in shown:
            points = [(line["step"], line[name]) for line in metrics if name in line]
            mark = "o" if len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), marker=mark, markersize=3, label=name)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if len(shown) > 1 or title != "learning rate":
            axes.legend(fontsize="small")
    axes.set_xlabel("step")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return []
