"""`embed`: right vectors for pictures, videos, frames and texts, in memory and in both file formats."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moviola.types import FrameSpec, Refusal, UsageError
from moviola.verbs.embed import NothingEmbedded, embed
from moviola.verbs.vectors import read_vectors
from tests.verbs.colour_clip import COLOURS, colour_model, picture, video

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    picture(folder / "blue.png", "blue", size=(20, 30))
    picture(folder / "two.png", "red", "green")
    video(folder / "clip.mp4", ("red", 2), ("cyan", 2))
    return folder


def unit(**shares: float) -> np.ndarray:
    made = np.zeros(len(NAMES))
    for name, share in shares.items():
        made[NAMES.index(name)] = share
    return made / np.linalg.norm(made)


def test_pictures_and_a_video_in_memory(media: Path) -> None:
    got = embed(media, model=colour_model())
    by_name = {Path(row.file or "").name: (row, v) for row, v in zip(got.rows, got.vectors_ND, strict=True)}
    assert set(by_name) == {"blue.png", "two.png", "clip.mp4"}
    np.testing.assert_allclose(by_name["blue.png"][1], unit(blue=1), atol=1e-6)
    np.testing.assert_allclose(by_name["two.png"][1], unit(red=1, green=1), atol=1e-6)
    np.testing.assert_allclose(by_name["clip.mp4"][1], unit(red=1, cyan=1), atol=1e-6)
    row = by_name["clip.mp4"][0]
    assert (row.kind, row.start) == ("video", 0.0)
    assert row.end == pytest.approx(4.0, abs=0.01)
    assert got.ok
    assert got.vectors_ND.dtype == np.float32
    assert len(got) == 3


def test_not_normalised_vectors_keep_their_length(media: Path) -> None:
    got = embed(media / "blue.png", model=colour_model(), normalize=False)
    assert np.linalg.norm(got.vectors_ND[0]) == pytest.approx(3.0, abs=1e-5)
    assert got.about["normalized"] is False


def test_a_row_per_frame(media: Path) -> None:
    got = embed(media / "clip.mp4", model=colour_model(), every=0.5, batch_size=3)
    assert [row.start for row in got.rows] == pytest.approx([i / 2 for i in range(8)])
    assert {row.kind for row in got.rows} == {"frame"}
    wanted = [unit(red=1)] * 4 + [unit(cyan=1)] * 4
    np.testing.assert_allclose(got.vectors_ND, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "seen"),
    [
        (FrameSpec(count=4, sampler="middle"), 4),
        (FrameSpec(count=3, sampler="uniform"), 3),
        (FrameSpec(count=5, sampler="consecutive", stride=2), 5),
        (FrameSpec(count=6, sampler="rate", rate=2.0), 6),
        (FrameSpec(count=None, sampler="middle"), 12),
    ],
)
def test_a_video_gets_the_frames_the_model_asks_for(media: Path, spec: FrameSpec, seen: int) -> None:
    model = colour_model(spec=spec)
    embed(media / "clip.mp4", model=model)
    assert model.module.seen == seen


def test_consecutive_frames_lie_around_the_middle(media: Path) -> None:
    spec = FrameSpec(count=8, sampler="consecutive")
    got = embed(media / "clip.mp4", model=colour_model(spec=spec))
    np.testing.assert_allclose(got.vectors_ND[0], unit(red=1, cyan=1), atol=0.35)
    assert min(got.vectors_ND[0][[NAMES.index("red"), NAMES.index("cyan")]]) > 0.3


def test_texts_come_first_and_blank_lines_are_left_out(media: Path, tmp_path: Path) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_text("\ufeffred thing\n\n  cyan thing  \n", encoding="utf-8")
    got = embed(media / "blue.png", texts="green thing", text_file=lines, model=colour_model())
    assert [row.text for row in got.rows] == ["green thing", "red thing", "cyan thing", None]
    best = [NAMES[i] for i in got.vectors_ND.argmax(1)]
    assert best == ["green", "red", "cyan", "blue"]


@pytest.mark.parametrize("name", ["vectors.parquet", "vectors.npy"])
def test_files_read_back_as_in_memory(media: Path, tmp_path: Path, name: str) -> None:
    memory = embed(media, texts=["red", "blue"], model=colour_model(), batch_size=1)
    model = colour_model()
    stored = embed(media, texts=["red", "blue"], model=model, to=tmp_path / "new" / name, batch_size=2)
    assert stored.vectors_ND.shape == (0, 8)
    assert stored.count == 5
    rows, vectors_ND, about = read_vectors(tmp_path / "new" / name)
    assert tuple(rows) == memory.rows == stored.read().rows
    np.testing.assert_array_equal(vectors_ND, memory.vectors_ND)
    assert about["hash"] == model.hash
    assert about["recipe"] == json.loads(json.dumps(model.recipe.to_json()))
    assert about["recipe_hash"] == model.recipe.hash
    assert not [p for p in (tmp_path / "new").iterdir() if p.name.startswith(".")]


def test_parquet_has_plain_columns_and_npy_plain_numbers(media: Path, tmp_path: Path) -> None:
    embed(media, model=colour_model(), to=tmp_path / "v.parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["kind", "file", "text", "start", "end", "vector"]
    assert len(table.column("vector")[0].as_py()) == 8
    embed(media, model=colour_model(), to=tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (3, 8)
    assert len(json.loads((tmp_path / "v.npy.json").read_text())["rows"]) == 3


def test_many_rows_make_one_row_group(tmp_path: Path) -> None:
    texts = [f"thing {i}" for i in range(600)]
    got = embed(texts=texts, model=colour_model(), to=tmp_path / "v.parquet")
    assert pq.ParquetFile(tmp_path / "v.parquet").num_row_groups == 1
    assert [row.text for row in got.read().rows] == texts


def test_bad_files_are_skipped_and_reported(media: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is no video")
    broken = (media / "blue.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(broken[: len(broken) // 2])
    files = [media / "blue.png", tmp_path, tmp_path / "gone.png", tmp_path / "notes.txt"]
    (tmp_path / "notes.txt").write_text("x")
    calls: list[tuple[float, float | None]] = []
    got = embed(
        files, model=colour_model(), on_progress=lambda done, total, note="": calls.append((done, total))
    )
    assert [Path(row.file or "").name for row in got.rows] == ["blue.png"]
    assert {Path(one.path).name for one in got.failed} == {
        "empty.jpg",
        "text.mp4",
        "cut.png",
        "gone.png",
        "notes.txt",
    }
    assert all(one.reason for one in got.failed)
    assert not got.ok
    assert "5 could not be read" in str(got)
    assert calls[-1] == (4, 4)


def test_a_bad_video_among_frames_is_named(media: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    got = embed([tmp_path / "bad.mp4", media / "clip.mp4"], model=colour_model(), every=1.0)
    assert [Path(one.path).name for one in got.failed] == ["bad.mp4"]
    assert got.count == 4


def test_a_video_that_breaks_in_the_middle_keeps_its_frames(tmp_path: Path) -> None:
    import av

    whole = tmp_path / "whole.mp4"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 5
        for number in range(60):
            pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    data = whole.read_bytes()
    whole.unlink()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    got = embed(tmp_path / "cut.mp4", model=colour_model(), every=0.5)
    assert 3 <= got.count <= 8
    assert not got.failed
    assert [Path(one.path).name for one in got.damaged] == ["cut.mp4"]
    assert not got.ok
    assert "1 are damaged" in str(got)


def test_nothing_readable_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    to = tmp_path / "v.parquet"
    with pytest.raises(NothingEmbedded, match=r"none of the 1 files.*a\.jpg") as caught:
        embed(tmp_path / "a.jpg", model=colour_model(), to=to)
    assert [Path(one.path).name for one in caught.value.failed] == ["a.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingEmbedded, match="no pictures or videos"):
        embed(tmp_path / "empty", model=colour_model())


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    to = tmp_path / "v.npy"
    embed(texts="red", model=colour_model(), to=to)
    before = to.read_bytes()
    with pytest.raises(UsageError, match="context holds 32"):
        embed(texts=["blue", "red " * 40], model=colour_model(), to=to)
    assert to.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.npy", "v.npy.json"]


def test_long_texts_are_cut_only_when_asked() -> None:
    with pytest.warns(UserWarning, match="cut"):
        got = embed(texts="red " * 40, model=colour_model(), truncate=True)
    assert NAMES[got.vectors_ND[0].argmax()] == "red"


def test_vectors_that_are_not_finite_are_reported(media: Path) -> None:
    got = embed(media, model=colour_model(broken="blue"))
    assert [Path(one.path).name for one in got.failed] == ["blue.png"]
    assert "finite" in got.failed[0].reason
    assert got.count == 2


def test_names_that_are_no_utf8(media: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes((media / "blue.png").read_bytes())
    for ending in ("parquet", "npy"):
        got = embed(tmp_path / name, model=colour_model(), to=tmp_path / f"v.{ending}").read()
        assert (got.rows[0].file or "").endswith("caf\\udce9.png")


def test_short_clips_and_a_model_that_refuses_them(tmp_path: Path) -> None:
    video(tmp_path / "short.mp4", ("red", 0.3))
    picture(tmp_path / "blue.png", "blue")
    model = colour_model(spec=FrameSpec(count=8, padding="refuse"))
    got = embed(tmp_path, model=model)
    assert "needs 8 frames" in got.failed[0].reason
    got = embed(tmp_path, model=colour_model(spec=FrameSpec(count=8, padding="repeat-last")))
    assert got.count == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to embed"),
        ({"texts": ["red", " "]}, "empty"),
        ({"texts": "red", "every": 0.0}, "between"),
        ({"texts": "red", "batch_size": 0}, "batch size"),
        ({"texts": "red", "frames": 0}, "at least one frame"),
        ({"texts": "red", "to": "v.csv"}, r"\.parquet or \.npy"),
        ({"text_file": "nowhere.txt"}, "does not exist"),
    ],
)
def test_arguments_that_cannot_be_meant(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        embed(model=colour_model(), **options)


def test_models_without_words_or_with_only_a_classifier(media: Path) -> None:
    assert embed(media / "blue.png", model=colour_model(has_text=False)).count == 1
    with pytest.raises(Refusal, match="no text tower"):
        embed(texts="red", model=colour_model(has_text=False))
    with pytest.raises(Refusal, match="classifier"):
        embed(media, model=colour_model(adaptation="classifier"))
