"""Batches ahead of the step that needs them: made by spawned processes, handed out in order.

With no workers the batches are made in this process when they are asked for, on this thread: the two ways
give the same batches. (torch's DataLoader would serve, but tells of a worker's death by raising from a signal
handler wherever the main process happens to be, and makes errors anew from their text.)
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch
import torch.multiprocessing as mp

from moviola.types import Batch, MoviolaError, UsageError

Step = tuple[int, int, np.ndarray]
_PATIENCE = 5.0  # seconds that a process has to end before it is killed


class Readable(Protocol):
    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> Batch: ...


def feed(
    data: Readable, steps: Sequence[Step], *, seed: int, workers: int, ahead: int = 2
) -> Iterator[Batch]:
    """The batches of (step, epoch, rows), in order.

    workers  0: made here, one at a time. From 1 on: processes that are started anew (spawn) and each
             work `ahead` batches in advance; `data` is sent to them once.

    An error in a worker is raised here as the same error, when its batch is due. The processes end with
    the iterator: when it is exhausted, closed, dropped, or an error or Ctrl-C goes through it.
    """
    if workers < 0 or ahead < 1:
        raise UsageError(f"Expected workers >= 0 and ahead >= 1, got {workers} and {ahead}.")
    return _here(data, steps, seed) if workers == 0 else _spawned(data, steps, seed, workers, ahead)


def _here(data: Readable, steps: Sequence[Step], seed: int) -> Iterator[Batch]:
    for step, epoch, rows in steps:
        yield data.batch(rows, seed=seed, epoch=epoch, step=step)


def _spawned(data: Readable, steps: Sequence[Step], seed: int, workers: int, ahead: int) -> Iterator[Batch]:
    """Batch k is worker k % workers' business, so each reads on through the epoch in order."""
    count = len(steps)
    workers = min(workers, count)
    team: list[_Worker] = []
    try:
        with _deaf_to_interrupts():
            for _ in range(workers):
                team.append(_Worker(data, seed))
        for turn in range(min(count, workers * ahead)):
            team[turn % workers].ask(steps[turn])
        for turn in range(count):
            made = team[turn % workers].answer()
            if turn + workers * ahead < count:
                team[turn % workers].ask(steps[turn + workers * ahead])
            yield made
    finally:
        for one in team:
            one.end()
        for one in team:
            one.join()


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, data: Readable, seed: int) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, data, seed), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, step: Step) -> None:
        try:
            self._pipe.send(step)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def answer(self) -> Batch:
        if self._pipe not in wait([self._pipe, self._process.sentinel]):
            raise self._died()
        try:
            made, error = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._died() from None
        if error is not None:
            raise error.error()
        return made

    def _died(self) -> MoviolaError:
        self._process.join(_PATIENCE)
        return MoviolaError(
            f"A process that reads data ended without a word (exit code {self._process.exitcode}).",
            hint="Memory may have run out: lower the workers or the batch size. In a script of your own, put "
            "the call under: if __name__ == '__main__':",
        )

    def end(self) -> None:
        self._pipe.close()
        if self._process.is_alive():
            self._process.terminate()

    def join(self) -> None:
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


class _Failed:
    """An error on its way to the main process: kind, arguments and fields, whatever its `__init__` takes."""

    def __init__(self, error: Exception) -> None:
        self._kind, self._args, self._more = type(error), error.args, dict(error.__dict__)

    def error(self) -> Exception:
        made = self._kind.__new__(self._kind)
        made.args = self._args
        made.__dict__.update(self._more)
        return made


def _work(pipe: Connection, data: Readable, seed: int) -> None:
    """Answer each step with (batch, None) or (None, error) until the other end is closed."""
    import pyarrow as pa

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    while True:
        try:
            step, epoch, rows = pipe.recv()
        except (EOFError, ConnectionError):
            return
        answer: tuple[Any, _Failed | None]
        try:
            answer = data.batch(rows, seed=seed, epoch=epoch, step=step), None
        except MoviolaError as error:
            answer = None, _Failed(error)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionError):
            return


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started here never hear of Ctrl-C, which is the main process's business: it ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's alone
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
