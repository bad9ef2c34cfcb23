"""The engine of one machine: in this process, or over processes. No package beyond the base."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moviola.engine import counting as c
from moviola.engine import joining as j
from moviola.engine.requests import CountRequest, Joined, JoinRequest, steps, work_folder
from moviola.engine.tables import fingerprint
from moviola.engine.tasks import Function, Ledger, OnDone, Outcome, Progress, run_task
from moviola.types import MoviolaError, UsageError

MEMORY = 512 << 20


class LocalEngine:
    """Runs tasks in this process (`workers=1`) or in that many processes.

    `memory` is what a sort or a join may hold in bytes, all workers together, on top of the libraries.
    Processes are spawned: a script that uses them needs `if __name__ == "__main__":`.
    """

    name = "local"

    def __init__(self, workers: int | None = None, memory: int = MEMORY) -> None:
        if workers is not None and workers < 1:
            raise UsageError(f"There must be at least one worker, got {workers}.")
        if memory < 1 << 20:
            raise UsageError(f"The memory must be at least 1 MB, got {memory} bytes.")
        self.workers = workers or _cores()
        self.memory = memory

    def map(
        self,
        function: Function,
        tasks: Sequence[Any],
        outputs: Sequence[Path],
        *,
        key: str = "",
        skip: tuple[type[MoviolaError], ...] = (),
        on_done: OnDone | None = None,
    ) -> list[Any]:
        """`Engine.map`."""
        ledger = Ledger(tasks, outputs, key, on_done)
        workers = min(self.workers, len(ledger.left))
        if workers <= 1:
            for index in ledger.left:
                ledger.take(index, run_task(function, tasks[index], Path(outputs[index]), key, skip))
        else:
            self._over_processes(function, tasks, outputs, key, skip, ledger, workers)
        return ledger.results

    def _over_processes(
        self,
        function: Function,
        tasks: Sequence[Any],
        outputs: Sequence[Path],
        key: str,
        skip: tuple[type[MoviolaError], ...],
        ledger: Ledger,
        workers: int,
    ) -> None:
        # the function travels once per worker, not once per task: it may hold a large dictionary
        setup = pickle.dumps((function, key, skip))
        # spawn: a fork of a process with threads (torch, Arrow) may hang
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(setup,)
        )
        left = iter(ledger.left)
        running: dict[Future[Outcome], int] = {}
        try:
            while True:
                for index in itertools.islice(left, 2 * workers - len(running)):
                    running[pool.submit(_work, tasks[index], Path(outputs[index]))] = index
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    ledger.take(running.pop(future), future.result())
        except BrokenProcessPool as error:
            raise ledger.died() from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def group_count(
        self,
        parts: Sequence[Path],
        column: str,
        to: Path,
        *,
        at_least: int = 1,
        size: int | None = None,
        first: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> int:
        """`Engine.group_count`."""
        request = CountRequest.of(parts, column, to, at_least, size, first, self.memory)
        if request.done is not None:
            return request.done
        each = self.memory // self.workers
        with work_folder(request.to, request.key) as work:
            if size is None:
                groups = c.groups_of_parts(request.parts, request.what, each, self.workers)
                function: Function = c.SortTask(request.what, each)
            else:
                groups = c.groups_of_parts(request.parts, request.what, 1 << 50, 8 * self.workers)
                function = c.DenseTask(request.what, size, each)
            runs = [work / f"run-{number:05d}" for number in range(len(groups))]
            # another number of workers makes other groups: those receipts must not be taken for these
            key = fingerprint(request.parts, request.key, [len(group) for group in groups])
            step = steps(progress, len(groups) + 1)
            self.map(function, groups, runs, key=key, on_done=step)
            if size is None:
                rows = request.finish(c.merge_all(runs, self.memory, request.what, work))
            else:
                counts_S = np.zeros(size, np.int64)
                for run in runs:
                    counts_S += np.load(run)
                rows = request.finish_dense(counts_S)
            if step is not None:
                step(len(groups), None)
            return rows

    def join(
        self,
        parts: Sequence[Path],
        table: Path,
        column: str,
        to: Path,
        *,
        how: j.How = "inner",
        progress: Progress | None = None,
    ) -> list[Joined]:
        """`Engine.join`."""
        request = JoinRequest.of(parts, table, column, to, how)
        if request.done is not None:
            return request.done
        each = self.memory // self.workers
        with work_folder(request.to / "join", request.key) as work:
            rows = j.write_columns(request.table, request.what, work)
            task = j.ProbeTask(j.Probe(work, request.what, rows, each))
            found = self.map(
                task,
                request.parts,
                request.outputs,
                key=request.key,
                on_done=steps(progress, len(request.parts)),
            )
            return request.results(found)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------
# In a worker process
# --------------------------------------------------------------------------------------------------

_setup: tuple[Function, str, tuple[type[MoviolaError], ...]] | None = None


def _start_worker(setup: bytes) -> None:
    global _setup
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pa.set_cpu_count(1)  # the workers are the parallelism
    _setup = pickle.loads(setup)  # noqa: S301 - from our own parent process


def _end_with_parent() -> None:
    """End this process when its parent is gone: a killed run must not leave workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _work(task: Any, output: Path) -> Outcome:
    assert _setup is not None
    function, key, skip = _setup
    return run_task(function, task, output, key, skip)
