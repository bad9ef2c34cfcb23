"""What a recognition model is worth at a step: its figures, kept so that a resumed run has them all.

Axis letters: N clips, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moviola.clip.loaded import Model
from moviola.files import atomic
from moviola.metrics.classification import mean_class_accuracy, per_class_accuracy, topk_accuracy
from moviola.verbs.classify import ClassScorer
from moviola.verbs.common import Progress, Skipped
from moviola.verbs.recognise_data import Protocol, Task
from moviola.verbs.views import Views, view_scores

MEASURED = "measured.json"


class Measure:
    """Figures of the model as it is at a step, kept in `measured.json` so that a resumed run has them all."""

    def __init__(
        self,
        folder: Path,
        model: Model,
        asked: Protocol,
        sentences: Sequence[str],
        views: Views,
        frames: int,
        device: torch.device,
        on_progress: Progress | None,
    ) -> None:
        self.path, self.model, self.asked, self.sentences = folder / MEASURED, model, asked, sentences
        self.views, self.frames, self.device, self.on_progress = views, frames, device, on_progress

        seen = [(task.name, task.data.fingerprint, list(task.rows), task.classes) for task in asked.tasks]
        told = json.dumps([vars(views), list(sentences), seen])
        self.by = hashlib.sha256(told.encode()).hexdigest()[:16]

    def read(self) -> dict[str, Any]:
        """What was measured by step, of these clips by these views."""
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        return {step: made for step, made in found.items() if made["by"] == self.by}

    def __call__(self, module: nn.Module, step: int) -> dict[str, float]:
        learned = self.asked.data.classes
        model = self.model.around(module, device=self.device, hash=f"step {step}", classes=learned)
        figures: dict[str, float] = {}
        per_class: dict[str, float] = {}
        failed: list[Skipped] = []
        clips = 0
        for task in self.asked.tasks:
            if model.has_head and model.adaptation != "classifier":
                figures |= self._own(model, task)
            index_N, scores_NC = self._scores(model, task, failed)
            labels_N = task.labels_N[index_N]
            ks = (1, 5) if len(task.classes) > 5 else (1,)
            top = topk_accuracy(scores_NC, labels_N, ks)
            if task.name == "all":
                figures |= {"top-1": top["top1"], **({"top-5": top["top5"]} if "top5" in top else {})}
                figures["mean per class"] = mean_class_accuracy(scores_NC, labels_N)
            else:
                figures[task.name] = top["top1"]
            by_class = zip(task.classes, per_class_accuracy(scores_NC, labels_N).tolist(), strict=True)
            per_class |= {name: value for name, value in by_class if np.isfinite(value)}
            clips += len(labels_N)
        if {"base", "new"} <= set(figures):
            both = figures["base"] + figures["new"]
            figures["harmonic mean"] = 2 * figures["base"] * figures["new"] / both if both else 0.0
        made = {
            "by": self.by,
            "figures": figures,
            "per_class": per_class,
            "clips": clips,
            "failed": [(one.path, one.reason) for one in failed],
        }
        with atomic(self.path) as file:
            told = {**(self.read() if step else {}), str(step): made}
            file.write(json.dumps(told, indent=1).encode("utf-8", "replace"))
        return figures

    def _own(self, model: Model, task: Task) -> dict[str, float]:
        """The figure of the classifier that the model has beside words, of classes that it learned."""
        if not set(task.classes) <= set(self.asked.data.classes):
            return {}
        index_N, scores_NC = self._scores(model, task, [], own=True)
        name = "own head" if task.name == "all" else f"own head, {task.name}"
        return {name: topk_accuracy(scores_NC, task.labels_N[index_N], (1,))["top1"]}

    def _scores(
        self, model: Model, task: Task, failed: list[Skipped], *, own: bool | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        scorer = ClassScorer(model, task.classes, self.sentences, batch_size=32, frames=self.frames, own=own)
        count = self.frames if model.frame_spec.count is None else None
        return view_scores(
            scorer,
            task.data,
            task.rows,
            self.views,
            frames=count,
            failed=failed,
            on_progress=self.on_progress,
        )
