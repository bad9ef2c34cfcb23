"""Which of the frames at hand a `FrameSpec` takes, and how a short clip is padded."""

from __future__ import annotations

import numpy as np

from moviola.types import FrameSpec, UsageError


def choose_frames(spec: FrameSpec, times_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices_K into the frames of one clip, and mask_K (False where a frame is only padding).

    `times_T` are seconds in rising order. Indices repeat where the clip is shorter than `spec.count`.
    """
    times_T = np.asarray(times_T, dtype=np.float64)
    given = len(times_T)
    if given == 0:
        raise UsageError("A clip without frames has no vector; expected at least one frame.")
    index = _sample(spec, times_T)
    real = np.ones(len(index), dtype=bool)
    if spec.count is None or len(index) >= spec.count:
        return index, real
    if spec.padding == "refuse":
        raise UsageError(
            f"The model needs {spec.count} frames of each clip, this one has {len(index)}.",
            hint="Sample more frames per second, or pass longer clips.",
        )
    if spec.padding == "loop":
        return np.resize(index, spec.count), np.ones(spec.count, dtype=bool)
    missing = spec.count - len(index)
    index = np.concatenate([index, np.repeat(index[-1], missing)])
    return index, np.concatenate([real, np.full(missing, spec.padding == "repeat-last")])


def _sample(spec: FrameSpec, times_T: np.ndarray) -> np.ndarray:
    given = len(times_T)
    if spec.sampler == "rate":
        if not spec.rate or spec.rate <= 0:
            raise UsageError(f"The sampler 'rate' needs a rate above zero, got {spec.rate}.")
        wanted = np.arange(times_T[0], times_T[-1] + 1e-9, 1 / spec.rate)
        index = np.unique(np.clip(np.searchsorted(times_T, wanted + 1e-6, side="right") - 1, 0, given - 1))
        return index if spec.count is None else index[: spec.count]
    if spec.sampler == "consecutive":
        index = np.arange(0, given, spec.stride)
        if spec.count is None or len(index) <= spec.count:
            return index
        span = (spec.count - 1) * spec.stride + 1
        return np.arange(spec.count) * spec.stride + (given - span) // 2
    if spec.count is None or given <= spec.count:
        return np.arange(given)
    if spec.sampler == "uniform":
        return np.round(np.linspace(0, given - 1, spec.count)).astype(int)
    return ((np.arange(spec.count) + 0.5) * given / spec.count).astype(int)
