"""Few-shot accuracy of every way to adapt, on real photos, with the built-in model.

    python benchmarks/few_shot.py cifar10.parquet --to few-shot/

The table has pictures and classes (see `moviola.data.classes`); CIFAR-10's were not seen in training. Each
method learns from 1, 2, 4, 8 and 16 pictures of each class, drawn by seed, and is measured on 2000 others,
the same for all methods. One JSON file a run: the same command goes on after a kill. Writes `few-shot.json`,
`few-shot.md` and `few-shot.png`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import moviola
from moviola.data.classes import read_classes
from moviola.files import atomic

METHODS = ("nearest-mean", "linear-probe", "gda-clip", "maple", "gopro")
SHOTS = (1, 2, 4, 8, 16)


def run(data: Path, folder: Path, method: str, shots: int, seed: int, model: str, most: int) -> dict:
    place = folder / "runs" / f"{method}-{shots}-{seed}.json"
    if place.is_file():
        return json.loads(place.read_text())
    start = time.perf_counter()
    made_at = folder / f"{method}-{shots}-{seed}"
    report = moviola.adapt(data, made_at, method=method, model=model, shots=shots, seed=seed, most_test=most)
    shutil.rmtree(made_at)
    made = {**report.to_json(), "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
    with atomic(place) as file:
        file.write(json.dumps(made, indent=1).encode())
    print(
        f"{method}, {shots} shots, seed {seed}: {made['after']['top-1']:.1f} % ({made['seconds']} s)",
        flush=True,
    )
    return made


def told(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--to", type=Path, default=Path("few-shot"))
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--shots", nargs="+", type=int, default=list(SHOTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--most-test", type=int, default=2000)
    asked = parser.parse_args()
    read_classes(asked.data)  # an error in the data is told before the first run
    found: dict[str, dict[int, list[float]]] = {"zero-shot": {}}
    seconds: dict[str, list[float]] = {}
    for method in asked.methods:
        for shots in asked.shots:
            for seed in asked.seeds:
                made = run(asked.data, asked.to, method, shots, seed, asked.model, asked.most_test)
                found.setdefault(method, {}).setdefault(shots, []).append(made["after"]["top-1"])
                seconds.setdefault(method, []).append(made["seconds"])
                if method == asked.methods[0]:
                    found["zero-shot"].setdefault(shots, []).append(made["before"]["top-1"])
    lines = ["| method | " + " | ".join(f"{shots} shots" for shots in asked.shots) + " | s a run |"]
    lines.append("|---|" + "--:|" * (len(asked.shots) + 1))
    for method, by_shots in found.items():
        cells = " | ".join(told(by_shots[shots]) for shots in asked.shots)
        lines.append(f"| {method} | {cells} | {statistics.median(seconds.get(method, [0.0])):.1f} |")
    print("\n".join(lines))
    (asked.to / "few-shot.md").write_text("\n".join(lines) + "\n")
    (asked.to / "few-shot.json").write_text(json.dumps(found, indent=1))
    draw(found, asked.to / "few-shot.png")


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for (method, by_shots), marker in zip(found.items(), "xos^Dvp*", strict=False):
        shots = list(by_shots)
        mean = [statistics.mean(by_shots[k]) for k in shots]
        spread = [statistics.stdev(by_shots[k]) if len(by_shots[k]) > 1 else 0.0 for k in shots]
        style = {"linestyle": "--", "color": "black"} if method == "zero-shot" else {}
        axes.errorbar(shots, mean, spread, marker=marker, capsize=2, label=method, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.set_xlabel("pictures of each class")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
