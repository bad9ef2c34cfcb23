"""A loop for claims: tensors in memory, one process, no checkpoint. Real runs go through `moviola train`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moviola.types import Objective


def fit(
    model: nn.Module,
    objective: Objective,
    data: Mapping[str, Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    """Train `model` in place on rows drawn from `data` with replacement, the rate up and down once."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(list(objective.param_groups(model)), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    count = len(next(iter(data.values())))
    model.train()
    for _ in range(steps):
        rows = torch.randint(count, (batch,))
        losses = objective.forward(model, {name: tensor[rows] for name, tensor in data.items()})
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        objective.after_step(model)
    model.eval()
