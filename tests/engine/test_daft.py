"""Daft, native and on Ray: the same bytes as the local engine. One process takes one runner of Daft, so
the tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moviola.engine import LocalEngine, engine
from moviola.types import MissingExtra, MoviolaError
from tests.engine.helpers import DieOnce, make_rows, refuse_odd, square, write_parts

ROOT = Path(__file__).resolve().parents[2]


def everything(run: Any, folder: Path, to: Path, parts: int) -> None:
    """Each verb once or more, into `to`."""
    sources = write_parts(folder / f"in{parts}", make_rows(2000), parts)
    run.group_count(sources, "id", to / "twice", at_least=2, first=("piece", "row"))
    run.group_count(sources, "id", to / "all")
    run.group_count(sources, "language", to / "languages")
    run.group_count(sources, "entries", to / "entries")
    run.group_count(sources, "entries", to / "dense", size=50, at_least=0)
    for how in ("left", "distinct"):
        run.join(sources, to / "twice", "id", to / how, how=how)
    results = run.map(square, range(4), [to / f"map-{n}" for n in range(4)])
    assert [one["square"] for one in results] == [0, 1, 4, 9]


def files(folder: Path) -> dict[str, bytes]:
    """Receipts name paths and times: they are left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }


def main(name: str, address: str, folder: Path) -> None:
    """In the child process: the whole comparison, then failures."""
    if name == "ray":
        from ray.cluster_utils import Cluster

        # two workers on this machine, each a node of one core
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        address = cluster.address
    run = engine(name, address=address or None)
    everything(run, folder, folder / name, 3)
    everything(LocalEngine(1), folder, folder / "local", 3)
    mine, theirs = files(folder / name), files(folder / "local")
    assert list(mine) == list(theirs)
    assert [path for path in mine if mine[path] != theirs[path]] == []
    outputs = [folder / f"odd-{n}" for n in range(4)]
    got = run.map(refuse_odd, range(4), outputs, skip=(MoviolaError,))
    assert got[0] == 0
    assert str(got[3]) == "file-3: it is odd. Make it even."
    with pytest.raises(MoviolaError, match="it is odd"):
        run.map(refuse_odd, range(4), outputs)
    if name == "daft":
        die, outputs = DieOnce(folder / "died", fatal=2), [folder / f"die-{n}" for n in range(4)]
        with pytest.raises(MoviolaError, match="killed, or out of memory"):
            run.map(die, range(4), outputs)
        assert len(run.map(die, range(4), outputs)) == 4
    print("the same bytes")


def child(name: str, folder: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.test_daft", name, str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert "the same bytes" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_daft_writes_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("daft")
    child("daft", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ray_cluster_of_two_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("daft")
    pytest.importorskip("ray")
    child("ray", tmp_path)


@given(
    st.lists(
        st.tuples(
            st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1)
        ),
        min_size=1,
        max_size=20,
    )
)
def test_packed_tuples_order_like_tuples_and_come_back(rows: list[tuple[int, int, int]]) -> None:
    from moviola.engine.daft import pack, unpack

    kinds = [pa.int32(), pa.uint64(), pa.int64()]
    columns = [pa.array(one, kind) for one, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    packed = pack(columns)
    assert unpack(packed, kinds) == columns
    keys = packed.to_pylist()
    assert sorted(range(len(rows)), key=keys.__getitem__) == sorted(range(len(rows)), key=rows.__getitem__)


@pytest.mark.parametrize(("name", "missing"), [("daft", "daft"), ("ray", "daft")])
def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtra, match=rf"moviola\[{name}\]"):
        engine(name)


if __name__ == "__main__":
    main(sys.argv[1], "", Path(sys.argv[2]))
