"""What defines a training run, apart from its data and its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moviola.types import UsageError


@dataclass(frozen=True)
class TrainConfig:
    """What defines a run; a resumed run must have the same.

    batch_size       rows of a step, over all processes
    micro_batch      rows that pass through the towers at a time; None: all of a process's share
    optimizer        adamw, or sgd with `momentum` (betas and eps are then not used)
    lr               the peak, after `warmup` steps; half a cosine leads down to `lr_floor` times it
    episode_steps    steps between calls of the objective's `on_episode`; 0: no episodes
    keep_statistics  BatchNorm keeps the means and variances it came with, which few classes or small
                     batches would pull away from the pictures that the model learned from
    """

    steps: int
    batch_size: int = 256
    micro_batch: int | None = None
    lr: float = 1e-3
    warmup: int = 200
    lr_floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_grad: float = 1.0
    seed: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    precision: Literal["float32", "bfloat16"] = "float32"
    episode_steps: int = 0
    keep_statistics: bool = False
    save_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "clip_grad", "save_every", "log_every", "eps"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("warmup", "episode_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.lr > 10:
            raise UsageError(f"A learning rate of {self.lr} cannot be meant.", hint="Usual: 1e-6 to 1e-2.")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UsageError(f"micro_batch must be at least 1, got {self.micro_batch}.")
        if not 0 <= self.lr_floor <= 1:
            raise UsageError(f"lr_floor is a share of lr, from 0 to 1, got {self.lr_floor}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas are two numbers in [0, 1), got {self.betas}.")
        if self.optimizer not in ("adamw", "sgd") or not 0 <= self.momentum < 1:
            raise UsageError(
                f"optimizer is adamw or sgd and momentum in [0, 1), got {self.optimizer!r} and "
                f"{self.momentum}."
            )
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"precision is float32 or bfloat16, got {self.precision!r}.")
