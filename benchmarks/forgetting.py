"""What each continual method forgets of CIFAR-10 and of Tiny ImageNet: `python benchmarks/forgetting.py`.

    python benchmarks/forgetting.py --data cifar10.parquet --unrelated tiny_imagenet_val.parquet --to out

Five tasks of two classes, one after the other, from a few pictures of each class, by every method of
`moviola adapt --method vr-lwf` and its baselines, three seeds. `--unrelated` is a set that is never learned:
its zero-shot accuracy says what else is forgotten. Both are tables or folders as `moviola evaluate` reads.

One learning rate for all methods: plain fine-tuning's, on the first seed, the smallest of `--rates` whose
mean accuracy on each task when it was just learned is within two points of the best (`--lr` sets it). A
method may carry options, as in `vr-lwf:alpha=5`.

Every finished run is one JSON file in `--to`, a killed one goes on at its step; a table is printed and drawn.
The built-in model is small and its pictures are 64 x 64: these are comparisons, not the paper's figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moviola.verbs.adapt_tasks import adapt_tasks

METHODS = ("fine-tune", "lwf", "vr-lwf", "imm", "geodl", "a-gem", "rkr")
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
WITHIN = 2.0


def run(args: argparse.Namespace, arm: str, seed: int, lr: float) -> dict[str, Any]:
    """The report of one run, from its file where it is done."""
    name = f"{arm.replace(':', '-').replace('=', '-')}-{lr:g}-{seed}"
    place = args.to / f"{name}.json"
    if not place.is_file():
        method, _, told = arm.partition(":")
        options = dict(_option(part) for part in told.split(",") if part)
        started, folder = time.perf_counter(), args.to / "runs" / name
        report = adapt_tasks(
            args.data,
            folder,
            method=method,
            options=options,
            model=args.model,
            tasks=args.tasks,
            unrelated=args.unrelated,
            shots=args.shots,
            most_test=args.most_test,
            epochs=args.epochs,
            batch_size=args.batch,
            lr=lr,
            seed=seed,
            device=args.device,
            cache=args.to / "cache",
        )
        made = {**report.to_json(), "arm": arm, "seed": seed, "lr": lr}
        made["seconds"] = round(time.perf_counter() - started, 1)
        partial = place.with_suffix(".partial")
        partial.write_text(json.dumps(made, indent=1))
        partial.replace(place)
        shutil.rmtree(folder)
        print(f"{name}: {made['seconds']} s", flush=True)
    return dict(json.loads(place.read_text()))


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def learned(report: dict[str, Any]) -> float:
    """The mean accuracy on each task when it was just learned."""
    return float(np.diag(np.array(report["matrix"])).mean())


def choose(args: argparse.Namespace) -> float:
    """The learning rate for all methods, by fine-tuning on the first seed."""
    found = {lr: learned(run(args, "fine-tune", args.seeds[0], lr)) for lr in sorted(args.rates)}
    for lr, accuracy in found.items():
        print(f"lr {lr:g}: {accuracy:.1f} % when learned")
    return min(lr for lr, accuracy in found.items() if accuracy >= max(found.values()) - WITHIN)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    columns = {
        "when learned": learned,
        "at the end": lambda r: r["average"][-1],
        "backward transfer": lambda r: r["backward_transfer"][-1],
        "unrelated before": lambda r: r["unrelated"][0],
        "unrelated after": lambda r: r["unrelated"][-1],
        "mean of both": lambda r: r["mean_of_tasks_and_unrelated"],
        "seconds": lambda r: r["seconds"],
    }
    lines = ["| method | runs | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for arm, reports in found.items():
        cells = []
        for figure in columns.values():
            values = [figure(report) for report in reports]
            cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}")
        lines.append(f"| {arm} | {len(reports)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, reports in found.items():
        average = np.mean([report["average"] for report in reports], axis=0)
        kept = np.mean([report["unrelated"] for report in reports], axis=0)
        left.plot(range(1, len(average) + 1), average, marker="o", markersize=3, label=arm)
        right.plot(range(len(kept)), kept, marker="o", markersize=3, label=arm)
    ticks = range(len(kept))
    left.set(xlabel="tasks learned", ylabel="average accuracy on them, %", xticks=ticks[1:])
    right.set(xlabel="tasks learned", ylabel="unrelated classes, zero-shot, %", xticks=ticks)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--unrelated", required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--shots", type=int, default=50)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--most-test", type=int, default=400)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.to.mkdir(parents=True, exist_ok=True)
    lr = args.lr or choose(args)
    print(f"All methods at lr {lr:g}.")
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:  # seed by seed, so that a run that is cut short compares like with like
        for arm in args.methods:
            found.setdefault(arm, []).append(run(args, arm, seed, lr))
        print(table(found), flush=True)
        draw(found, args.to / "forgetting.png")
    (args.to / "forgetting.md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
