"""Tasks one after the other on the disk: each a run of the training loop, each measured, all resumable.

Axis letters: N pictures, C classes, K templates, L tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moviola.clip.loaded import Model
from moviola.clip.native import read_json, read_safetensors, write_safetensors
from moviola.data.class_pictures import ClassPictures
from moviola.data.classes import ClassSet
from moviola.data.hashing import permutation
from moviola.data.shots import few_shot
from moviola.files import atomic
from moviola.metrics.classification import per_class_accuracy, topk_accuracy
from moviola.metrics.continual import task_accuracies
from moviola.training.checkpoint import CHECKPOINT
from moviola.training.continual import FineTune, Task, Words
from moviola.training.loop import Progress as Logged
from moviola.training.loop import train
from moviola.types import Batch, UsageError, printable
from moviola.verbs.adapt_train import configuration
from moviola.verbs.common import Progress, Skipped
from moviola.verbs.set_reader import SetReader
from moviola.verbs.task_report import TaskReport

RUN, MODEL, PICTURE = "run.json", "model", "matrix.png"
_BEFORE, _DONE, _WEIGHTS = "before.json", "done.json", "after.safetensors"
_MEMORY = 1 << 40  # apart from the epochs, whose order of rows is a hash, too


class Exam:
    """Pictures to measure on, after each task anew.

    rows        of `data`, whose classes are numbered in the order of the tasks
    other       classes that are never learned; at most `most` of its pictures are used
    cache       where the vectors of the unchanged model are kept
    """

    def __init__(
        self,
        data: ClassSet,
        rows: np.ndarray,
        groups: Sequence[Sequence[str]],
        other: ClassSet | None,
        templates: Sequence[str],
        most: int | None,
        cache: str | Path | None,
    ) -> None:
        self.data, self.rows, self.groups, self.other = data, rows, numbered(groups), other
        self.templates, self.cache = templates, cache
        self.other_rows = [] if other is None else other.sample(most)
        self.failed: dict[str, Skipped] = {}
        labels = set(data.labels_N[rows].tolist())
        missing = [number for number, group in enumerate(self.groups) if not labels & set(group)]
        if missing:
            raise UsageError(
                f"No picture is left to measure task {missing[0] + 1} on.",
                hint="Use fewer shots, a larger held_out, or more pictures.",
            )

    def __call__(self, model: Model, *, unchanged: bool = False) -> tuple[list[float], float | None]:
        """The accuracy on each task, and on unrelated classes where there are any."""
        cache = self.cache if unchanged else None
        scores_NC, labels_N = self._scores(model, self.data, self.rows.tolist(), cache)
        accuracy_C = per_class_accuracy(scores_NC, labels_N)
        for group in self.groups:
            if np.isnan(accuracy_C[list(group)]).all():
                names = ", ".join(self.data.classes[number] for number in group[:5])
                raise UsageError(f"None of the pictures that were kept to measure {names} can be read.")
        row = task_accuracies(accuracy_C, self.groups).tolist()
        if self.other is None:
            return row, None
        return row, topk_accuracy(*self._scores(model, self.other, self.other_rows, cache), (1,))["top1"]

    def _scores(
        self, model: Model, data: ClassSet, rows: list[int], cache: str | Path | None
    ) -> tuple[np.ndarray, np.ndarray]:
        failed: list[Skipped] = []
        index_N, vectors_ND = SetReader(model, data, rows, cache=cache, failed=failed).vectors()
        self.failed.update({one.path: one for one in failed})
        return vectors_ND @ model.embed_prompts(data.classes, self.templates).T, data.labels_N[index_N]


def numbered(groups: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """The classes of each task by number, counted through."""
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return [tuple(range(end - len(group), end)) for end, group in zip(ends, groups, strict=True)]


@dataclass
class TaskSequence:
    """Everything `adapt_tasks` was asked for. `rows` of `data` are learned from; `settings` change `recipe`.

    `folder/run/task-K` holds a task's checkpoint, metrics and, when it is done, its figures; the weights
    after it lie there until the next task is done.
    """

    folder: Path
    method: str
    make: Callable[..., FineTune]
    options: Mapping[str, Any]
    base: Model
    data: ClassSet
    groups: tuple[tuple[str, ...], ...]
    rows: np.ndarray
    templates: Sequence[str]
    exam: Exam
    recipe: Mapping[str, Any]
    settings: Mapping[str, Any]
    shown: Mapping[str, Any]
    seed: int
    on_progress: Progress | None = None

    def run(self, notes: Sequence[str]) -> TaskReport:
        """Learn, measure and save; what was done before is not done again."""
        self._describe()
        module = copy.deepcopy(self.base.module)  # the caller's stays as it is
        tokens_CKL = self._tokens()
        before, unrelated = self._before()
        found = [self._learn(module, self._task(index, tokens_CKL)) for index in range(len(self.groups))]
        self._as_model(module).save(self.folder / MODEL)
        skipped = [*self.data.skipped, *(tuple(one) for done in found for one in done["skipped"])]
        failed = {path: Skipped(path, reason) for path, reason in skipped} | self.exam.failed
        report = TaskReport(
            folder=self.folder,
            model=self.folder / MODEL,
            method=self.method,
            base=self.base.name,
            tasks=self.groups,
            learned_from=tuple(done["pictures"] for done in found),
            measured_on=len(self.exam.rows),
            before=tuple(before),
            matrix=tuple(tuple(done["row"]) for done in found),
            unrelated=() if unrelated is None else (unrelated, *(done["unrelated"] for done in found)),
            failed=tuple(failed.values()),
            notes=tuple(notes),
        )
        return replace(report, notes=(*notes, *report.draw(self.folder / PICTURE)))

    def _describe(self) -> None:
        """`run.json`: what was asked for; a folder that holds something else is left alone."""
        folder = self.folder
        if folder.exists() and (
            not folder.is_dir() or (any(folder.iterdir()) and not (folder / RUN).is_file())
        ):
            raise UsageError(
                f"{printable(folder)} holds other files: it is no run's folder.",
                hint="Name a new folder with --to.",
            )
        if not (folder / RUN).is_file():
            about = {**self._identity, "tasks": self.groups, "seed": self.seed}
            _write(folder / RUN, about)

    @property
    def _identity(self) -> dict[str, str]:
        """What a resumed call must share with the one before."""
        exam = self.exam
        measured = [
            exam.rows.tolist(),
            exam.other_rows,
            None if exam.other is None else exam.other.fingerprint,
        ]
        return {
            "method": f"{self.method} {json.dumps(dict(self.options), sort_keys=True, default=str)}",
            "model": f"{self.base.name} ({self.base.hash})",
            "settings": json.dumps({**self.settings, **self.shown, "seed": self.seed}, sort_keys=True),
            "tasks": _digest([self.groups, list(self.templates)]),
            "data": _digest([self.data.fingerprint, self.rows.tolist()]),
            "measured on": _digest(measured),
        }

    def _tokens(self) -> Tensor:
        assert self.base.tokenizer is not None
        prompts = [text.replace("{}", name) for name in self.data.classes for text in self.templates]
        tokens_NL = torch.from_numpy(self.base.tokenizer(prompts))
        return tokens_NL.unflatten(0, (len(self.data.classes), len(self.templates)))

    def _task(self, index: int, tokens_CKL: Tensor) -> Task:
        current = numbered(self.groups)[index]
        assert self.base.tokenizer is not None
        words, seen = Words.of(self.base.tokenizer), tuple(range(current[-1] + 1))
        return Task(index, current, seen, tokens_CKL, words, self.seed, self._memory(current[0]))

    def _memory(self, first: int) -> Callable[[int, int, int], Batch] | None:
        """Batches of the pictures of the classes before number `first`."""
        if not first:
            return None

        @lru_cache(maxsize=1)
        def pictures(kept: int) -> ClassPictures:
            rows = self.rows[self.data.labels_N[self.rows] < first]
            return self._pictures(rows[few_shot(self.data.labels_N[rows], kept, self.seed)])

        def earlier(kept: int, size: int, step: int) -> Batch:
            held = pictures(kept)
            rows = permutation(self.seed, _MEMORY + step, len(held))[:size]
            return held.batch(rows, seed=self.seed, epoch=_MEMORY + step, step=step)

        return earlier

    def _pictures(self, rows: np.ndarray) -> ClassPictures:
        return ClassPictures(self.data, rows, FineTune.needs, recipe=self.base.recipe, **self.shown)

    def _before(self) -> tuple[list[float], float | None]:
        """The unchanged model's figures."""
        place = self.folder / "run" / _BEFORE
        done = self._done(place)
        if done is None:
            row, unrelated = self.exam(self.base, unchanged=True)
            done = {"identity": self._identity, "row": row, "unrelated": unrelated}
            _write(place, done)
        return done["row"], done["unrelated"]

    def _done(self, place: Path) -> dict[str, Any] | None:
        """What was written when this was done; `UsageError` where that was another run."""
        if not place.is_file():
            return None
        done = read_json(place)
        changed = [
            f"{name}: {done['identity'].get(name)} then, {now} now"
            for name, now in self._identity.items()
            if done["identity"].get(name) != now
        ]
        if changed:
            raise UsageError(
                f"{printable(self.folder)} holds a run with another configuration ({'; '.join(changed)}).",
                hint="Use another folder, or the same configuration to resume.",
            )
        return dict(done)

    def _learn(self, module: nn.Module, task: Task) -> dict[str, Any]:
        """Train `module` on one task, or load what was learned; the task's figures."""
        folder = self.folder / "run" / f"task-{task.index + 1}"
        done = self._done(folder / _DONE)
        if done is not None:
            if (folder / _WEIGHTS).is_file():
                module.load_state_dict(read_safetensors(folder / _WEIGHTS))
            return done
        rows = self.rows[np.isin(self.data.labels_N[self.rows], task.current)]
        pictures = self._pictures(rows)
        empty = [self.data.classes[number] for number in task.current if number not in pictures.labels_N]
        if empty:
            raise UsageError(f"None of the pictures of {', '.join(empty[:5])} can be read.")
        config = configuration(self.recipe, self.settings, len(pictures), self.seed)

        def tell(logged: Logged) -> None:
            if self.on_progress is not None:
                losses = ", ".join(f"{name} {value:.3f}" for name, value in logged.losses.items())
                at, total = task.index * config.steps + logged.step, len(self.groups) * config.steps
                self.on_progress(at, total, f"task {task.index + 1}: {losses}")

        device = self.base.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            objective = self.make(module, task, **self.options)
            train(module, objective, pictures, config, folder, identity=self._identity, on_progress=tell)
        objective.finish(module)
        write_safetensors(folder / _WEIGHTS, module.state_dict())
        row, unrelated = self.exam(self._as_model(module, f"after task {task.index + 1}"))
        done = {
            "identity": self._identity,
            "row": row,
            "unrelated": unrelated,
            "pictures": len(pictures),
            "skipped": pictures.skipped,
        }
        _write(folder / _DONE, done)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        (folder.with_name(f"task-{task.index}") / _WEIGHTS).unlink(missing_ok=True)
        return done

    def _as_model(self, module: nn.Module, hash: str | None = None) -> Model:
        base = self.base
        name, origin = f"{base.name} taught by {self.method}", {"name": base.name, "hash": base.hash}
        return base.around(module, name=name, device=base.device, base=origin, hash=hash)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with atomic(path) as file:
        file.write(json.dumps(content, indent=1).encode())
