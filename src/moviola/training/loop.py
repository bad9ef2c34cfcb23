"""The one training loop: rows in a seeded order, any objective, checkpoints that survive a kill.

The order of rows and every augmentation are hashes of (seed, epoch, row), so the state of the data
is one number, the step: a run that is killed and started again sees the same batches.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moviola.data.hashing import permutation
from moviola.training.schedule import warmup_cosine
from moviola.types import Batch, ClipBatch, MoviolaError, Objective, UsageError


@dataclass(frozen=True)
class TrainConfig:
    """What defines a run; a resumed run must have the same."""

    steps: int
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 200
    lr_floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_grad: float = 1.0
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    save_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "clip_grad", "save_every", "log_every"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}.")


class TrainingData(Protocol):
    """Rows by number. `batch` decodes and augments last; its randomness hashes (seed, epoch, row)."""

    def __len__(self) -> int: ...
    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> Batch: ...


@dataclass(frozen=True)
class Progress:
    """One logged step: losses averaged since the last one, rows per second, seconds left."""

    step: int
    steps: int
    losses: dict[str, float]
    rows_per_second: float
    seconds_left: float


class NotFinite(MoviolaError):
    """The loss became NaN or infinite; the message names the step and rows."""


class RowOrder:
    """Which rows a step takes: `order(step) -> (epoch, rows)`.

    An epoch holds the whole batches that fit; the rows left over come in another epoch's order.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.per_epoch = count // batch_size
        if self.per_epoch == 0:
            raise UsageError(
                f"There are {count} rows, fewer than one batch of {batch_size}.",
                hint="Lower batch_size or add data.",
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._rows = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, permutation(self.seed, epoch, self.count)
        return epoch, self._rows[place * self.batch_size : (place + 1) * self.batch_size]


def train(
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
    folder: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    stop_at: int | None = None,
) -> nn.Module:
    """Train `model` in place for `config.steps` steps, resuming from `folder` if it holds a checkpoint.

    Writes `folder/checkpoint.pt` (weights, objective, optimizer, step; whole or not at all) and
    `folder/metrics.jsonl`. `stop_at` ends this call after that step of a longer schedule.
    Raises `NotFinite` with the step and rows named when a loss is not finite, and `UsageError` when
    the folder belongs to a run with another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        list(objective.param_groups(model)), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    start = _resume(folder / "checkpoint.pt", model, objective, optimizer, config)
    metrics = folder / "metrics.jsonl"
    _drop_metrics_after(metrics, start)
    device = next(model.parameters()).device
    model.train()
    order = RowOrder(len(data), config.batch_size, config.seed)
    since, since_step, sums = time.perf_counter(), start, dict[str, float]()
    last = config.steps if stop_at is None else min(config.steps, stop_at)
    for step in range(start, last):
        epoch, rows = order(step)
        batch = _to_device(data.batch(rows, seed=config.seed, epoch=epoch, step=step), device)
        factor = warmup_cosine(step, steps=config.steps, warmup=config.warmup, floor=config.lr_floor)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            losses = objective.forward(model, batch)
        total = torch.stack(list(losses.values())).sum()
        value = float(total.detach())
        if not math.isfinite(value):
            raise NotFinite(
                f"The loss is {value} at step {step} (epoch {epoch}), rows {rows[:8].tolist()}...",
                hint="Look at these rows; if they are sound, lower the learning rate.",
            )
        total.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], config.clip_grad
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(model)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach())
        done = step + 1
        if done % config.log_every == 0 or done == last:
            now, count = time.perf_counter(), done - since_step
            means = {name: total / count for name, total in sums.items()}
            speed = count * config.batch_size / (now - since)
            left = (config.steps - done) * config.batch_size / speed
            _append(metrics, {"step": done, **means, "rows_per_second": round(speed, 1)})
            if on_progress:
                on_progress(Progress(done, config.steps, means, speed, left))
            since, since_step, sums = now, done, {}
        if evaluate and evaluate_every and (done % evaluate_every == 0 or done == config.steps):
            model.eval()
            _append(metrics, {"step": done, **evaluate(model, done)})
            model.train()
            since, since_step, sums = time.perf_counter(), done, {}
        if done % config.save_every == 0 or done == config.steps:
            _save(folder / "checkpoint.pt", model, objective, optimizer, config, done)
    model.eval()
    return model


def _to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor | ClipBatch) else v for k, v in batch.items()}


def _save(
    path: Path,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
) -> None:
    state = {
        "step": step,
        "config": json.dumps(asdict(config)),
        "model": model.state_dict(),
        "objective": objective.state_dict() if isinstance(objective, nn.Module) else {},
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _resume(
    path: Path,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    before, now = json.loads(state["config"]), json.loads(json.dumps(asdict(config)))
    changed = [f"{k}: {before.get(k)} then, {now[k]} now" for k in now if before.get(k) != now[k]]
    if changed:
        raise UsageError(
            f"{path.parent} holds a run with another configuration ({'; '.join(changed)}).",
            hint="Use another folder, or the same configuration to resume.",
        )
    model.load_state_dict(state["model"])
    if isinstance(objective, nn.Module):
        objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _drop_metrics_after(path: Path, step: int) -> None:
    """A killed run may have logged steps after its last checkpoint; they will be logged again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # cut short by the kill
