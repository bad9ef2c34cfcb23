"""The files of a run: a checkpoint that is whole or not there, and metrics a line each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from moviola.files import atomic
from moviola.parts.adapted import Adapted
from moviola.training.config import TrainConfig
from moviola.types import CheckpointError, Objective, UsageError, printable

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
_FREE = ("save_every", "log_every", "micro_batch")
"""Fields that a resumed run may change: they do not change what is learned (a micro batch by rounding)."""


def save(
    path: Path,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    identity: Mapping[str, str],
) -> None:
    """Everything the run needs to go on after `step` steps."""
    state = {
        "step": step,
        "config": json.dumps(asdict(config)),
        "identity": dict(identity),
        "model": model.own_state() if isinstance(model, Adapted) else model.state_dict(),
        "objective": objective.state_dict() if isinstance(objective, nn.Module) else {},
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_suffix(".partial")  # always the same name: kills leave one behind at most
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def resume(
    path: Path,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    identity: Mapping[str, str],
) -> int:
    """Put a run back as it was saved; the number of steps it has done, 0 where none was saved.

    `UsageError` names what differs where the folder belongs to another run: a field of the
    configuration, or a part of `identity` (objective, model, data).
    """
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = {**_defaults(config), **json.loads(state["config"])}  # a field may be newer than the run
        held = dict(state["identity"])
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, UnpicklingError) as error:
        raise CheckpointError(
            f"{printable(path)} is no checkpoint of a run: {str(error).splitlines()[0][:120]}",
            hint="Move it away to start again.",
        ) from error
    now = json.loads(json.dumps(asdict(config)))
    changed = [
        f"{name}: {held.get(name, 'none')} then, {given} now"
        for name, given in identity.items()
        if held.get(name) != given
    ]
    changed += [
        f"{name}: {before.get(name)} then, {now[name]} now"
        for name in now
        if name not in _FREE and before.get(name) != now[name]
    ]
    if changed:
        raise UsageError(
            f"{printable(path.parent)} holds a run with another configuration ({'; '.join(changed)}).",
            hint="Use another folder, or the same configuration to resume.",
        )
    if isinstance(model, Adapted):
        model.load_own(state["model"], source=printable(path))
    else:
        model.load_state_dict(state["model"])
    if isinstance(objective, nn.Module):
        objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _defaults(config: TrainConfig) -> dict[str, Any]:
    return {f.name: f.default for f in fields(config) if f.default is not MISSING}


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One more line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def drop_after(path: Path, step: int) -> None:
    """A killed run may have logged steps after its last checkpoint; they will be logged again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with atomic(path) as file:
            file.write("".join(line + "\n" for line in lines).encode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last one that a kill cut short is left out."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # cut short by the kill
