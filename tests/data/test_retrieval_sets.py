"""Benchmark layouts made on the spot: COCO, Flickr30k, MSR-VTT and tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moviola.data.readers import read_retrieval
from moviola.types import Clip, TimeSpan, UsageError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def table(path: Path, header: list[str], *rows: list) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    images = []
    for number, split in enumerate(["train", "restval", "val", "test", "test"]):
        name = f"COCO_val2014_{number:012d}.jpg"
        touch(tmp_path / "val2014" / name)
        sentences = [{"raw": f"caption {number} {i}", "tokens": []} for i in range(5 + (number == 4))]
        images.append(
            {
                "filename": name,
                "filepath": "val2014",
                "cocoid": 100 + number,
                "split": split,
                "sentences": sentences,
            }
        )
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_karpathy_coco(coco: Path) -> None:
    found = read_retrieval(coco)
    assert (found.layout, found.split, found.kind) == ("karpathy", "test", "picture")
    assert found.ids == ("103", "104")
    assert found.owner_N.tolist() == [0] * 5 + [1] * 6
    assert found.texts[5] == "caption 4 0"
    assert [m for _, _, m in found.stream()] == [
        Clip(coco.parent / "val2014" / f"COCO_val2014_{i:012d}.jpg") for i in (3, 4)
    ]
    assert read_retrieval(coco, captions_per_item=5).owner_N.tolist() == [0] * 5 + [1] * 5
    assert read_retrieval(coco, split="train+restval").ids == ("100", "101")
    assert read_retrieval(coco.parent).ids == found.ids
    with pytest.raises(UsageError, match=r"no split 'dev'. Its splits: restval \(1\), test \(2\)"):
        read_retrieval(coco, split="dev")


def test_flickr30k_in_another_folder_with_missing_pictures(tmp_path: Path) -> None:
    images = [
        {"filename": f"{i}.jpg", "imgid": i, "split": "test", "sentences": [{"raw": f" c{i} "}]}
        for i in range(4)
    ]
    path = tmp_path / "notes" / "dataset_flickr30k.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    touch(tmp_path / "media" / "flickr30k-images" / "1.jpg", tmp_path / "media" / "3.jpg")
    touch(tmp_path / "media" / "a" / "2.jpg", tmp_path / "media" / "b" / "2.jpg")
    found = read_retrieval(path, media_root=tmp_path / "media")
    assert (found.ids, found.texts) == (("1", "3"), ("c1", "c3"))
    assert [name for name, _ in found.missing] == ["0.jpg", "2.jpg"]
    assert "no such file" in found.missing[0][1]
    assert "2 files" in found.missing[1][1]
    with pytest.raises(UsageError, match=r"None of the 4 .* was found.*media_root="):
        read_retrieval(path)
    with pytest.raises(UsageError, match=r"media folder .* does not exist"):
        read_retrieval(path, media_root=tmp_path / "gone")


@pytest.fixture
def msrvtt(tmp_path: Path) -> Path:
    videos = [
        {"video_id": f"video{i}", "split": s, "category": 1, "start time": 3.0, "end time": 9.0}
        for i, s in enumerate(["train", "validate", "test", "test"])
    ]
    sentences = [
        {"caption": f"c{i} {n}", "video_id": f"video{i}", "sen_id": n} for n in range(3) for i in range(4)
    ]
    path = tmp_path / "MSRVTT_data.json"
    path.write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    touch(*(tmp_path / "videos" / "all" / f"video{i}.mp4" for i in range(4)))
    return path


def test_msrvtt_full(msrvtt: Path) -> None:
    found = read_retrieval(msrvtt)
    assert (found.layout, found.kind, found.ids) == ("msrvtt", "video", ("video2", "video3"))
    assert found.texts == ("c2 0", "c2 1", "c2 2", "c3 0", "c3 1", "c3 2")
    assert found.owner_N.tolist() == [0, 0, 0, 1, 1, 1]
    # the files are cut already: the times are those of the videos they came from
    assert [m.span for _, _, m in found.stream() if isinstance(m, Clip)] == [None, None]
    assert read_retrieval(msrvtt, split="validate").ids == ("video1",)


def test_msrvtt_1k_a(msrvtt: Path) -> None:
    path = table(
        msrvtt.parent / "MSRVTT_JSFUSION_test.csv",
        ["key", "vid_key", "video_id", "sentence"],
        ["ret0", "msr3", "video3", "a man, singing"],
        ["ret1", "msr0", "video0", "a dog"],
        ["ret2", "msr9", "video9", "not here"],
    )
    found = read_retrieval(path)
    assert (found.ids, found.texts, found.split) == (
        ("video3", "video0"),
        ("a man, singing", "a dog"),
        "1k-A",
    )
    assert found.missing == (("video9.mp4", "there is no such file under the media folder"),)
    assert read_retrieval(msrvtt.parent).split == "1k-A"
    with pytest.raises(UsageError, match="no split 'train'"):
        read_retrieval(path, split="train")


def test_a_table_with_several_captions_per_item(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "pics" / "b.jpg")
    path = table(
        tmp_path / "t.csv",
        ["image", "caption"],
        ["a.jpg", "one"],
        ["b.jpg", "two"],
        ["gone.jpg", "lost"],
        ["gone.jpg", "lost too"],
        ["a.jpg", "three"],
        ["a.jpg", ""],
    )
    found = read_retrieval(path)
    assert (found.layout, found.split) == ("table", None)
    assert (found.texts, found.owner_N.tolist()) == (("one", "three", "two"), [0, 0, 1])
    assert [m for _, _, m in found.stream()] == [Clip(tmp_path / "a.jpg"), Clip(tmp_path / "pics" / "b.jpg")]
    assert [Path(name).name for name, _ in found.missing] == ["gone.jpg", "t.csv:6"]


def test_a_table_of_clips_of_one_video(tmp_path: Path) -> None:
    touch(tmp_path / "v.mp4")
    path = table(
        tmp_path / "t.csv",
        ["video_id", "start", "end", "sentence"],
        ["v", 0, 2, "first"],
        ["v", 2, 4, "second"],
        ["v", 0, 2, "first again"],
    )
    found = read_retrieval(path)
    assert found.kind == "video"
    assert found.owner_N.tolist() == [0, 0, 1]
    assert found.texts == ("first", "first again", "second")


def test_clips_keep_their_times(tmp_path: Path) -> None:
    touch(tmp_path / "v.mp4")
    path = table(tmp_path / "t.csv", ["video", "start", "end", "text"], ["v.mp4", 1, 2.5, "x"])
    (one,) = read_retrieval(path).stream()
    assert one[2] == Clip(tmp_path / "v.mp4", TimeSpan(1, 2.5))


def test_a_table_of_bytes_is_read_as_a_stream(tmp_path: Path) -> None:
    rows = {"image": [b"1", b"2", b"1"], "image_id": [7, 8, 7], "caption": ["x", "y", "z"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    found = read_retrieval(tmp_path / "t.parquet")
    assert (found.ids, found.texts, found.owner_N.tolist()) == (("7", "8"), ("x", "z", "y"), [0, 0, 1])
    assert list(found.stream()) == [(0, "7", b"1"), (1, "8", b"2")]
    assert list(found.stream([1])) == [(1, "8", b"2")]


def test_a_split_column(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "b.jpg")
    path = table(
        tmp_path / "t.csv", ["image", "caption", "split"], ["a.jpg", "one", "train"], ["b.jpg", "two", "test"]
    )
    assert read_retrieval(path).texts == ("two",)
    assert read_retrieval(path, split="test+train").texts == ("one", "two")
    with pytest.raises(UsageError, match=r"Its splits: test \(1\), train \(1\)"):
        read_retrieval(path, split="val")


def test_layouts_that_do_not_fit(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not have the layout 'msrvtt'; it looks like 'karpathy'"):
        read_retrieval(coco, layout="msrvtt")
    with pytest.raises(UsageError, match="no layout 'x'"):
        read_retrieval(coco, layout="x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="captions_per_item"):
        read_retrieval(coco, captions_per_item=0)
    other = tmp_path / "other.json"
    other.write_text('{"annotations": []}')
    with pytest.raises(UsageError, match="has the keys 'annotations'"):
        read_retrieval(other)
    other.write_text('{"images": [{"sentences": [{"raw": "x"}], "split": "test"}]}')
    with pytest.raises(UsageError, match="not as the layout 'karpathy' has it"):
        read_retrieval(other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="none of the annotation files"):
        read_retrieval(tmp_path / "empty")
