"""The index folder: commits are whole or nothing, readers are never disturbed, rows are never doubled."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moviola.store import writer as writer_module
from moviola.store.format import FORMAT, MANIFEST, ModelCard, Sampling, open_segment, read_manifest
from moviola.store.index import Index
from moviola.store.writer import Writer
from moviola.types import StoreError

DIM = 16
CARD = ModelCard("toy", "a" * 16, "clip", "toy", DIM, "r" * 16, {"size": [8, 8]})
SAMPLING = Sampling()


def add(writer: Writer, path: bytes, count: int, *, seed: int = 0, texts: int = 0) -> np.ndarray:
    """One whole file with `count` units; its vectors."""
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    writer.begin(path, size=1, mtime_ns=2, kind="video", duration=float(count))
    time_N = np.arange(count, dtype=float)
    writer.add_units(
        path, time_N, time_N, vectors, [b"jpg%d" % i for i in range(count)], np.arange(count) // 5
    )
    writer.add_texts(path, [(i, i + 1, f"line {i}") for i in range(texts)], "subtitle")
    writer.finish(path)
    return vectors


def rows(index: Index) -> list[tuple[str, float]]:
    units = index.units
    return [(index.files[f].file, float(t)) for f, t in zip(units.file_N, units.start_N, strict=True)]


def test_what_was_committed_is_read_back(tmp_path: Path) -> None:
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        b = add(writer, b"/v/b.mp4", 7, seed=1, texts=2)
        a = add(writer, b"/v/a.mp4", 3, seed=2)
        writer.commit()
    index = Index(tmp_path / "i")
    assert rows(index) == [("/v/a.mp4", i) for i in range(3)] + [("/v/b.mp4", i) for i in range(7)]
    np.testing.assert_allclose(
        index.vectors(np.arange(10), unit_length=False), np.concatenate([a, b]), atol=5e-3
    )
    query = b[4] / np.linalg.norm(b[4])
    scores = index.scores(query[None])[:, 0]
    assert scores.argmax() == 7
    assert scores[7] == pytest.approx(1, abs=1e-3)
    assert [index.thumbnail(i) for i in (0, 9)] == [b"jpg0", b"jpg6"]
    assert [(t.file, t.start, t.text) for t in index.texts] == [(1, 0, "line 0"), (1, 1, "line 1")]
    assert index.units.shot_N.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_nothing_counts_before_the_commit_and_an_open_reader_keeps_its_state(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/a", 4)
        writer.commit()
        before = Index(folder)
        add(writer, b"/b", 4)
        assert len(Index(folder).units) == 4
        writer.commit()
        assert len(Index(folder).units) == 8
        assert len(before.units) == 4
        before.scores(np.ones((1, DIM), np.float32))
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/c", 4)
    assert len(Index(folder).units) == 8
    assert len(list(folder.glob("*.arrow"))) == len(read_manifest(folder).names)


def test_a_changed_file_replaces_its_rows_in_one_step(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/a", 40, texts=40)
        add(writer, b"/b", 3)
        writer.commit()
        writer.begin(b"/a", size=9, mtime_ns=9, kind="video", duration=2.0)
        vectors = np.ones((2, DIM), np.float32)
        writer.add_units(b"/a", np.arange(2.0), np.arange(2.0), vectors, [None, None], np.zeros(2))
        assert len(Index(folder).units) == 43
        writer.commit()
        assert rows(Index(folder)) == [("/a", 0), ("/a", 1), ("/b", 0), ("/b", 1), ("/b", 2)]
        assert Index(folder).texts == []
        assert Index(folder).files[0].status == "partial"
        writer.finish(b"/a")
        writer.tidy()
        assert sum(one.rows for one in writer.manifest.units) == 5
    index = Index(folder)
    assert (index.files[0].status, index.files[0].units, index.files[0].done_until) == ("done", 2, 1.0)
    assert len(index.units) == 5


def test_texts_are_replaced_in_one_step_and_units_stay(tmp_path: Path) -> None:
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        add(writer, b"/a", 4, texts=3)
        add(writer, b"/b", 4, texts=2)
        writer.commit()
        reader = Index(tmp_path / "i")
        writer.begin_texts(b"/a", sidecars="m")
        writer.add_texts(b"/a", [(0.0, 1.0, "anew")], "subtitle")
        before = Index(tmp_path / "i")
        assert [t.text for t in before.texts if t.file == 0] == ["line 0", "line 1", "line 2"]
        writer.commit()
    after = Index(tmp_path / "i")
    texts = [(t.file, t.text) for t in after.texts]
    assert texts == [(0, "anew"), (1, "line 0"), (1, "line 1")]
    assert rows(after) == rows(reader)
    assert len(rows(after)) == 8
    assert (after.files[0].sidecars, after.files[1].sidecars) == ("m", None)
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        writer.tidy()
        assert sum(segment.rows for segment in writer.manifest.texts) == 3  # the old ones are dropped
        assert sum(segment.rows for segment in writer.manifest.units) == 8
        # a new pass over the file takes its texts along
        add(writer, b"/a", 2, texts=1)
        writer.commit()
    last = Index(tmp_path / "i")
    assert [(t.file, t.text) for t in last.texts] == [(0, "line 0"), (1, "line 0"), (1, "line 1")]


def test_an_index_of_format_1_is_read_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/a", 4, texts=3)
        writer.commit()
    data = json.loads((folder / MANIFEST).read_text())
    del data["model"]["tokenizer"]
    (folder / MANIFEST).write_text(json.dumps({**data, "format": 1}))
    old = open_segment(folder, data["files"]).drop_columns(["text_take", "sidecars"])
    with pa.OSFile(str(folder / data["files"]), "wb") as file, pa.ipc.new_file(file, old.schema) as out:
        out.write_table(old)
    index = Index(folder)
    assert (index.files[0].text_take, index.files[0].sidecars) == (None, None)
    assert index.manifest.model == CARD
    assert len(index.texts) == 3
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/b", 2, texts=1)
        writer.commit()
    assert json.loads((folder / MANIFEST).read_text())["format"] == FORMAT
    assert [len(Index(folder).texts), len(Index(folder).units)] == [4, 6]


def test_failed_files_have_no_rows_and_keep_their_reason(tmp_path: Path) -> None:
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        add(writer, b"/a", 3)
        writer.begin(b"/bad", size=1, mtime_ns=1, kind="video")
        writer.add_texts(b"/bad", [(0, 0, "bad.mp4")], "name")
        writer.add_units(b"/bad", np.zeros(1), np.zeros(1), np.ones((1, DIM)), [None], np.zeros(1))
        writer.finish(b"/bad", status="failed", reason="broken")
        writer.commit()
    index = Index(tmp_path / "i")
    assert [(f.file, f.status, f.reason) for f in index.files] == [
        ("/a", "done", ""),
        ("/bad", "failed", "broken"),
    ]
    assert len(index.units) == 3
    assert index.texts == []


def test_many_commits_stay_few_segments_without_loss(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with Writer(folder, CARD, SAMPLING) as writer:
        for n in range(80):
            add(writer, b"/%03d" % n, 3, seed=n, texts=1)
            writer.commit()
        writer.remove([b"/%03d" % n for n in range(0, 80, 2)])
        writer.tidy()
        assert len(writer.manifest.units) <= 24
    index = Index(folder)
    assert rows(index) == [(f"/{n:03d}", i) for n in range(1, 80, 2) for i in range(3)]
    expect = np.random.default_rng(77).normal(size=(3, DIM)).astype(np.float32)
    at = rows(index).index(("/077", 0))
    np.testing.assert_allclose(index.vectors(np.arange(at, at + 3), unit_length=False), expect, atol=5e-3)
    assert len(index.texts) == 40
    assert len(list(folder.glob("*.arrow"))) == len(read_manifest(folder).names)


def test_segments_merge_by_bounded_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_COPY_ROWS", 5)
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        for n in range(20):
            add(writer, b"/%02d" % n, 13, seed=n)
            writer.commit()
    assert rows(Index(tmp_path / "i")) == [(f"/{n:02d}", i) for n in range(20) for i in range(13)]


def test_second_writer_is_refused_at_once_and_readers_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    code = (
        "import sys; from moviola.store.writer import Writer; from moviola.store.format import *\n"
        f"w = Writer({str(folder)!r}, ModelCard('toy','a'*16,'clip','toy',{DIM},'r'*16,{{}}), Sampling())\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/a", 2)
        writer.commit()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match=r"Another process is writing.*writer\.lock"):
            Writer(folder, CARD, SAMPLING)
        assert len(Index(folder).units) == 2
        other.kill()
    # A killed writer's lock is no lock.
    with Writer(folder, CARD, SAMPLING) as writer:
        assert set(writer.files) == {b"/a"}


def test_other_model_recipe_or_sampling_is_refused_with_both_names(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/a", 2)
        writer.commit()
    for values in ({"hash": "b" * 16, "name": "other"}, {"recipe_hash": "s" * 16}, {"dim": 8}):
        other = ModelCard(**{**{f: getattr(CARD, f) for f in CARD.__slots__}, **values})  # type: ignore[arg-type]
        with pytest.raises(
            StoreError, match=rf"made with the model 'toy'.*vectors of '{other.name}'.*--model toy"
        ):
            Writer(folder, other, SAMPLING)
    with pytest.raises(StoreError, match=r"a frame every 1 s; this run asks for a frame every 2 s"):
        Writer(folder, CARD, Sampling(every=2.0))
    with pytest.raises(StoreError, match="key frames only"):
        Writer(folder, CARD, Sampling(every=0.0, keyframes=True))
    with Writer(folder, CARD, SAMPLING):
        pass


def test_folders_that_are_no_index_are_refused_and_left_alone(tmp_path: Path) -> None:
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "beach.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"not a Moviola index and not empty \(it holds beach\.jpg\)"):
        Writer(holiday, CARD, SAMPLING)
    with pytest.raises(StoreError, match="is not a Moviola index"):
        Index(holiday)
    assert [p.name for p in holiday.iterdir()] == ["beach.jpg"]
    with pytest.raises(StoreError, match="There is no index at"):
        Index(tmp_path / "missing")
    plain = tmp_path / "plain"
    plain.write_text("x")
    with pytest.raises(StoreError, match="is a file; an index is a folder"):
        Writer(plain, CARD, SAMPLING)
    with pytest.raises(StoreError, match="not a Moviola index"):
        Index(plain)


def test_a_run_without_commit_leaves_no_folder(tmp_path: Path) -> None:
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        add(writer, b"/a", 2)
    assert not (tmp_path / "i").exists()


def test_newer_format_and_damaged_manifests_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/a", 2)
        writer.commit()
    good = (folder / MANIFEST).read_text()
    data = json.loads(good)
    (folder / MANIFEST).write_text(json.dumps({**data, "format": FORMAT + 1, "made_by": "moviola 9"}))
    for opener in (Index, lambda f: Writer(f, CARD, SAMPLING)):
        says = rf"format {FORMAT + 1}.*up to {FORMAT}.*moviola 9.*pip install -U moviola"
        with pytest.raises(StoreError, match=says):
            opener(folder)
    for text in ("", "[]", "{}", '{"format": 1}', good[:100]):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(StoreError, match="damaged"):
            Index(folder)
    (folder / MANIFEST).write_text(good)
    name = data["units"][0]["name"]
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:50])
    with pytest.raises(StoreError, match=rf"damaged: {name}"):
        Index(folder)
    (folder / name).unlink()
    with pytest.raises(StoreError, match=f"missing.*{name}"):
        Index(folder)


def test_paths_survive_byte_for_byte(tmp_path: Path) -> None:
    names = [b"/v/caf\xe9.mp4", b"/v/a b\nc.mp4", "/v/\u00e9\U0001f3ac.mp4".encode(), b"/v/\xff\xfe"]
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        for name in names:
            add(writer, name, 1)
        writer.commit()
    index = Index(tmp_path / "i")
    assert [row.path for row in index.files] == sorted(names)
    assert [os.fsencode(row.file) for row in index.files] == sorted(names)


class Full:
    """A disk that is full after so many bytes of the next commit."""

    def __init__(self, file: object, left: list[int]) -> None:
        self.file, self.left = file, left

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # type: ignore[attr-defined]

    def write(self, data: bytes) -> int:
        self.left[0] -= len(data)
        if self.left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.7, 0.85, 0.95, 0.99])
def test_full_disk_is_said_and_the_index_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: float
) -> None:
    folder = tmp_path / "i"
    real = Path.open
    left = [1 << 30]

    def open_(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        file = real(self, mode, *args, **kwargs)  # type: ignore[arg-type]
        return Full(file, left) if "w" in mode else file

    with Writer(tmp_path / "whole", CARD, SAMPLING) as writer:
        add(writer, b"/a", 5)
        writer.commit()
        add(writer, b"/b", 60)
        monkeypatch.setattr(Path, "open", open_)
        writer.commit()
        needs = (1 << 30) - left[0]
        monkeypatch.undo()
    with Writer(folder, CARD, SAMPLING) as writer:
        add(writer, b"/a", 5)
        writer.commit()
        add(writer, b"/b", 60)
        left[0] = int(part * needs)
        monkeypatch.setattr(Path, "open", open_)
        with pytest.raises(StoreError, match=r"disk is full.*run the same command again"):
            writer.commit()
        monkeypatch.undo()
        assert len(Index(folder).units) == 5
        assert len(list(folder.glob("*.arrow"))) == len(read_manifest(folder).names)
        writer.commit()  # space was freed: nothing staged was lost
        assert len(Index(folder).units) == 65


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        with Writer(disk / "i", CARD, SAMPLING) as writer:
            add(writer, b"/a", 5)
            writer.commit()
            add(writer, b"/b", 6000)
            with pytest.raises(StoreError, match="disk is full"):
                writer.commit()
            index = Index(disk / "i")
            assert len(index.units) == 5
            assert index.scores(np.ones((1, DIM), np.float32)).shape == (5, 1)
            del index
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with Writer(tmp_path / "i", CARD, SAMPLING) as writer:
        writer.begin(b"/a", size=1, mtime_ns=1, kind="picture")
        with pytest.raises(ValueError, match="not finite"):
            writer.add_units(b"/a", np.zeros(1), np.zeros(1), np.full((1, DIM), np.inf), [None], np.zeros(1))
        with pytest.raises(StoreError, match="Expected 1 vectors of 16"):
            writer.add_units(b"/a", np.zeros(1), np.zeros(1), np.ones((1, 3)), [None], np.zeros(1))


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="could not be written"):
        Writer(tmp_path / "file" / "index", CARD, SAMPLING)
