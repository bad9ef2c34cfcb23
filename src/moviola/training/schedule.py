"""Learning-rate schedules as factors of the peak rate."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Linear from 0 over `warmup` steps, then half a cosine down to `floor` at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def windowed_cosine(step: int, *, start: int, end: int, warmup: int) -> float:
    """`warmup_cosine` for parameters that train from step `start` to step `end` only: 0 outside.

    ProtoCLIP's asymmetric schedule is two of these: the image tower's ends where the last episode
    begins, the other parameters' at the end of the run.
    """
    if not start <= step <= end:
        return 0.0
    return warmup_cosine(step - start, steps=end - start, warmup=warmup)
