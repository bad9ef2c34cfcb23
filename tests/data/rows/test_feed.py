"""Batches from spawned processes: the same ones, in order; errors and ends."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moviola.data.rows import PairData, Window, feed, open_rows
from moviola.types import MediaError, MoviolaError, Needs, Recipe, UsageError
from tests.data.rows import made

STEPS = [(step, step // 3, np.arange(4) + step) for step in range(6)]


class Failing:
    """Data whose third batch goes wrong."""

    def __init__(self, how: str) -> None:
        self.how = how

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, Any]:
        if step == 2 and self.how == "media":
            raise MediaError("a.png", "it is broken.", hint="Mend it.")
        if step == 2 and self.how == "exit":
            os._exit(3)
        return {"row": torch.from_numpy(rows), "process": os.getpid()}


def data(path: Path) -> PairData:
    made.parquet(path / "a.parquet", 12, row_group=3)
    source = open_rows([path], window=Window(bytes=9000))
    return PairData(source, Needs(), recipe=Recipe(size=(32, 32)), tokenizer=made.tokenizer(), flip=0.5)


def test_workers_give_the_batches_of_this_process(tmp_path: Path) -> None:
    pairs = data(tmp_path)
    here = list(feed(pairs, STEPS, seed=4, workers=0))
    there = list(feed(pairs, STEPS, seed=4, workers=2))
    assert len(here) == len(there) == 6
    for a, b in zip(here, there):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], torch.Tensor):
                assert torch.equal(a[name], b[name])
            else:
                assert a[name] == b[name]
    assert not multiprocessing.active_children()


def test_errors_come_as_they_are_and_the_processes_end() -> None:
    for workers in (0, 1):
        batches = feed(Failing("media"), STEPS, seed=0, workers=workers)
        next(batches), next(batches)
        with pytest.raises(MediaError, match=r"a\.png: it is broken\. Mend it\.") as caught:
            next(batches)
        assert caught.value.path == "a.png"
        assert caught.value.hint == "Mend it."
        assert not multiprocessing.active_children()


def test_a_process_that_dies_is_an_error() -> None:
    batches = feed(Failing("exit"), STEPS, seed=0, workers=1)
    with pytest.raises(MoviolaError, match=r"ended without a word.*__main__"):
        list(batches)
    assert not multiprocessing.active_children()


def test_closing_early_ends_the_processes() -> None:
    batches = feed(Failing(""), STEPS, seed=0, workers=1)
    first = next(batches)
    assert first["process"] != os.getpid()
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_numbers_out_of_range() -> None:
    with pytest.raises(UsageError, match="workers"):
        feed(Failing(""), STEPS, seed=0, workers=-1)
    with pytest.raises(UsageError, match="ahead"):
        feed(Failing(""), STEPS, seed=0, workers=1, ahead=0)


_INTERRUPTED = """
import os, signal, sys, time
from tests.data.rows.test_feed import Failing, STEPS
from moviola.data.rows import feed
if __name__ == "__main__":
    batches = feed(Failing(""), STEPS, seed=0, workers=2)
    print(next(batches)["process"], flush=True)
    try:
        for batch in batches:
            time.sleep(60)
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_quietly(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_INTERRUPTED)
    root = Path(__file__).resolve().parents[3]
    run = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    )
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    time.sleep(0.5)
    os.killpg(run.pid, 2)
    out, err = run.communicate(timeout=30)
    assert out == "stopped\n"
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


_MEMORY = """
import resource, sys
import numpy as np
from moviola.data.rows import Window, open_rows
source = open_rows([sys.argv[1]], window=Window(bytes=8 << 20))
order = source.order(0, 0)
source.read(order[:8], ["image"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, len(order), 64):
    source.read(order[start : start + 64], ["image"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("row_group", [200, 1 << 20])
def test_memory_depends_on_the_window_not_on_the_file(tmp_path: Path, row_group: int) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(40_000) for _ in range(2000)]  # 80 MB
    made.parquet(tmp_path / "a.parquet", 2000, row_group=row_group, image=images)
    run = [sys.executable, "-c", _MEMORY, str(tmp_path / "a.parquet")]
    grown = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert grown < 45, f"{grown:.0f} MB more for a window of 8 MB"
