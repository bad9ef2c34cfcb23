"""The one training loop: rows in a seeded order, any objective, checkpoints that survive a kill.

The order of rows, every augmentation and dropout are hashes of (seed, epoch, row) or (seed, step), so
the state of the data is one number, the step: a run that is killed and started again sees the same
batches and takes the same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from moviola.data.hashing import hash_uint64, permutation
from moviola.training.caching import compute
from moviola.training.checkpoint import CHECKPOINT, METRICS, append, drop_after, resume, save
from moviola.training.config import TrainConfig
from moviola.training.episodes import RowsToCome
from moviola.training.processes import Processes
from moviola.training.schedule import warmup_cosine
from moviola.types import Batch, ClipBatch, MoviolaError, Objective, UsageError

__all__ = ["NotFinite", "Progress", "RowOrder", "TrainConfig", "TrainingData", "train"]

SKIPPED = "skipped.jsonl"
_RANDOM = 0x7A11  # the stream of hashes that seeds dropout


class TrainingData(Protocol):
    """Rows by number. `batch` decodes and augments last; its randomness hashes (seed, epoch, row)."""

    def __len__(self) -> int: ...
    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> Batch: ...


@runtime_checkable
class OrderedData(Protocol):
    """Training data that says in which order its rows are best read in an epoch (every row once)."""

    def order(self, seed: int, epoch: int) -> np.ndarray: ...


Feed = Callable[[TrainingData, Sequence[tuple[int, int, np.ndarray]], int], Iterator[Batch]]
"""feed(data, steps, seed): the batches of (step, epoch, rows) in their order, read ahead if it can."""


@dataclass(frozen=True)
class Progress:
    """One logged step: losses averaged since the last one, rows per second, seconds left."""

    step: int
    steps: int
    losses: dict[str, float]
    rows_per_second: float
    seconds_left: float


class NotFinite(MoviolaError):
    """The loss or its gradient became NaN or infinite; the message names the step and rows."""


class RowOrder:
    """Which rows a step takes: `order(step) -> (epoch, rows)`.

    An epoch holds the whole batches that fit; the rows left over come in another epoch's order.
    `arrange(seed, epoch)` gives an epoch's order of all rows; None: any order is as good.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        arrange: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        self.per_epoch = count // batch_size
        if self.per_epoch == 0:
            raise UsageError(
                f"There are {count} rows, fewer than one batch of {batch_size}.",
                hint="Lower batch_size or add data.",
            )
        self.count, self.batch_size, self.seed, self.arrange = count, batch_size, seed, arrange
        self._epoch, self._rows = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            arrange = self.arrange or (lambda seed, epoch: permutation(seed, epoch, self.count))
            self._epoch, self._rows = epoch, arrange(self.seed, epoch)
        return epoch, self._rows[place * self.batch_size : (place + 1) * self.batch_size]


class _Steps(Sequence[tuple[int, int, np.ndarray]]):
    """One process's rows of the steps from `start` to `stop`."""

    def __init__(self, order: RowOrder, start: int, stop: int, rank: int, count: int) -> None:
        self.order, self.start, self.stop, self.rank = order, start, stop, rank
        self.share = order.batch_size // count

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, rows = self.order(self.start + index)
        return self.start + index, epoch, rows[self.rank * self.share : (self.rank + 1) * self.share]


def in_process(
    data: TrainingData, steps: Sequence[tuple[int, int, np.ndarray]], seed: int
) -> Iterator[Batch]:
    """The plain feed: each batch is made when it is asked for."""
    for step, epoch, rows in steps:
        yield data.batch(rows, seed=seed, epoch=epoch, step=step)


def train(
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
    folder: Path,
    *,
    identity: Mapping[str, str] | None = None,
    processes: Processes | None = None,
    feed: Feed = in_process,
    on_progress: Callable[[Progress], None] | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    stop_at: int | None = None,
) -> nn.Module:
    """Train `model` in place for `config.steps` steps, resuming from `folder` if it holds a checkpoint.

    Writes `folder/checkpoint.pt` (weights, objective, optimizer, step; whole or not at all),
    `folder/metrics.jsonl`, and `folder/skipped.jsonl` where rows could not be used. `identity` names
    what a resumed run must share besides the configuration (objective, model, data). `stop_at` ends
    this call after that step of a longer schedule. Seeds torch's global generator at every step.

    Raises `NotFinite` with the step and rows named when a loss or gradient is not finite, and
    `UsageError` when the folder belongs to a run with another configuration.
    """
    processes, identity = processes or Processes(), dict(identity or {})
    if config.batch_size % processes.count:
        raise UsageError(
            f"A batch of {config.batch_size} cannot be shared evenly by {processes.count} processes.",
            hint=f"Use a multiple of {processes.count}.",
        )
    processes.require_same({**identity, "configuration": repr(config)})
    folder.mkdir(parents=True, exist_ok=True)
    groups = [dict(group) for group in objective.param_groups(model)]
    scales = [group.pop("lr_scale", 1.0) for group in groups]
    optimizer = _optimizer(groups, config)
    start = resume(folder / CHECKPOINT, model, objective, optimizer, config, identity)
    device = next(model.parameters()).device
    if isinstance(objective, nn.Module):
        objective.to(device).train()
    log = _Log(folder, config, start, on_progress) if processes.main else None
    _to_training(model, config)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    precision = torch.bfloat16 if config.precision == "bfloat16" else None
    arrange = data.order if isinstance(data, OrderedData) else None
    order = RowOrder(len(data), config.batch_size, config.seed, arrange)
    episodes = _Episodes(config, order, model, objective, data, processes, device, precision)
    last = config.steps if stop_at is None else min(config.steps, stop_at)
    if evaluate and evaluate_every and start == 0:
        _evaluated(model, evaluate, 0, config, log)
    batches = feed(data, _Steps(order, start, last, processes.rank, processes.count), config.seed)
    try:
        for step in range(start, last):
            episodes.before(step)
            batch = to_device(next(batches), device)
            seed = int(hash_uint64(config.seed, np.array([step]), _RANDOM)[0] >> np.uint64(2))
            losses = compute(
                model,
                objective,
                batch,
                micro_batch=config.micro_batch,
                processes=processes,
                precision=precision,
                seed=seed,
            )
            objective.before_step(model)
            norm = nn.utils.clip_grad_norm_(trained, config.clip_grad)
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            if not math.isfinite(sum(values.values())) or not math.isfinite(float(norm)):
                raise _not_finite(step, order(step), batch, values, float(norm))
            factors = objective.lr_factors(step, config.steps) or [
                warmup_cosine(step, steps=config.steps, warmup=config.warmup, floor=config.lr_floor)
            ] * len(scales)
            for group, scale, factor in zip(optimizer.param_groups, scales, factors, strict=True):
                group["lr"] = config.lr * scale * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            objective.after_step(model)
            done = step + 1
            if log:
                log.step(done, values, float(norm), optimizer.param_groups[0]["lr"], batch.get("skipped", ()))
            if evaluate and evaluate_every and (done % evaluate_every == 0 or done == config.steps):
                _evaluated(model, evaluate, done, config, log)
            if done % config.save_every == 0 or done == config.steps:
                if processes.main:
                    save(folder / CHECKPOINT, model, objective, optimizer, config, done, identity)
                processes.wait()
    finally:
        if isinstance(batches, Generator):
            batches.close()  # readers and their processes stop with the run
    model.eval()
    return model


def _to_training(model: nn.Module, config: TrainConfig) -> None:
    model.train()
    if config.keep_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _evaluated(
    model: nn.Module,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]],
    done: int,
    config: TrainConfig,
    log: _Log | None,
) -> None:
    """Every process evaluates alike (no one waits long for another); the first one writes."""
    model.eval()
    with torch.no_grad():
        figures = evaluate(model, done)
    _to_training(model, config)
    if log:
        log.evaluated(done, figures)


class _Log:
    """Metrics, skipped rows and progress, averaged over `log_every` steps."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        start: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.metrics, self.skipped = folder / METRICS, folder / SKIPPED
        self.config, self.on_progress = config, on_progress
        drop_after(self.metrics, start)
        drop_after(self.skipped, start)
        self._since(start)

    def _since(self, step: int) -> None:
        self.start, self.time, self.sums = step, time.perf_counter(), dict[str, float]()

    def step(
        self,
        done: int,
        losses: Mapping[str, float],
        norm: float,
        lr: float,
        skipped: Sequence[tuple[int, str]],
    ) -> None:
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        for row, reason in skipped:
            append(self.skipped, {"step": done, "row": int(row), "reason": reason})
        if done % self.config.log_every and done != self.config.steps:
            return
        count = done - self.start
        means = {name: total / count for name, total in self.sums.items()}
        speed = count * self.config.batch_size / max(time.perf_counter() - self.time, 1e-9)
        left = (self.config.steps - done) * self.config.batch_size / speed
        extra = {"gradient_norm": norm, "lr": lr, "rows_per_second": round(speed, 1)}
        append(self.metrics, {"step": done, **means, **extra})
        if self.on_progress:
            self.on_progress(Progress(done, self.config.steps, means, speed, left))
        self._since(done)

    def evaluated(self, done: int, figures: Mapping[str, float]) -> None:
        append(self.metrics, {"step": done, **figures})
        self._since(done)


class _Episodes:
    """Calls `on_episode` where one begins; a resumed run has the objective's state and goes on inside."""

    def __init__(
        self,
        config: TrainConfig,
        order: RowOrder,
        model: nn.Module,
        objective: Objective,
        data: TrainingData,
        processes: Processes,
        device: torch.device,
        precision: torch.dtype | None,
    ) -> None:
        self.config, self.order, self.model, self.objective = config, order, model, objective
        self.data, self.processes, self.device, self.precision = data, processes, device, precision

    def before(self, step: int) -> None:
        length = self.config.episode_steps
        if not length or step % length:
            return
        steps = range(step, min(step + length, self.config.steps))
        epoch = self.order(step)[0]
        rows = np.concatenate([self.order(s)[1] for s in steps])
        row_ids = list(dict.fromkeys(rows.tolist()))

        def load(rows: np.ndarray) -> Batch:
            made = self.data.batch(rows, seed=self.config.seed, epoch=epoch, step=step)
            return to_device(made, self.device)

        episode = RowsToCome(
            step // length,
            -(-self.config.steps // length),
            row_ids,
            self.model,
            load,
            self.processes,
            self.config.micro_batch or self.order.batch_size,
            self.precision,
        )
        self.objective.on_episode(self.model, episode)


def _not_finite(
    step: int, where: tuple[int, np.ndarray], batch: Batch, losses: Mapping[str, float], norm: float
) -> NotFinite:
    epoch, rows = where
    told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    ids = ", ".join(map(str, batch["id"][:4])) if "id" in batch else ""
    return NotFinite(
        f"The loss or its gradient is not finite at step {step} (epoch {epoch}): {told}; gradient norm "
        f"{norm:.4g}. Rows {rows[:8].tolist()}...{f' (ids {ids}...)' if ids else ''}",
        hint="Look at these rows; if they are sound, lower the learning rate.",
    )


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {k: v.to(device) if isinstance(v, Tensor | ClipBatch) else v for k, v in batch.items()}
