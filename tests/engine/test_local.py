"""The local engine's map: receipts, failures, killed workers and killed runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moviola.engine import Failed, LocalEngine, engine
from moviola.types import MediaError, MoviolaError, UsageError
from tests.engine.helpers import DieOnce, Slow, full_disk, refuse_odd, square, writes_nothing, wrong_usage

ROOT = Path(__file__).resolve().parents[2]


def places(folder: Path, count: int) -> list[Path]:
    return [folder / f"out-{n}" for n in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_in_order_and_every_output(tmp_path: Path, workers: int) -> None:
    seen = []
    got = LocalEngine(workers).map(
        square, range(5), places(tmp_path, 5), on_done=lambda i, r: seen.append((i, r["square"]))
    )
    assert got == [{"task": n, "square": n * n} for n in range(5)]
    assert sorted(seen) == [(n, n * n) for n in range(5)]
    assert [p.read_text() for p in places(tmp_path, 5)] == ["0", "1", "4", "9", "16"]


def test_a_task_is_done_only_with_output_receipt_and_key(tmp_path: Path) -> None:
    run = Slow(tmp_path / "log", 0)
    outputs = places(tmp_path, 3)
    local = LocalEngine(1)
    local.map(run, range(3), outputs, key="a")
    outputs[1].unlink()
    outputs[2].with_name("out-2.json").write_text("{torn")
    assert local.map(run, range(3), outputs, key="a") == [0, 1, 2]
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "1", "2"]
    local.map(run, range(3), outputs, key="b")
    assert (tmp_path / "log").read_text().split()[5:] == ["0", "1", "2"]


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_to_skip_come_back_and_run_again(tmp_path: Path, workers: int) -> None:
    seen: dict[int, object] = {}
    got = LocalEngine(workers).map(
        refuse_odd, range(4), places(tmp_path, 4), skip=(MediaError,), on_done=seen.__setitem__
    )
    assert got == [
        0,
        Failed(1, "file-1: it is odd.", "Make it even."),
        2,
        Failed(3, "file-3: it is odd.", "Make it even."),
    ]
    assert seen == dict(enumerate(got))
    assert [p.exists() for p in places(tmp_path, 4)] == [True, False, True, False]
    assert LocalEngine(1).map(square, range(4), places(tmp_path, 4))[3] == {"task": 3, "square": 9}


@pytest.mark.parametrize("workers", [1, 2])
def test_other_errors_end_the_run_with_their_words(tmp_path: Path, workers: int) -> None:
    with pytest.raises(MoviolaError, match=r"Three is not allowed\. Leave it out\."):
        LocalEngine(workers).map(wrong_usage, range(5), places(tmp_path, 5), skip=(MediaError,))
    assert not (tmp_path / "out-3").exists()
    with pytest.raises(MoviolaError, match=r"No space left on device.*run the same command again"):
        LocalEngine(workers).map(full_disk, range(2), places(tmp_path / "full", 2))


def test_a_function_that_writes_nothing_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not"):
        LocalEngine(1).map(writes_nothing, [1], places(tmp_path, 1))


def test_a_killed_worker_is_an_error_and_the_rerun_goes_on(tmp_path: Path) -> None:
    die = DieOnce(tmp_path / "died", fatal=4)
    outputs = places(tmp_path, 6)
    with pytest.raises(MoviolaError, match=r"killed, or out of memory.*of 6 parts are kept"):
        LocalEngine(2).map(die, range(6), outputs)
    assert not outputs[4].exists()
    done = [n for n in range(6) if outputs[n].with_name(f"out-{n}.json").exists()]
    assert done
    before = {n: outputs[n].stat().st_mtime_ns for n in done}
    got = LocalEngine(2).map(die, range(6), outputs)
    assert len(got) == 6
    assert [p.read_text() for p in outputs] == ["0", "1", "4", "9", "16", "25"]
    assert {n: outputs[n].stat().st_mtime_ns for n in done} == before


def test_a_killed_run_leaves_no_workers_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from moviola.engine import LocalEngine\nfrom tests.engine.helpers import Slow\n"
        "if __name__ == '__main__':\n"
        "    to = Path(sys.argv[1])\n"
        "    LocalEngine(2).map(Slow(to / 'log', 0.3), range(8), [to / f'out-{n}' for n in range(8)])\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    run = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out-?.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = {p.name[4] for p in tmp_path.glob("out-?.json")}
    assert 2 <= len(done) < 8
    time.sleep(1.5)  # a worker left behind would go on with the next task
    started = (tmp_path / "log").read_text()
    time.sleep(0.7)
    assert (tmp_path / "log").read_text() == started
    LocalEngine(1).map(Slow(tmp_path / "log", 0), range(8), places(tmp_path, 8))
    again = (tmp_path / "log").read_text()[len(started) :].split()
    assert not set(again) & done
    assert [p.read_text() for p in places(tmp_path, 8)] == [str(n * n) for n in range(8)]
    assert json.loads((tmp_path / "out-7.json").read_text())["summary"] == 7


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 tasks and 2 outputs"):
        LocalEngine(1).map(square, range(3), places(tmp_path, 2))
    with pytest.raises(UsageError, match="same file"):
        LocalEngine(1).map(square, range(2), [tmp_path / "a", tmp_path / "a"])
    with pytest.raises(UsageError, match="one worker"):
        LocalEngine(0)
    with pytest.raises(UsageError, match="local, daft, ray"):
        engine("spark")
    with pytest.raises(UsageError, match="only for the engine 'ray'"):
        engine("local", address="here")
