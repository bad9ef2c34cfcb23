"""Calls timed in turns, so that load on the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` times after one warm-up; who goes first changes every time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            calls[name]()
            if turn >= 0:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median over rounds of the seconds of `over` by those of `under`."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
