"""`brief.fit` for batches made from row numbers, such as clips; every group of parameters at its own rate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from moviola.types import Batch, Objective


def fit_rows(
    model: nn.Module,
    objective: Objective,
    batch_of: Callable[[np.ndarray], Batch],
    count: int,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    clip_grad: float = 5.0,
) -> None:
    """Train `model` in place on rows drawn from `count` with replacement, the rate up and down once.

    `batch_of(rows)` makes a batch. Groups learn at `lr` times their `lr_scale`; `clip_grad` is the longest
    gradient. The objective is told each step by `lr_factors`, whose answer is not used. Dropout draws from
    torch's global generator.
    """
    groups = list(objective.param_groups(model))
    rates = [lr * group.get("lr_scale", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 3])
    model.train()
    for step in range(steps):
        losses = objective.forward(model, batch_of(rng.integers(count, size=batch)))
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        objective.lr_factors(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        objective.after_step(model)
    model.eval()
