"""Adapting by gradient: the module a system declares, through the one training loop."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moviola.clip.loaded import Model
from moviola.data.class_pictures import ClassPictures
from moviola.data.classes import ClassSet
from moviola.training.checkpoint import METRICS, read_metrics
from moviola.training.config import TrainConfig
from moviola.training.loop import Progress as Logged
from moviola.training.loop import train
from moviola.types import Adaptation, UsageError
from moviola.verbs.adapt_methods import options_for
from moviola.verbs.common import Progress
from moviola.verbs.train_report import draw


def run_folder(to: Path) -> Path:
    """Where a run keeps its checkpoint until the adapted model takes its place at `to`."""
    return to.with_name(f".{to.name}.adapting")


def train_adaptation(
    method: str,
    adaptation: Adaptation,
    model: Model,
    data: ClassSet,
    rows: np.ndarray,
    folder: Path,
    *,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    crop_area: tuple[float, float],
    flip: float,
    seed: int,
    on_progress: Progress | None,
) -> tuple[torch.nn.Module, TrainConfig]:
    """The trained module and what it was trained with; a killed run in `folder` goes on.

    `settings` change the recipe's `epochs` (or `steps`), `batch_size`, `lr` and `precision`.
    """
    assert adaptation.start is not None
    assert adaptation.objective is not None
    mine = options_for({"start": adaptation.start, "objective": adaptation.objective}, options, method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = adaptation.start(model, data.classes, **mine["start"])
        objective = adaptation.objective(module, **mine["objective"])
    pictures = ClassPictures(data, rows, objective.needs, recipe=model.recipe, crop_area=crop_area, flip=flip)
    config = configuration(adaptation.recipe, settings, len(pictures), seed)
    identity = {
        "method": f"{method} {json.dumps(dict(options), sort_keys=True, default=str)}",
        "model": f"{model.name} ({model.hash})",
        "classes": hashlib.sha256(json.dumps(data.classes).encode()).hexdigest()[:16],
        "data": pictures.fingerprint,
    }

    def tell(logged: Logged) -> None:
        if on_progress is not None:
            losses = ", ".join(f"{name} {value:.3f}" for name, value in logged.losses.items())
            on_progress(logged.step, logged.steps, losses)

    module.to(model.device)
    train(module, objective, pictures, config, folder, identity=identity, on_progress=tell)
    return module, config


def configuration(
    recipe: Mapping[str, Any], settings: Mapping[str, Any], count: int, seed: int
) -> TrainConfig:
    """The loop's configuration: what was asked for, else the authors' recipe."""
    given = {**recipe, **{name: value for name, value in settings.items() if value is not None}}
    batch = int(given.pop("batch_size", 32))
    if batch < 1:
        raise UsageError(f"The batch size must be at least 1, got {batch}.")
    batch = min(batch, count)
    epochs, steps = given.pop("epochs", 10), given.pop("steps", None)
    if "epochs" in settings and settings["epochs"] is not None and steps is not None:
        raise UsageError("Give epochs or steps, not both.")
    steps = steps or max(1, math.ceil(epochs * (count // batch)))
    return TrainConfig(
        steps=steps,
        batch_size=batch,
        seed=seed,
        save_every=max(1, min(200, steps // 5)),
        log_every=max(1, min(10, steps // 20)),
        **{"warmup": 0, **given},
    )


def keep_curves(run: Path, to: Path) -> list[str]:
    """Metrics and curves of the run into the model's folder; notes for the user."""
    metrics = read_metrics(run)
    shutil.copyfile(run / METRICS, to / METRICS)
    return draw(metrics, to / "losses.png")
